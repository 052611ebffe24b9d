"""The events of one request's sequences, on their way from the engine to the request."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Protocol

from serving.engine.messages import SequenceRequest, StepReport, TokenEvent


class LateError(Exception):
    """The engine has not begun with a request in time."""

    def __init__(self, after_s: float) -> None:
        super().__init__(after_s)
        self.after_s = after_s


class ReportObserver(Protocol):
    """Hears how long sequences have waited, and of each step that works on them."""

    def admitted(self, waited_s: float) -> None: ...

    def stepped(self, report: StepReport) -> None: ...


class Generation:
    """The events of one request's sequences, in order, until each sequence has finished."""

    def __init__(
        self,
        requests: Sequence[SequenceRequest],
        *,
        cancel: Callable[[int], None],
        key: str,
        observer: ReportObserver | None,
    ) -> None:
        """`cancel` takes a sequence from the engine."""
        self.observer = observer
        self._cancel = cancel
        self._open = {request.seq_id for request in requests}
        self.key = key  # name of the API key, or empty
        self.unsent = deque(requests)  # these are not in line yet
        self.arrived: list[TokenEvent] = []  # that nobody has taken; `flush` follows
        self._death: Exception | None = None
        self._news: asyncio.Future[None] | None = None  # for which `next` waits
        # While `hand_to` runs: who gets the events, and its end
        self._take: Callable[[list[TokenEvent]], None] | None = None
        self._all_handed: asyncio.Future[None]
        self.entered_s: dict[int, float] = {}  # when each sequence got in line
        # By sequence that has begun, tokens of its prompt that the cache had
        self.num_found: dict[int, int] = {}
        # When the engine has admitted one of its sequences, or has died
        self.begun_s: float | None = None

    def close(self) -> None:
        """Ends the sequences that still run. Their slots are free from the next step on."""
        self.unsent.clear()
        for seq_id in list(self._open):
            self.cancel(seq_id)

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        """Yields the events. Raises what `put_death` has got."""
        while self._open:
            for event in self._still_open(await self.next()):
                yield event

    async def first(self, *, within_s: float) -> list[TokenEvent]:
        """Waits for the first events. Raises `LateError` if the engine has not begun after so long,
        and what `put_death` has got."""
        late = asyncio.get_running_loop().call_later(within_s, self._end_if_late, within_s)
        try:
            return self._ended_in(await self.next())
        finally:
            late.cancel()

    async def next(self) -> list[TokenEvent]:
        """Waits for events. Raises what `put_death` has got."""
        while not self.arrived:
            if self._death is not None:
                raise self._death
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        events, self.arrived = self.arrived, []
        return events

    async def hand_to(self, take: Callable[[list[TokenEvent]], None]) -> None:
        """Hands over the events until each sequence has finished, those of a report together, in
        the turn of the event loop in which it arrives: to wake a task for them costs more than they
        do. Some may be of a sequence that `take` has just cancelled. Raises what `take` does, and
        what `put_death` has got."""
        if not self._open and not self.arrived:  # `first` had them all
            return
        self._take, self._all_handed = take, asyncio.get_running_loop().create_future()
        self.flush()
        try:
            await self._all_handed
        finally:
            self._take = None

    def flush(self) -> None:
        """Gives the waiting task the events that have arrived."""
        if self._take is None or self._all_handed.done():
            if self._news is not None and not self._news.done():
                self._news.set_result(None)
            return
        events, self.arrived = self.arrived, []
        try:
            if events:
                self._take(self._ended_in(events))
        except Exception as error:  # the request's, which waits for its end
            self._all_handed.set_exception(error)
            return
        if not self._open:
            self._all_handed.set_result(None)
        elif self._death is not None:
            self._all_handed.set_exception(self._death)

    def _still_open(self, events: list[TokenEvent]) -> Iterator[TokenEvent]:
        """Yields those of sequences that have not been cancelled since they were sent."""
        for event in events:
            if event.seq_id in self._open:
                if event.finish_reason is not None:
                    self._open.remove(event.seq_id)
                yield event

    def _ended_in(self, events: list[TokenEvent]) -> list[TokenEvent]:
        """Returns the events, after those that end have been noted."""
        for event in events:
            if event.finish_reason is not None:
                self._open.discard(event.seq_id)
        return events

    def cancel(self, seq_id: int) -> None:
        """Ends a sequence. What has arrived of it is dropped."""
        self._open.discard(seq_id)
        if self.arrived:
            self.arrived = [event for event in self.arrived if event.seq_id != seq_id]
        self._cancel(seq_id)

    def begin(self, now_s: float) -> None:
        """Records that the engine has begun with it. Later times change nothing."""
        if self.begun_s is None:
            self.begun_s = now_s

    def put_death(self, death: Exception) -> None:
        """Ends it after the events that it has: the waiting task gets the exception."""
        self._death = death
        self.begin(time.monotonic())
        self.flush()

    def _end_if_late(self, after_s: float) -> None:
        if self.begun_s is None:
            self._death = LateError(after_s)
            self.flush()

"""The events of one request's sequences, on their way from the engine to the request."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Protocol

from serving.engine.messages import SequenceRequest, StepReport, TokenEvent


class StepObserver(Protocol):
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
        observer: StepObserver | None,
    ) -> None:
        """`cancel` takes a sequence from the engine."""
        self.observer = observer
        self._cancel = cancel
        self._open = {request.seq_id for request in requests}
        self.key = key  # name of the API key, or empty
        self.unsent = deque(requests)  # these are not in line yet
        self._events: list[TokenEvent] = []
        self._death: Exception | None = None
        self._has_news = asyncio.Event()
        # While `hand_to` runs: who gets the events, and its end
        self._take: Callable[[Iterator[TokenEvent]], None] | None = None
        self._all_handed: asyncio.Future[None]
        self.entered_s: dict[int, float] = {}  # when each sequence got in line
        # By sequence that has begun, tokens of its prompt that the cache had
        self.num_found: dict[int, int] = {}
        # The engine has admitted one of its sequences, or has died
        self.has_begun = asyncio.Event()

    def close(self) -> None:
        """Ends the sequences that still run. Their slots are free from the next step on."""
        self.unsent.clear()
        for seq_id in list(self._open):
            self.cancel(seq_id)

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        """Yields the events. Raises what `put_death` has got."""
        while self._open:
            for event in await self.next():
                yield event

    async def next(self) -> Iterator[TokenEvent]:
        """Waits for events of open sequences. Raises what `put_death` has got."""
        while not self._events:
            if self._death is not None:
                raise self._death
            self._has_news.clear()
            await self._has_news.wait()
        events, self._events = self._events, []
        return self._still_open(events)

    async def hand_to(self, take: Callable[[Iterator[TokenEvent]], None]) -> None:
        """Hands over the events until each sequence has finished, those of a report together, in
        the turn of the event loop in which it arrives: to wake a task for them costs more than they
        do. Raises what `take` does, and what `put_death` has got."""
        self._take, self._all_handed = take, asyncio.get_running_loop().create_future()
        self.flush()
        try:
            await self._all_handed
        finally:
            self._take = None

    def flush(self) -> None:
        """Gives whoever waits for them the events that have been put."""
        self._has_news.set()
        if self._take is None or self._all_handed.done():
            return
        events, self._events = self._events, []
        try:
            if events:
                self._take(self._still_open(events))
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

    def cancel(self, seq_id: int) -> None:
        self._open.discard(seq_id)
        self._cancel(seq_id)

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        self.has_begun.set()

    def put_death(self, death: Exception) -> None:
        """Ends it after the events that it has: whoever waits gets the exception."""
        self._death = death
        self.has_begun.set()
        self.flush()

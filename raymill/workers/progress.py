"""Counts a worker's messages and passes in a round, to tell who holds the others up from who waits.

On a CPU a count grows as the thread gets there. A GPU gets there later than the thread that tells
it what to do: so an event on its stream stands for each mark, and the count grows once the GPU has
come to the event. A kernel that never ends thus leaves a worker between two messages, and a message
that never ends leaves it within one.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

CPU = torch.device("cpu")


@dataclass
class _Count:
    begun: int = 0
    finished: int = 0


class Progress:
    """The progress of one worker since its round began. Any thread may mark, and any may look."""

    def __init__(self) -> None:
        self.step = 0  # that the worker takes, for people to read
        self._num_marks = 0
        self._messages: dict[str, _Count] = {}
        self._num_open = {False: 0, True: 0}  # messages, by whether they are on the GPU
        # By stream, in order
        self._coming: dict[int, deque[tuple[torch.cuda.Event, Callable[[], None]]]] = {}
        self._lock = threading.Lock()

    def end_pass(self, device: torch.device) -> None:
        """Marks that a forward or backward pass is over."""
        self._mark(device, self._count_mark)

    @contextmanager
    def message(self, ranks: range, device: torch.device = CPU) -> Iterator[None]:
        """Lasts while this worker sends to the ranks and receives from them, from and into the
        device's memory. It is one of them, and all of them send as often."""
        name, on_gpu = name_of(ranks), device.type == "cuda"
        self._mark(device, partial(self._begin, name, on_gpu))
        try:
            yield
        finally:
            self._mark(device, partial(self._finish, name, on_gpu))

    def num_marks(self) -> int:
        """Returns a number that grows with every pass and message."""
        self._look()
        return self._num_marks

    def messages(self) -> dict[str, tuple[int, int]]:
        """Returns how many messages with each set of ranks this worker has begun and finished."""
        self._look()
        with self._lock:
            return {name: (count.begun, count.finished) for name, count in self._messages.items()}

    def is_in_message(self, *, on_gpu: bool) -> bool:
        """Reports whether this worker is in a message from and into the memory of its GPU, or of
        its host."""
        self._look()
        return self._num_open[on_gpu] > 0

    def _mark(self, device: torch.device, count: Callable[[], None]) -> None:
        if device.type != "cuda":
            with self._lock:
                count()
            return
        stream, event = torch.cuda.current_stream(device), torch.cuda.Event()
        event.record(stream)
        with self._lock:
            self._coming.setdefault(stream.cuda_stream, deque()).append((event, count))
        self._look()  # else the marks of a worker that nobody watches would pile up

    def _look(self) -> None:
        """Counts what the GPU has come to."""
        with self._lock:
            for marks in self._coming.values():
                while marks and _is_reached(marks[0][0]):
                    _, count = marks.popleft()
                    count()

    def _begin(self, name: str, on_gpu: bool) -> None:
        self._messages.setdefault(name, _Count()).begun += 1
        self._num_open[on_gpu] += 1
        self._count_mark()

    def _finish(self, name: str, on_gpu: bool) -> None:
        self._messages[name].finished += 1
        self._num_open[on_gpu] -= 1
        self._count_mark()

    def _count_mark(self) -> None:
        self._num_marks += 1


def range_of(ranks: Sequence[int]) -> range:
    """Returns ranks that follow each other at equal distances, as the holders of a copy and their
    counterparts do."""
    stride = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    as_range = range(ranks[0], ranks[-1] + 1, stride)
    assert list(ranks) == list(as_range), f"{ranks} are not at equal distances"
    return as_range


def name_of(ranks: range) -> str:
    """Returns the name under which messages between the ranks are counted."""
    return f"{ranks.start}:{ranks.stop}:{ranks.step}"


def ranks_of(name: str) -> range:
    """Returns the ranks whose messages are counted under the name."""
    return range(*map(int, name.split(":")))


def _is_reached(event: torch.cuda.Event) -> bool:
    try:
        return event.query()
    except RuntimeError:  # the device has failed, which the thread that uses it will hear
        return True

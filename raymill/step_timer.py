"""Measures a training step by phase: every moment between two lines of the ledger belongs to one
phase."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from raymill.phases import COMPUTING, PHASES, REST, Phase


@dataclass(frozen=True)
class StepTime:
    """The time since the previous line; the values of `seconds` sum to the whole."""

    wall_s: float
    seconds: dict[str, float] = field(default_factory=dict)  # by phase
    num_lanes: int = 0  # backward passes in it
    num_compiled: int = 0  # graphs, which take their time in one of the phases
    processor_s: float | None = None  # of this thread in `COMPUTING`; None where a GPU computes


class HostClock:
    """Marks moments, and returns the time between two of them once it is known: here, at once."""

    def mark(self) -> float:
        return time.perf_counter()

    def elapsed_s(self, start: float, end: float) -> float:
        return end - start


class CudaClock:
    """Marks moments in the GPU's own queue without waiting: an unfinished phase counts in a later
    step."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_s(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float | None:
        return start.elapsed_time(end) / 1000 if end.query() else None


class StepTimer:
    """Measures seconds by phase, from one `take` to the next. A phase inside another one interrupts
    it.

    The timer itself is the context of each phase, which takes half the time of one that a generator
    makes.
    """

    def __init__(
        self,
        clock: HostClock | CudaClock | None = None,
        *,
        num_compiled: Callable[[], int] = lambda: 0,
    ) -> None:
        """`num_compiled` counts the graphs that this process has compiled so far."""
        self._clock = clock or HostClock()
        self._names = [REST]  # the phases that are open
        self._mark: Any = self._clock.mark()
        self._spans: deque[tuple[str, Any, Any]] = deque()
        self._num_lanes = 0
        self._count_compiled = num_compiled
        self._num_compiled = num_compiled()
        self._is_on_host = isinstance(self._clock, HostClock)
        self._processor_mark_s = time.thread_time()
        self._processor_s = 0.0
        self._taken = self._now_s()

    def phase(self, name: Phase) -> Self:
        """Begins a phase, which lasts as long as the context."""
        self._switch()
        self._names.append(name)
        self._num_lanes += name == "backward"
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self._switch()
        self._names.pop()

    def moment(self) -> Any:
        """Marks a moment on the timer's clock."""
        return self._clock.mark()

    def between_s(self, start: Any, end: Any) -> float | None:
        """Returns the seconds between two moments, None where a GPU has not come to them yet."""
        return self._clock.elapsed_s(start, end)

    def take(self) -> StepTime:
        """Returns the time since the last call."""
        self._switch()
        before, self._taken = self._taken, self._now_s()
        wall_s = self._taken - before
        sums: dict[str, float] = {}
        while self._spans:
            name, start, end = self._spans[0]
            elapsed_s = self._clock.elapsed_s(start, end)
            if elapsed_s is None:
                break
            sums[name] = sums.get(name, 0.0) + elapsed_s
            self._spans.popleft()
        num_lanes, self._num_lanes = self._num_lanes, 0
        processor_s, self._processor_s = self._processor_s, 0.0
        num_compiled = self._count_compiled() - self._num_compiled
        self._num_compiled += num_compiled
        in_order = {name: sums[name] for name in (*PHASES, REST) if name in sums}
        known_s = processor_s if self._is_on_host else None
        return StepTime(wall_s, in_order, num_lanes, num_compiled, known_s)

    def _now_s(self) -> float:
        """Returns the moment just marked if it is on the host's clock, so that the phases sum to
        the whole."""
        return self._mark if self._is_on_host else time.perf_counter()

    def _switch(self) -> None:
        """Ends the span of the open phase."""
        mark = self._clock.mark()
        self._spans.append((self._names[-1], self._mark, mark))
        self._mark = mark
        if self._is_on_host:
            before_s, self._processor_mark_s = self._processor_mark_s, time.thread_time()
            if self._names[-1] in COMPUTING:
                self._processor_s += self._processor_mark_s - before_s

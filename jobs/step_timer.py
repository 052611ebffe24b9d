"""Where the time of a training step goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StepTimer:
    """Seconds of one step by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def wall_s(self) -> float:
        return time.perf_counter() - self._start

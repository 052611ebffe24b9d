"""CPU seconds and memory of a process and all that it starts, read from outside while it works."""

import threading
from collections import defaultdict
from types import TracebackType
from typing import Self

import psutil

_PERIOD_S = 0.25
_PROCESS_ID = tuple[int, float]


class ProcessMeter:
    """Samples a process tree four times a second in a context; a process that ended counts as it
    was last seen."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._before_s: dict[_PROCESS_ID, float] = {}
        self._cpu_s: dict[_PROCESS_ID, float] = {}
        self._roles: dict[_PROCESS_ID, str] = {}
        self._peak_bytes: dict[_PROCESS_ID, int] = defaultdict(int)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._sample()
        self._before_s = dict(self._cpu_s)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        self._sample()

    def cpu_s(self, role: str | None = None) -> float:
        """Returns user and system seconds since the context was entered: of all, or of `driver`,
        `worker` or `ray`."""
        return sum(
            seconds - self._before_s.get(process, 0.0)
            for process, seconds in self._cpu_s.items()
            if role in (None, self._roles[process])
        )

    def peaks_mb(self, role: str) -> list[float]:
        """Returns the largest resident memory of each process, in MB, without shared memory (the
        object store, libraries)."""
        peaks = [
            size / 1e6 for process, size in self._peak_bytes.items() if self._roles[process] == role
        ]
        return sorted(peaks, reverse=True)

    def _run(self) -> None:
        while not self._done.wait(_PERIOD_S):
            self._sample()

    def _sample(self) -> None:
        for process in [self._root, *self._root.children(recursive=True)]:
            try:
                with process.oneshot():
                    key = (process.pid, process.create_time())
                    times, memory, command = (
                        process.cpu_times(),
                        process.memory_info(),
                        process.cmdline(),
                    )
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            self._cpu_s[key] = times.user + times.system
            self._peak_bytes[key] = max(self._peak_bytes[key], memory.rss - memory.shared)
            if process.pid == self._root.pid:
                self._roles[key] = "driver"
            elif self._roles.get(key) != "worker":
                # One is named after its task only once it has one.
                self._roles[key] = "worker" if command and command[0].startswith("ray::") else "ray"

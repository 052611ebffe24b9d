"""Measures the processor time and the memory of each test file: `pytest --processor-seconds FILE`.

    python -m tests.processor_seconds FILE       prints the sums by folder and the dearest files

Seconds of a clock say how busy the machine was; processor seconds hardly change with it. They count
pytest's process, the processes that it has started and that have ended, and those that still run.
"""

import resource
import sys
from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
import pytest

_LEAST_S = 0.5  # of a test or a fixture that has a row of its own
_NUM_SHOWN = 40
_NEVER_RUN = (psutil.NoSuchProcess, psutil.AccessDenied)


def own_s() -> float:
    """Returns the processor seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def running_s() -> float:
    """Returns the processor seconds of the processes below this one that still run, with those of
    their own children that have ended."""
    seconds = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
        except _NEVER_RUN:
            continue
        seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


@dataclass(frozen=True)
class Row:
    """What a file, or one phase of a test, has used. `peak_mb` is the most memory that its pytest
    process has had until then."""

    seconds: float
    peak_mb: int
    phase: str
    name: str

    @classmethod
    def parse(cls, line: str) -> Self:
        seconds, peak_mb, phase, name = line.split("\t", 3)
        return cls(float(seconds), int(peak_mb), phase, name)

    def __str__(self) -> str:
        return f"{self.seconds:.2f}\t{self.peak_mb}\t{self.phase}\t{self.name}"


class ProcessorSeconds:
    """Appends a row for each file's imports and for its tests, and for what takes longest of
    these. Several processes append to one file."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._file_began_s = self._now_s()

    @staticmethod
    def _now_s() -> float:
        return own_s() + running_s()

    def _append(self, seconds: float, phase: str, name: str) -> None:
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        row = f"{Row(seconds, peak_mb, phase, name)}\n"
        with self._path.open("a", encoding="utf-8") as file:
            file.write(row)

    @contextmanager
    def _measured(self, phase: str, name: str, *, least_s: float) -> Iterator[None]:
        began_s = own_s()
        yield
        if (seconds := own_s() - began_s) >= least_s:
            self._append(seconds, phase, name)

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Generator[None, Any, Any]:
        is_file = isinstance(collector, pytest.Module)
        with self._measured("imports", collector.nodeid, least_s=0.0 if is_file else _LEAST_S):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, Any, Any]:
        with self._measured("setup", item.nodeid, least_s=_LEAST_S):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        with self._measured("test", item.nodeid, least_s=_LEAST_S):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, Any, Any]:
        with self._measured("teardown", item.nodeid, least_s=_LEAST_S):
            result = yield
        file = item.nodeid.partition("::")[0]
        if nextitem is None or nextitem.nodeid.partition("::")[0] != file:
            now_s = self._now_s()
            self._append(now_s - self._file_began_s, "file", file)
            self._file_began_s = now_s
        return result

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self) -> None:
        self._file_began_s = self._now_s()


def summary(rows: list[Row]) -> list[str]:
    """Returns lines: the sum of the imports, of each folder's files, and the dearest files."""
    files: dict[str, float] = defaultdict(float)
    folders: dict[str, float] = defaultdict(float)
    for row in rows:
        if row.phase == "file":
            files[row.name] += row.seconds
            folders[str(Path(row.name).parent)] += row.seconds
    imports_s = sum(row.seconds for row in rows if row.phase == "imports")
    peak_mb = max((row.peak_mb for row in rows), default=0)
    lines = [f"{sum(files.values()):7.1f} s in tests, {imports_s:.1f} s in imports, {peak_mb} MB"]
    for table in (folders, files):
        dearest = sorted(table.items(), key=lambda item: -item[1])[:_NUM_SHOWN]
        lines += ["", *[f"{seconds:7.1f} s  {name}" for name, seconds in dearest]]
    return lines


def main(path: Path) -> None:
    rows = [Row.parse(line) for line in path.read_text(encoding="utf-8").splitlines()]
    print("\n".join(summary(rows)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

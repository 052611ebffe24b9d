"""Divides the slow tests into slices of about equal time, of which each change runs another one.

    python -m tests.slices N        prints the slice of this commit, such as 3/14

Every test file lies in one slice, so a new one has its place by itself. A file whose slow tests
take longer than `LONGEST_PART_S` is dealt out test by test, unless its tests build on each other
(the marker `in_order`). The seconds stand in slow_seconds.toml, for files that take more than a
minute; others with slow tests count as one minute.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Self

import pytest

from tests.repository import REPOSITORY

TABLE = REPOSITORY / "tests" / "slow_seconds.toml"
LONGEST_PART_S = 480.0

_UNKNOWN_S = 60.0
_IMPORT_S = 0.1  # of a file without slow tests, which is imported all the same
_END_S = 60.0  # that an interrupted session has for its teardown
_DAY_S = 86_400
_IS_SLOW = re.compile(r"\bmark\.slow\b")
_IS_IN_ORDER = re.compile(r"\bmark\.in_order\b")

Part = tuple[str, int, int]
"""A file, and which of how many parts of its slow tests."""


@dataclass(frozen=True)
class Slice:
    """One of `count` slices; `number` begins at 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parses `3/14`. Raises `pytest.UsageError`."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise pytest.UsageError(f"--slice {text}: expected K/N with 1 <= K <= N, such as 3/14")
        return cls(int(match[1]), int(match[2]))


@cache
def known_seconds() -> dict[str, float]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


@cache
def seconds_of_files() -> dict[str, float]:
    """Returns every test file, as in pytest's node ids, and the seconds of its slow tests."""
    known, seconds = known_seconds(), {}
    for path in sorted((REPOSITORY / "tests").rglob("test_*.py")):
        name = path.relative_to(REPOSITORY).as_posix()
        has_slow = _IS_SLOW.search(path.read_text(encoding="utf-8")) is not None
        seconds[name] = known.get(name, _UNKNOWN_S if has_slow else _IMPORT_S)
    return seconds


@cache
def files_in_order() -> frozenset[str]:
    """Returns the files whose tests build on each other: one slice takes them all."""
    paths = (REPOSITORY / "tests").rglob("test_*.py")
    return frozenset(
        path.relative_to(REPOSITORY).as_posix()
        for path in paths
        if _IS_IN_ORDER.search(path.read_text(encoding="utf-8"))
    )


def divided(seconds: Mapping[str, float], count: int) -> list[list[Part]]:
    """Returns the parts of each slice: the longest first, each to the slice that has least so
    far."""
    parts: list[tuple[float, Part]] = []
    for file, length in seconds.items():
        is_whole = file in files_in_order()
        num_parts = 1 if is_whole else max(1, -int(-length // LONGEST_PART_S))
        for part in range(num_parts):
            parts.append((length / num_parts, (file, part, num_parts)))
    parts.sort(key=lambda item: (-item[0], item[1]))
    slices: list[list[Part]] = [[] for _ in range(count)]
    loads = [0.0] * count
    for length, part in parts:
        least = loads.index(min(loads))
        slices[least].append(part)
        loads[least] += length
    return slices


class SlicePlugin:
    """Has pytest take one slice: `pytest -m slow --slice 3/14`."""

    def __init__(self, chosen: Slice) -> None:
        self._chosen = chosen
        self._parts: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for file, part, num_parts in divided(seconds_of_files(), chosen.count)[chosen.number - 1]:
            self._parts[file].append((part, num_parts))
        self._seconds: dict[str, float] = defaultdict(float)

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        if not collection_path.match("test_*.py"):
            return None
        is_here = collection_path.relative_to(REPOSITORY).as_posix() in self._parts
        return None if is_here else True

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Deals out the tests that the markers have left of each file."""
        numbers: dict[str, int] = defaultdict(int)
        kept, left = [], []
        for item in items:
            file = item.nodeid.partition("::")[0]
            parts = self._parts.get(file, [])  # none of a file that was named to pytest by itself
            is_here = any(numbers[file] % num_parts == part for part, num_parts in parts)
            (kept if is_here else left).append(item)
            numbers[file] += 1
        if left:
            config.hook.pytest_deselected(items=left)
        items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid.partition("::")[0]] += report.duration

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Prints the lines of slow_seconds.toml that this run would write."""
        terminalreporter.section(f"seconds by file, slice {self._chosen.number}")
        for file, seconds in sorted(self._seconds.items(), key=lambda item: -item[1]):
            num_parts = self._parts[file][0][1]
            note = f"  # {len(self._parts[file])} of its {num_parts} parts" if num_parts > 1 else ""
            terminalreporter.write_line(f'"{file}" = {seconds:.0f}{note}')


class TimeLimit:
    """Ends a session that takes longer, and says in which test it was."""

    def __init__(
        self, seconds: float, *, say: Callable[[str], None], end_s: float = _END_S
    ) -> None:
        self._seconds, self._say, self._end_s = seconds, say, end_s
        self._test, self._began_s = "before the first test", time.monotonic()
        self._is_over = False
        self._handler = signal.signal(signal.SIGINT, _interrupt_at_a_line)
        self._timer = threading.Timer(seconds, self._interrupt)
        self._timer.daemon = True
        self._timer.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self._is_over:  # a callback of a library may have swallowed the interrupt
            pytest.exit("the tests' limit is over", returncode=pytest.ExitCode.INTERRUPTED)
        self._test, self._began_s = f"in {nodeid}", time.monotonic()

    def pytest_unconfigure(self) -> None:
        self._timer.cancel()
        signal.signal(signal.SIGINT, self._handler)

    def _interrupt(self) -> None:
        self._is_over = True
        self._say(
            f"\nthe tests' limit of {self._seconds:.0f} s ended {self._test}, "
            f"{time.monotonic() - self._began_s:.0f} s after that had begun"
        )
        self._timer = threading.Timer(self._end_s, os._exit, [2])
        self._timer.daemon = True
        self._timer.start()
        os.kill(os.getpid(), signal.SIGINT)


def _interrupt_at_a_line(signum: int, frame: FrameType | None) -> None:
    """Raises `KeyboardInterrupt`, a moment later where the interpreter is at an instruction that
    belongs to no line: pytest ends with an error of its own when it tells of such a place."""
    if frame is not None and frame.f_lineno is None:
        threading.Timer(0.01, os.kill, [os.getpid(), signum]).start()
        return
    raise KeyboardInterrupt


def number_of_commit(folder: Path = REPOSITORY) -> int:
    """Returns a number that grows by one with each commit. A shallow clone does not know how many
    there are, and takes one from the commit's hash; a folder without git takes the day's."""
    if _git(folder, "rev-parse", "--is-shallow-repository") == "false":
        return int(_git(folder, "rev-list", "--count", "HEAD") or 0)
    commit = _git(folder, "rev-parse", "HEAD")
    return int(commit[:8], 16) if commit else int(time.time()) // _DAY_S


def _git(folder: Path, *words: str) -> str:
    """Returns what git says, or nothing where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    slices = int(sys.argv[1])
    print(f"{number_of_commit() % slices + 1}/{slices}")

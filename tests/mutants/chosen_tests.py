"""The tests that try a mutant: which of an area's they are, and in which order."""

import json
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Self

import pytest

from tests.processor_seconds import own_s

LONGEST_TEST_S = 8.0
"""Processor seconds of a test: a longer one tries no mutant."""


_MANY_TIMES = 3


@dataclass(frozen=True)
class Baseline:
    """What the tests of an area do without a mutant: the processor seconds of each, its file, and by
    file of the code the lines of the functions that it enters in pytest's own process."""

    seconds: Mapping[str, float]
    paths: Mapping[str, str]
    entered: Mapping[str, Mapping[str, Sequence[int]]]

    @classmethod
    def read(cls, path: Path) -> Self:
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def order(self, file: str, function: int | None) -> list[str]:
        """Returns the tests that may see a mutant: first those that enter its function; each time
        the cheapest first. At the end are those of files with a test that takes longer than any
        that is tried: what it made may be what they share, and the first of them would make it."""
        entering = {
            test
            for test, files in self.entered.items()
            if function is not None and function in files.get(file, ())
        }
        long = {test for test, seconds in self.seconds.items() if seconds > LONGEST_TEST_S}
        dear = {self.paths[test] for test in long}
        return sorted(
            self.seconds.keys() - long,
            key=lambda test: (
                self.paths[test] in dear,
                test not in entering,
                self.seconds[test],
                test,
            ),
        )


@dataclass
class BaselineRecorder:
    """A plugin that records a `Baseline` of these files of the code."""

    files: frozenset[str]
    path: Path
    seconds: dict[str, float] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    entered: dict[str, dict[str, set[int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._here: dict[str, set[int]] = defaultdict(set)

    def _enter(self, frame: FrameType, event: str, argument: object) -> None:
        del event, argument
        code: CodeType = frame.f_code
        if code.co_filename in self.files:
            self._here[code.co_filename].add(code.co_firstlineno)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._here.clear()
        began_s = own_s()
        threading.settrace(self._enter)
        sys.settrace(self._enter)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            self.seconds[item.nodeid] = own_s() - began_s
            self.paths[item.nodeid] = str(item.path)
            self.entered[item.nodeid] = dict(self._here)

    def pytest_sessionfinish(self) -> None:
        entered = {
            test: {file: sorted(lines) for file, lines in files.items()}
            for test, files in self.entered.items()
        }
        values = {"seconds": self.seconds, "paths": self.paths, "entered": entered}
        self.path.write_text(json.dumps(values), encoding="utf-8")


@dataclass(frozen=True, eq=False)  # pytest hashes its plugins
class InThisOrder:
    """A plugin that runs these tests alone, in this order. It ends the process where one takes many
    times the seconds that it usually does. What tests share is made before the one that comes first
    here: that may take as long as the dearest of all."""

    tests: Sequence[str]
    usual_s: Mapping[str, float]

    def pytest_runtest_logstart(self) -> None:
        _end_after(max(self.usual_s.values()))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> None:
        _end_after(self.usual_s[item.nodeid])

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        places = {test: place for place, test in enumerate(self.tests)}
        kept = [item for item in items if item.nodeid in places]
        items[:] = sorted(kept, key=lambda item: places[item.nodeid])


def _end_after(usual_s: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, 2 + _MANY_TIMES * usual_s)

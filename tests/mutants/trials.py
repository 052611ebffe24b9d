"""Runs an area's tests on mutants: each in a forked process of its own, which has imported other
packages before.

A mutant is killed where a test fails, where nothing can be imported any more, or where its tests
take many times as long as they usually do.
"""

import importlib
import os
import resource
import select
import signal
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NoReturn

import pytest

from tests.mutants.chosen_tests import Baseline, BaselineRecorder, InThisOrder
from tests.mutants.planting import plant
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

_NEVER_FIRST = ("_pytest", "conftest", "pytest", "xdist")
_ARGUMENTS = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
_ARGUMENTS += ["--rootdir", str(REPOSITORY), "-c", str(REPOSITORY / "pyproject.toml")]
_FAST = ["-m", "not slow and not cluster and not more"]
_USUAL_S = 20.0  # of a clock: where no test ends within `limit_s` of it, a mutant is stuck


class Outcome(StrEnum):
    KILLED = "killed"  # by a test, or by an import
    STUCK = "stuck"  # killed for its time
    SURVIVED = "survived"


@dataclass(frozen=True)
class Trial:
    """A mutant: what stands in place of the module, and the tests that try it, in order."""

    module: str
    source: str
    tests: Sequence[str]


class Area:
    """Files of tests, and what they do to mutants of some modules.

    `paths` are files and folders of tests, `files` those of the modules. Raises `ValueError` where
    a test fails without a mutant."""

    def __init__(self, paths: Sequence[str], files: Sequence[Path]) -> None:
        self._paths = [*paths]
        limit_s(1)  # measured once, before any process
        with tempfile.TemporaryDirectory(prefix="mutants-") as name:
            folder = Path(name)
            process = _forked(folder, lambda: self._record(folder, files))
            status = process.wait(limit_s(300))
            text = (folder / "output").read_text(encoding="utf-8", errors="replace")
            if status != 0:
                raise ValueError(f"the tests fail without any mutant:\n{text[-4000:]}")
            self.baseline = Baseline.read(folder / "baseline.json")
            imported = (folder / "imported").read_text(encoding="utf-8").split()
        for name in imported:  # so that no trial has to
            with suppress(ImportError):  # of what a test alone can import
                importlib.import_module(name)

    def _record(self, folder: Path, files: Sequence[Path]) -> int:
        names = frozenset(str(file) for file in files)
        recorder = BaselineRecorder(names, folder / "baseline.json")
        code = pytest.main([*_ARGUMENTS, *_FAST, *self._paths], plugins=[recorder])
        (folder / "imported").write_text("\n".join(_imported()), encoding="utf-8")
        return int(code)

    def outcomes(
        self, trials: Sequence[Trial], *, num_processes: int
    ) -> Iterator[tuple[Trial, Outcome]]:
        """Yields each trial and how it ended, so many at a time, in the order in which they end."""
        waiting, running = [*trials], {}
        with ExitStack() as started:
            while waiting or running:
                while waiting and len(running) < num_processes:
                    trial = waiting.pop(0)
                    process = started.enter_context(self._started(trial))
                    running[process.fd] = trial, process
                ended, _, _ = select.select([*running], [], [], 1.0)
                silent = [
                    fd
                    for fd, (_, process) in running.items()
                    if process.silent_s > limit_s(_USUAL_S)
                ]
                for fd in {*ended, *silent}:
                    trial, process = running.pop(fd)
                    yield trial, _outcome(process.wait(0))

    @contextmanager
    def _started(self, trial: Trial) -> Iterator["_Process"]:
        with tempfile.TemporaryDirectory(prefix="mutant-") as name:
            folder = Path(name)
            process = _forked(folder, lambda: self._try(trial, folder))
            yield process
            process.wait(0)

    def _try(self, trial: Trial, folder: Path) -> int:
        # Of each process that a test starts, too: of pytest's own, `order` ends each test in time
        cpu_s = 10 + 2 * int(sum(self.baseline.seconds.values()))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 5))
        plant(trial.module, trial.source, folder)
        files = sorted({self.baseline.paths[test] for test in trial.tests})
        order = InThisOrder(trial.tests, self.baseline.seconds)
        return int(pytest.main([*_ARGUMENTS, *_FAST, *files], plugins=[order]))


def _outcome(status: int | None) -> Outcome:
    if status in (None, -signal.SIGPROF, -signal.SIGXCPU):
        return Outcome.STUCK
    return Outcome.KILLED if status else Outcome.SURVIVED


class _Process:
    """A forked process, the first of its group, which prints into a file."""

    def __init__(self, pid: int, output: Path) -> None:
        self._pid, self.fd = pid, os.pidfd_open(pid)
        self._output = output
        self._status: int | None = None
        self._is_over = False

    @property
    def silent_s(self) -> float:
        """The seconds since it has printed; pytest prints after each test."""
        return time.time() - self._output.stat().st_mtime

    def wait(self, seconds: float) -> int | None:
        """Returns the exit code, or minus the signal that ended it; None where it took longer, and
        is ended. Its group ends with it."""
        if self._is_over:
            return self._status
        ended, _, _ = select.select([self.fd], [], [], seconds)
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        os.close(self.fd)
        self._is_over = True
        self._status = os.waitstatus_to_exitcode(status) if ended else None
        return self._status


def _forked(folder: Path, work: Callable[[], int]) -> _Process:
    """Starts a process that works, prints into `folder`/output, keeps temporary files in `folder`,
    and exits with what `work` returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    output = folder / "output"
    output.touch()
    pid = os.fork()
    if pid == 0:
        _work_and_exit(folder, work)
    return _Process(pid, output)


def _work_and_exit(folder: Path, work: Callable[[], int]) -> NoReturn:
    code = 70
    try:
        os.setsid()
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for standard in (1, 2):
            os.dup2(output, standard)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        temporary = folder / "tmp"
        temporary.mkdir()
        os.environ.pop("PYTEST_ADDOPTS", None)  # meant for the tests of whoever tries mutants
        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(temporary)
        os.chdir(REPOSITORY)
        code = work()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _imported() -> list[str]:
    """Returns the packages of others that are imported, and which a trial may find imported."""
    installed = sysconfig.get_paths()["purelib"]
    names = []
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if file.startswith(installed) and "." not in name and not name.startswith(_NEVER_FIRST):
            names.append(name)
    return names

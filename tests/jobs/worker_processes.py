"""Starts processes that train or meet: a server forks each of them, so that PyTorch is imported
once and not once each."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.time_limits import limit_s

_PRELOADED = [
    "tests.jobs.meeting_worker",
    "tests.jobs.poisoned_runs",
    "tests.jobs.runs_in_rounds",
    "tests.jobs.hanging_runs",
    "tests.jobs.faulty_runs",
]


def worker_process(target: Callable[..., object], *arguments: Any) -> BaseProcess:
    """Returns a process that is not started. Its environment is the server's: what it needs is
    among its arguments."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context.Process(target=target, args=arguments)


def exit_code(process: BaseProcess, *, timeout_s: float = 60) -> int:
    """Waits for the process, no longer than `limit_s(timeout_s)`."""
    process.join(limit_s(timeout_s))
    assert process.exitcode is not None, f"process {process.pid} does not end"
    return process.exitcode


def into_log(path: Path) -> None:
    """Appends to the file all that this process prints from now on."""
    with path.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)

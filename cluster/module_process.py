"""A module that needs no cluster, run as `python -m MODULE` beside this process."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cluster.code_folders import CODE_ROOT
from cluster.progress import ProgressView
from cluster.stage_module import MISUSED, ModuleFailedError, ModuleMisusedError, parse_result

_LOG_S = 5.0  # for the last lines, where a process that outlives its module still holds the pipe


def run_module(module: str, *arguments: str) -> dict[str, Any]:
    """Runs the module here, and returns its result, also one that it found not good, which its exit code 1 says."""
    command = [sys.executable, "-m", module, *arguments]
    environment = os.environ | {"PYTHONPATH": str(CODE_ROOT)}
    with _shown() as stderr:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment, check=False)
    results = [found for line in done.stdout.splitlines() if (found := parse_result(line)) is not None]
    if done.returncode not in (0, 1) or not results:
        kind = ModuleMisusedError if done.returncode == MISUSED else ModuleFailedError
        raise kind(f"{module} ended with exit code {done.returncode}; its message is above")
    return results[-1]


@contextmanager
def _shown() -> Iterator[int]:
    """A file descriptor for a module's standard error: its reports are shown as progress, its lines as they are."""
    reading, writing = os.pipe()

    def show() -> None:
        with ProgressView() as view, os.fdopen(reading, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                view.line(line.rstrip("\n"))

    thread = threading.Thread(target=show, name="module-log", daemon=True)
    thread.start()
    try:
        yield writing
    finally:
        os.close(writing)
        thread.join(_LOG_S)

"""Runs `tests.jobs.train_worlds` in real processes, and returns what it prints."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.repository import REPOSITORY
from tests.time_limits import limit_s

Outcome = dict[str, Any]


def run_worlds(folder: Path, worlds: str, suite: str, *, within_s: float) -> list[Outcome]:
    """Returns a result for each case of the suite and each world; `worlds` is as the command has
    it."""
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.jobs.train_worlds", worlds, str(folder), suite]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        timeout=limit_s(within_s),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcomes: list[Outcome] = json.loads(done.stdout.splitlines()[-1])
    return outcomes

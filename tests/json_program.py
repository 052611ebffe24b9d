"""Runs a Python program whose last line is a JSON object."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.repository import REPOSITORY
from tests.time_limits import limit_s


def last_line_of(
    *words: str,
    seconds: float = 60,
    folder: Path = REPOSITORY,
    env: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Returns what the program says at last, which ends well within so many seconds."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=limit_s(seconds),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found

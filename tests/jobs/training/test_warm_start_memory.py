"""The memory of the process that begins a run from weights: a small part of what these take."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.repository import REPOSITORY
from tests.time_limits import limit_s

pytestmark = pytest.mark.slow


def warm_start(way: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.jobs.warm_starts", way, str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        timeout=limit_s(60),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run__that_begins_from_weights__holds_a_small_part_of_them(tmp_path: Path) -> None:
    warm_start("made", tmp_path)
    found: dict[str, dict[str, Any]] = {}
    for way in ("begun", "loaded"):
        found[way] = json.loads(warm_start(way, tmp_path).splitlines()[-1])
    print(found)
    whole = found["loaded"]["parameters"]
    assert whole > 160e6
    assert found["loaded"]["peak"] > whole, "what it would be"
    assert found["begun"]["peak"] < whole / 3

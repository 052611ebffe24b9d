"""Runs the `raymill` command as a person does: as a process, or within this one where a start of
Python costs more."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

RAYMILL = [sys.executable, "-m", "cluster.cli"]


def environment() -> dict[str, str]:
    """Returns this process's environment without what it knows of a Ray cluster."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "PYTHONPATH": str(REPOSITORY)
    }


def raymill(
    *words: str,
    folder: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Returns what the command did in the folder."""
    return subprocess.run(
        [*RAYMILL, *words],
        cwd=folder,
        env=environment() | dict(env or {}),
        capture_output=True,
        text=True,
        timeout=limit_s(timeout_s),
        check=False,
    )


def raymill_result(*words: str, folder: Path) -> dict[str, Any]:
    """Returns the JSON result of a command that must succeed."""
    done = raymill(*words, "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def raymill_here(
    *words: str, capsys: pytest.CaptureFixture[str]
) -> tuple[int, dict[str, Any], str]:
    """Returns the command's exit code, its JSON result, and what it said, when run within this
    process."""
    code = main([*words, "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out.splitlines()[-1]) if said.out else {}, said.err

"""Logs as JSON: one object a line, whoever logs and whatever is in the message."""

import asyncio
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cluster.settings.code_folders import code_version
from serving.protocol.json_log import FORMAT_VARIABLE, REPLICA_VARIABLE, VERSION_CHARS
from tests.repository import REPOSITORY
from tests.serving.engine_processes import engine
from tests.time_limits import limit_s

SCRIPT = """
import logging, os, sys, warnings
from logging.handlers import MemoryHandler
from serving.protocol.json_log import CURRENT_REQUEST, Process, log_in, log_uncaught

serve = logging.getLogger("ray.serve")
serve.propagate = False
serve.addHandler(logging.StreamHandler())
log_in(sys.argv[1] or None, Process.REPLICA, replica="app#Replica#x")
sys.excepthook = log_uncaught
log = logging.getLogger("serving.somewhere")
log.warning("two\\nlines, %s and \\u2028", "naïve")
CURRENT_REQUEST.set("from-the-gate")
try:
    raise ValueError("why")
except ValueError:
    log.error("it fails", exc_info=True)
warnings.warn("old")
serve.warning("by Ray")
serve.handlers.clear()  # as Ray Serve does when its own settings arrive
serve.addHandler(MemoryHandler(1, target=logging.StreamHandler()))
serve.warning("by Ray again", extra={"request_id": "from-ray"})
raise KeyError("the end")
"""


def logged(log_format: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, log_format],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=limit_s(60),
    )
    return done.stderr.splitlines()


@pytest.mark.parametrize("way", ["by setting", "by environment"])
def test_every_line_is_an_object(way: str) -> None:
    lines = logged("json") if way == "by setting" else logged("", **{FORMAT_VARIABLE: "json"})
    entries: list[dict[str, Any]] = [json.loads(line) for line in lines]
    assert [entry["message"] for entry in entries if entry["logger"] != "py.warnings"] == [
        "two\nlines, naïve and \u2028",
        "it fails",
        "by Ray",
        "by Ray again",
        "the process ends: KeyError",
    ]
    for entry in entries:
        facts = (entry["process"], entry["replica"], entry["version"])
        assert facts == ("replica", "app#Replica#x", code_version()[:VERSION_CHARS])
        assert datetime.now(UTC) - datetime.fromisoformat(entry["time"]) < timedelta(
            seconds=limit_s(60)
        )
    first, failed, warned, _, again, last = entries
    assert (first["level"], first["logger"], "request_id" in first) == (
        "WARNING",
        "serving.somewhere",
        False,
    )
    assert failed["request_id"] == "from-the-gate" and failed["exception"].endswith(
        "ValueError: why"
    )
    assert "UserWarning: old" in warned["message"]
    assert again["request_id"] == "from-ray"
    assert last["level"] == "CRITICAL" and last["exception"].endswith("KeyError: 'the end'")


def test_text_stays_what_python_writes() -> None:
    lines = logged("text", **{FORMAT_VARIABLE: "json"})
    assert lines[:2] == ["two", "lines, naïve and "] and lines[-1].endswith("KeyError: 'the end'")


def test_an_engine_process_logs_as_its_replica_does(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(FORMAT_VARIABLE, "json")
    monkeypatch.setenv(REPLICA_VARIABLE, "app#Replica#x")
    monkeypatch.setenv("HOME", str(tmp_path))  # where there are no kernels yet
    monkeypatch.setenv("CXX", str(tmp_path / "nowhere"))

    async def scenario() -> None:
        async with engine(checkpoint):
            pass

    asyncio.run(scenario())
    [entry] = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert (entry["process"], entry["replica"], entry["level"]) == (
        "engine",
        "app#Replica#x",
        "WARNING",
    )
    assert entry["message"].startswith("PyTorch computes") and entry["logger"].endswith(
        "run_engine"
    )

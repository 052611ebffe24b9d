"""The GPU benchmark runs here in its tiny form, and goes on when a contender fails."""

import json
import os
import subprocess
import sys

import pytest

from tests.benchmarks.bench_gpu import CHECKS, CONTENDERS, EXACT, is_right, measured, table
from tests.repository import REPOSITORY
from tests.time_limits import limit_s


@pytest.mark.slow
def test_it_measures_every_contender() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.bench_gpu", "--device", "cpu", "--tiny"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=limit_s(120), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["contender"]: row for row in json.loads(done.stdout.splitlines()[-1])["rows"]}
    assert rows.keys() == {*CHECKS, *CONTENDERS}
    assert all(good for check in CHECKS for good, _ in rows.pop(check)["checks"].values())
    assert all(row["tokens_per_s"] > 0 and row["peak_bytes"] > 0 for row in rows.values())
    assert len({rows[name]["hash"] for name in EXACT}) == 1
    assert rows["exact"]["snapshot_s"] > 0
    assert all(
        row["losses"][0] == pytest.approx(rows["exact"]["losses"][0], abs=0.05)
        for row in rows.values()
    )


def test_a_contender_that_fails_has_its_error_in_its_row() -> None:
    row = {"contender": "exact", "preset": "tiny"} | measured(
        {"device": "nowhere"}, deadline=float("inf")
    )
    assert "nowhere" in row["error"]
    assert not is_right(row, [row])
    peer = {"contender": "plain", "preset": "tiny", "error": "exit code 1: no compiler"}
    assert is_right(peer, [peer])
    assert "no compiler" in table([peer])
    assert measured({}, deadline=0.0) == {"error": "no time left"}


def test_two_hashes_of_the_same_run_are_an_error() -> None:
    figures = {"preset": "tiny", "tokens_per_s": 1.0, "mfu": None, "peak_bytes": 1}
    rows = [
        figures | {"contender": name, "hash": digest}
        for name, digest in zip(EXACT, "ab", strict=True)
    ]
    assert not any(is_right(row, rows) for row in rows)
    assert "WRONG" in table(rows)
    assert all(is_right(row, rows[:1]) for row in rows[:1])

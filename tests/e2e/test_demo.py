"""The whole demo works on a processor restricted to AVX2; most laptops and many clouds have no
more. The quick one ends in a minute, and shows the same of a kill."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cluster.output.result_text import printable
from cluster.storage.uris import open_storage
from jobs.run.ledger import Ledger
from tests.command_line import raymill
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

LONGEST_S = 180.0
QUICK_S = 60.0
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "RAYMILL_KERNELS_MARCH": "x86-64-v3",
}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="AVX2 is x86's")
def test_it_takes_minutes_without_avx512(tmp_path: Path) -> None:
    longest_s = limit_s(LONGEST_S)
    done = raymill(
        "demo", "--storage.uri", str(tmp_path / "store"), "--json", env=AVX2, timeout_s=longest_s
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["precision"] == "fp32"
    assert result["world_sizes"] == [2, 1, 2]
    assert result["train_loss"] < result["first_loss"] - 2
    assert result["wall_s"] < longest_s, result["stage_s"]
    check_proof(result, done.stderr)


def test_the_quick_one_shows_a_kill_that_changed_nothing(tmp_path: Path) -> None:
    """With portable kernels, so that the README knows how it ends on any processor."""
    done = raymill(
        *("demo", "--quick", "--portable", "--storage.uri", str(tmp_path / "store"), "--json"),
        timeout_s=QUICK_S,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(result["wall_s"], result["stage_s"])
    assert result["world_sizes"] == [2, 2]
    assert result["train_loss"] < result["first_loss"] - 1
    assert result["wall_s"] < limit_s(QUICK_S), result["stage_s"]
    check_proof(result, done.stderr)
    if "Shakespeare" in result["corpus"]:
        ending = f"weights SHA-256 {result['parameter_hash'][:16]}…"
        assert ending in (REPOSITORY / "README.md").read_text(encoding="utf-8")
        assert f"{ending} after step {result['step']}, the last" in done.stderr


def check_proof(result: dict[str, Any], said: str) -> None:
    """The steps around the kill were taken again and had the same bits, and the endpoint
    answered."""
    proof = result["proof"]
    first, last = proof["steps"]
    assert (proof["equal"], proof["workers"]) == (True, 1)
    ledger = Ledger.read(open_storage(result["run_dir"]))
    (resumed_at, *_) = (recovery.step for recovery in ledger.recoveries())
    assert first - 1 <= resumed_at < last
    hashes = {event["step"]: event["parameter_hash"] for event in ledger.events("checkpoint")}
    assert proof["parameter_hash"] == hashes[last]
    assert (
        f"weights SHA-256 {hashes[last][:16]}… after step {last}: the same without the kill" in said
    )
    assert all(printable(completion["text"]) in said for completion in result["completions"])
    assert "open http://127.0.0.1:8000 in a browser" in said

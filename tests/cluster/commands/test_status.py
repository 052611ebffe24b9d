"""`raymill status` tells to which step a run is proven, which nodes get no worker, and what it has
cost."""

import json
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.stages.stage_module import OVER_BUDGET
from cluster.storage.uris import open_storage
from jobs.workers.left_out_nodes import leave_out, take_back


def job_that_ended(run: Path, *, exit_code: int) -> None:
    job = run / "jobs/20260101-000000-abcd"
    job.mkdir(parents=True)
    started = {"job": "raymill-1", "stage": "pretrain", "host": "desk", "time": 1767225600.0}
    ended = {"exit_code": exit_code, "stopped": False, "result": None, "time": 1767225700.0}
    (job / "started.json").write_text(json.dumps(started))
    (job / "ended.json").write_text(json.dumps(ended))


def test_status_says_how_far_a_run_is_proven_and_who_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job_that_ended(tmp_path / "runs/checked", exit_code=0)
    ledger = tmp_path / "runs/checked/ledger.jsonl"
    settings = "model: {preset: tiny}\ntrain: {max_tokens: 24800, global_batch_size: 8, micro_batch_size: 4, seq_len: 50}\n"
    (tmp_path / "runs/checked/config.yaml").write_text(settings)
    step = {"tokens_seen": 1, "loss": 2.0, "world_size": 2}
    lines = [{"step": 50, "proven_to": 49, **step}, {"step": 60, **step}]

    def shown() -> set[str]:
        ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert main(["status", "checked", "--storage.uri", str(tmp_path)]) == 0
        return {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}

    assert {"step 60 of 62", "proven to step 49"} <= shown()
    storage = open_storage(str(tmp_path))
    leave_out(storage, {"node": "node-2", "node_id": "ab", "reason": "it was wrong"})
    lines.append({"event": "corruption", "step": 75, "to_step": 40, "generation": 1, "attempt": 1})
    assert {"step 60 of 62", "proven to step 40", "nodes left out node-2"} <= shown()
    lines += [{"step": 61, "proven_to": 40, "not_proven_since": 41, **step}]
    assert {"proven to step 40", "not proven since step 41"} <= shown()
    lines.pop()
    take_back(storage, "node-2")
    del lines[0]["proven_to"]
    reason = "/full: no space left on device"
    lines.append({"event": "storage_down", "what": "checkpoints", "reason": reason})
    assert f"NOT STORED no checkpoint since step 0: {reason}" in shown()
    assert main(["list", "--storage.uri", str(tmp_path)]) == 0
    assert f"checked has no checkpoint since step 0: {reason}" in capsys.readouterr().err
    lines[1:1] = [{"event": "checkpoint", "step": 50}]
    lines += [{"step": 61, **step}] * 5000  # more than is read at first
    assert f"NOT STORED no checkpoint since step 50: {reason}" in shown()
    del lines[-5000:]
    del lines[1]
    lines.append({"event": "checkpoint", "step": 60})
    assert not any(line.startswith("NOT STORED") for line in shown())
    lines[2:] = []
    assert not any(line.startswith(("proven", "nodes")) for line in shown())


def test_status_says_what_a_run_has_cost_and_that_its_budget_is_spent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job_that_ended(tmp_path / "runs/spent", exit_code=OVER_BUDGET)
    step = {"step": 5, "tokens_seen": 1, "loss": 2.0, "world_size": 2}
    lines = [
        step | {"cost": 4.9, "max_cost": 5.0},
        {"event": "spent", "step": 5, "cost": 5.25, "max_cost": 5.0},
    ]
    ledger = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "runs/spent/ledger.jsonl").write_text(ledger)
    assert main(["status", "spent", "--storage.uri", str(tmp_path)]) == 1
    shown = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert {"state stopped", "cost 5.25", "budget 5", "exit_code 4"} <= shown
    assert "note its budget is spent: a higher scaling.max_cost continues it" in shown

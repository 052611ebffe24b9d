"""A run that computes with compiled kernels has one hash for any number of workers, and shares its
kernels."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from cluster.settings.run import RunConfig
from jobs.run.ledger import Ledger
from jobs.training import kernels
from jobs.training.kernels import Prepared, SelfTest, prepared
from raymill.errors import UserError
from raymill.workers.worker_group import WorkerGroup
from tests.foreign_models import small
from tests.jobs.poisoned_runs import run_world
from tests.jobs.runs import tiny_plan
from tests.jobs.train_worlds import CPU


@pytest.mark.slow  # compiles
@pytest.mark.parametrize(
    "model", [{}, {"config": small("qwen3", vocab_size=320).values}], ids=["ours", "transformers"]
)
def test_worlds_and_attempts_compute_with_the_same_kernels(
    model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = []
    for world_size in (1, 2):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / f"cache-{world_size}"))
        plan = tiny_plan(
            str(tmp_path / str(world_size)),
            train={"compute": "compiled", "precision": "bf16", "hash_every_steps": 4},
            scaling={"max_workers": world_size},
            **({"model": model} if model else {}),
        )
        run_world(plan, world_size=world_size)
        ledger = Ledger.read(plan.run)
        hashes.append([step["parameter_hash"] for step in ledger.steps if "parameter_hash" in step])
        (start,) = ledger.events("start")
        (kept,) = plan.run.list("kernels/")
        assert hashlib.sha256(plan.run.read_bytes(kept.key)).hexdigest() == start["kernels"]
    assert hashes[0] and hashes[0] == hashes[1]


def test_a_self_test_that_fails_before_kernels_are_kept__is_what_each_worker_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(config: RunConfig, device: object) -> str:
        raise UserError("no common graph")

    monkeypatch.setattr(kernels, "self_test", failing)
    plan = tiny_plan(str(tmp_path), train={"compute": "compiled"})
    ready = prepared(plan, WorkerGroup(0, 1), SelfTest(plan), {})
    assert ready == Prepared(None, "", "no common graph")
    assert not plan.run.list("kernels/")


def test_a_worker_takes_its_self_test_once__and_anew_where_the_run_went_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[object] = []

    def counted(config: RunConfig, device: object) -> str:
        taken.append(device)
        return f"gradients {len(taken)}"

    monkeypatch.setattr(kernels, "self_test", counted)
    plan = tiny_plan(str(tmp_path))
    test = SelfTest(plan)
    meetings = [prepared(plan, WorkerGroup(0, 1), test, {}).self_test for _ in range(2)]
    test.forget()
    assert [*meetings, test.found().checksum] == ["gradients 1", "gradients 1", "gradients 2"]
    assert taken == [CPU, CPU]

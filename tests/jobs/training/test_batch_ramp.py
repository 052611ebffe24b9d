"""A run whose batch grows and whose learning rate cools down: the same bits in any world and after
any restart."""

from pathlib import Path
from typing import Any

import pytest

from jobs.proof.diff_runs import step_values
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.training.train_loop import train
from model.files.checkpoint_folder import read_metadata
from tests.jobs.poisoned_runs import Faults, run_world
from tests.jobs.runs import newest_checkpoint, tiny_plan

ROW = 32
LANES = [2, 2, 3, 3, 4, 4]  # of 2 sequences each; 4 from 512 tokens on, halfway to which it has 3


def ramped_plan(folder: Path, **settings: Any) -> RunPlan:
    train_settings = {
        "global_batch_size": 8,
        "batch_ramp_start": 4,
        "batch_ramp_tokens": 512,
        "max_tokens": 39 * ROW,  # of which three sequences are left over
        "warmup_tokens": 4 * ROW,
        "schedule": "wsd",
        "cooldown_tokens": 20 * ROW,
        "hash_every_steps": 1,
    }
    return tiny_plan(str(folder), train=train_settings | settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    plan = ramped_plan(tmp_path_factory.mktemp("ramp"))
    train(plan, rank=0, world_size=1)
    return plan


def test_the_ledger_counts_what_each_step_took(trained: RunPlan) -> None:
    ledger = Ledger.read(trained.run)
    ends = [2 * sum(LANES[: number + 1]) for number in range(len(LANES))]
    assert [line["samples"] for line in ledger.steps] == [
        list(pair) for pair in zip([0, *ends], ends, strict=False)
    ]
    assert [line["tokens_seen"] for line in ledger.steps] == [ROW * end for end in ends]
    assert ledger.events("finish")[-1]["step"] == len(LANES)
    assert read_metadata(newest_checkpoint(trained)).tokens_seen == ROW * ends[-1]


def test_the_rate_is_a_function_of_the_tokens(trained: RunPlan) -> None:
    for line in Ledger.read(trained.run).steps:
        tokens = line["tokens_seen"]
        left = (39 * ROW - tokens) / (20 * ROW)
        expected = 1e-2 if left >= 1 else 1e-2 * (0.1 + 0.9 * left)
        assert line["lr"] == pytest.approx(expected, rel=1e-12), tokens


def test_two_workers_and_a_kill_give_the_same_bits(trained: RunPlan, tmp_path: Path) -> None:
    plan = ramped_plan(tmp_path)
    # The checkpoint before is of step 3, amid the ramp
    run_world(plan, Faults(dies_at=5), world_size=2)
    run_world(plan, world_size=2)
    ledger = Ledger.read(plan.run)
    assert len(ledger.events("start")) == 2
    assert step_values(ledger) == step_values(Ledger.read(trained.run))


def test_a_rollback_names_the_samples_that_it_leaves_out(tmp_path: Path) -> None:
    plan = ramped_plan(tmp_path, max_skipped_steps=0)
    run_world(plan, Faults(poisoned=frozenset({(5, 0)})))
    rollback = Ledger.read(plan.run).events("rollback")[-1]
    assert (rollback["first"], rollback["last"]) == (4, 5)
    assert rollback["samples"] == [2 * sum(LANES[:3]), 2 * sum(LANES[:5])]

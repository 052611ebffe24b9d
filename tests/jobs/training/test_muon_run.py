"""A run with Muon has the same bits when workers are killed and its state is sharded, can be
replayed, and is not resumed with another optimizer."""

from pathlib import Path
from typing import Any

import pytest

from jobs.proof.replay_run import replay
from jobs.run.history import why_not_resumed
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.training.train_loop import train
from raymill.state.shard import Shard
from tests.jobs.runs import tiny_plan
from tests.jobs.runs_in_rounds import CutOff, run_in_rounds

SETTINGS: dict[str, Any] = {
    "train": {"optimizer": "muon", "sample_prompts": [], "layer_statistics_every_steps": 4},
    "checkpoint": {"save_every_steps": 4},
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    plan = tiny_plan(str(tmp_path_factory.mktemp("undisturbed")), **SETTINGS)
    train(plan, rank=0, world_size=1)
    return plan


def last_hash(plan: RunPlan) -> str:
    ledger = Ledger.read(plan.run)
    assert ledger.events("finish")
    return str(ledger.events("checkpoint")[-1]["parameter_hash"])


def layers(plan: RunPlan) -> list[Any]:
    """Returns what is said of the layers by step."""
    events = Ledger.read(plan.run).events("layers")
    return [(event["step"], event["gradient_norm"], event["update_ratio"]) for event in events]


@pytest.mark.parametrize("shard", ["optimizer", "gradients"])
def test_a_run_whose_worker_is_killed__ends_with_the_same_bits(
    tmp_path: Path, undisturbed: RunPlan, shard: Shard
) -> None:
    plan = tiny_plan(str(tmp_path / "disturbed"), scaling={"shard": shard}, **SETTINGS)
    run_in_rounds(plan, tmp_path, [CutOff(1, 6, "killed", saved=4)])
    starts = [line["step"] for line in Ledger.read(plan.run).events("start")]
    assert starts == [0, 4], "it went on from the checkpoint of step 4"
    assert last_hash(plan) == last_hash(undisturbed)
    assert layers(plan) == layers(undisturbed)


def test_steps_are_replayed_with_the_same_bits(undisturbed: RunPlan) -> None:
    result = replay(undisturbed.run, steps=range(3, 9))
    assert (result.equal, result.verdict) == (True, "bits equal for steps 3..8")


def test_a_layers_update__is_about_as_large_as_adamws(undisturbed: RunPlan, tmp_path: Path) -> None:
    """A rate serves both: the root mean square of an update is 0.2 of it, or somewhat less."""
    adamw = tiny_plan(
        str(tmp_path), **SETTINGS | {"train": SETTINGS["train"] | {"optimizer": "adamw"}}
    )
    train(adamw, rank=0, world_size=1)
    for (step, _, muons), (_, _, adamws) in zip(layers(undisturbed), layers(adamw), strict=True):
        for muon_ratio, adamw_ratio in zip(muons, adamws, strict=True):
            if muon_ratio and adamw_ratio:
                assert 0.1 < muon_ratio / adamw_ratio < 10, step
    assert last_hash(adamw) != last_hash(undisturbed)


@pytest.mark.parametrize(("before", "now"), [("muon", "adamw"), ("adamw", "muon")])
def test_a_run_is_not_resumed_with_another_optimizer(tmp_path: Path, before: str, now: str) -> None:
    plan = tiny_plan(str(tmp_path), train={"optimizer": before})
    changed = plan.config.train.model_copy(update={"optimizer": now})
    config = plan.config.model_copy(update={"train": changed})
    reason = why_not_resumed(plan.run, config)
    assert f"train.optimizer was {before}, now {now}" in reason
    assert reason.endswith("Choose another --run-id")

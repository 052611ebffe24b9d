"""A run ends at its budget, on all workers after the same step, and a higher one continues it with the
same bits."""

from pathlib import Path
from typing import Any

import pytest

from cluster.settings.flags import validate_config
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig, ScalingConfig
from jobs.run.costs.budget import Budget, spent_in_words, why_over_budget
from jobs.run.costs.cost_rows import cost_rows
from jobs.run.costs.run_cost import run_cost
from jobs.run.end import End
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.training.train_loop import train
from tests.jobs.runs import final_hash, tiny_plan
from tests.jobs.runs_in_rounds import run_in_rounds

A_SECOND = {"price_per_device_hour": 3600.0}  # costs one, for each of a worker's devices


class Clock:
    def __init__(self, now_s: float) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(
    ("max_cost", "last_step"),
    # Two workers' steps of 3 s cost 6 each, from 100 s on; 6 were spent before
    [(100.0, 16), (18.1, 3), (18.0, 2), (12.0, 1), (1.0, 1)],
)
def test_the_last_step_is_the_one_that_reaches_the_budget(max_cost: float, last_step: int) -> None:
    before = [
        {"event": "start", "time": 90.0, "world_size": 2},
        {"time": 93.0, "step": 1, "wall_s": 3.0},
        {"event": "start", "time": 100.0, "world_size": 2},
    ]
    clock = Clock(100.0)
    budget = Budget(ScalingConfig(max_cost=max_cost, **A_SECOND), clock=clock)
    budget.begin(Ledger(before))
    step = 1
    while not budget.ends_with_this_step():
        clock.now_s += 3.0
        step += 1
    assert step == last_step
    clock.now_s += 3.0
    assert max_cost <= budget.fields()["cost"] < max_cost + 2 * 6


def test_a_run_without_a_budget_or_a_price_does_not_end() -> None:
    for scaling in (ScalingConfig(), ScalingConfig(**A_SECOND)):
        budget = Budget(scaling, clock=Clock(1e9))
        budget.begin(Ledger([{"event": "start", "time": 0.0, "world_size": 2}]))
        assert not budget.ends_with_this_step()
        assert bool(budget.fields()) == (scaling.price_per_device_hour is not None)


def test_a_budget_needs_a_price() -> None:
    with pytest.raises(ConfigError, match=r"max_cost needs scaling\.price_per_device_hour"):
        validate_config({"scaling": {"max_cost": 5}}, RunConfig)


def with_budget(plan: RunPlan, max_cost: float) -> RunPlan:
    scaling: Any = plan.config.scaling.model_copy(update={"max_cost": max_cost})
    config = plan.config.model_copy(update={"scaling": scaling})
    return RunPlan(config, plan.tokens_uri, plan.tokenizer_json, plan.code_version)


def test_workers_end_together__and_a_higher_budget_gives_the_same_weights(
    tmp_path: Path,
) -> None:
    """Two workers in processes of their own: if they did not agree on the last step, one would
    wait for the other."""
    undisturbed = tiny_plan(str(tmp_path / "undisturbed"))
    train(undisturbed, rank=0, world_size=1)

    scaling = {"max_workers": 2, "max_cost": 1e-9, **A_SECOND}
    plan = tiny_plan(str(tmp_path / "run"), scaling=scaling)
    assert why_over_budget(plan.run, plan.config) == "", "it has not begun"
    run_in_rounds(plan, tmp_path, [])
    ledger = Ledger.read(plan.run)
    last = ledger.steps[-1][
        "step"
    ]  # the second one where the first began in the start's millisecond
    assert ledger.end is End.SPENT and last in (1, 2)
    [spent] = ledger.events("spent")
    assert (spent["step"], spent["max_cost"]) == (last, 1e-9)
    assert 0 < ledger.steps[-1]["cost"] <= spent["cost"] and not ledger.events("preempted")
    assert [line["step"] for line in ledger.events("checkpoint")] == [last]
    reason = why_over_budget(plan.run, plan.config)
    assert reason.startswith("run tiny has cost ") and "scaling.max_cost=1e-09 allows no" in reason
    assert f"saved at step {last} of 8" in spent_in_words(plan.config, ledger, steps=8)
    rows = dict(cost_rows(ledger, plan.config, price=None))
    assert rows["Cost"].endswith("at the run's own prices (scaling.price_per_device_hour)")
    assert rows["Budget"] == "$1e-09 (scaling.max_cost), which is spent"

    # One worker, one step further, as more than this is spent by its end
    little = with_budget(plan, run_cost(ledger.lines).money(plan.config.scaling) + 1e-9)
    assert why_over_budget(little.run, little.config) == ""
    assert train(little, rank=0, world_size=1) is End.SPENT
    assert Ledger.read(plan.run).steps[-1]["step"] == last + 1

    enough = with_budget(plan, 1e9)
    assert train(enough, rank=0, world_size=1) is End.FINISHED
    assert final_hash(plan) == final_hash(undisturbed)
    assert [stop.label for stop in Ledger.read(plan.run).interruptions()] == ["resume", "resume"]
    assert why_over_budget(plan.run, plan.config) == "", "it is finished"

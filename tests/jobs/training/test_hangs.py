"""All workers hang while their processes live: the culprit is named and ended, the others live on,
and no bit differs."""

from pathlib import Path
from typing import Any

import pytest

from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.training.train_loop import train
from jobs.workers.watchdog import Health
from tests.jobs.hanging_runs import Fault, run_with
from tests.jobs.runs import tiny_plan
from tests.time_limits import limit_s

pytestmark = pytest.mark.more

HANG_TIMEOUT_S = limit_s(1)  # a busy machine may hold a healthy worker up for seconds


def plan_in(folder: Path, **scaling: Any) -> RunPlan:
    return tiny_plan(
        str(folder),
        train={"micro_batch_size": 1, "eval_every_steps": 8},
        checkpoint={"save_every_steps": 2, "num_to_keep": 9},
        scaling={"hang_timeout_s": HANG_TIMEOUT_S, **scaling},
    )


def outcome(plan: RunPlan) -> tuple[list[float], str]:
    ledger = Ledger.read(plan.run)
    return [line["loss"] for line in ledger.steps], ledger.events("checkpoint")[-1][
        "parameter_hash"
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], str]:
    plan = plan_in(tmp_path_factory.mktemp("undisturbed"))
    train(plan, rank=0, world_size=1)
    return outcome(plan)


def processes(log: list[str]) -> list[str]:
    return [line for line in log if line.startswith("met ")]


@pytest.mark.parametrize("shard", ["none", pytest.param("parameters", marks=pytest.mark.slow)])
def test_one_whose_own_work_never_ends_is_ended_alone(
    tmp_path: Path, shard: str, undisturbed: tuple[list[float], str]
) -> None:
    """It stands before a message in the thread that exchanges, as a GPU does in a kernel that never
    ends."""
    plan = plan_in(tmp_path, shard=shard)
    fault = Fault((1,), failpoint="before_message:60:sleep")
    logs, replaced = run_with(fault, plan, tmp_path, world_size=2)
    assert replaced == [1]
    assert len(processes(logs[0])) == 2
    assert len(set(processes(logs[0]))) == 1
    assert "rescued" in logs[0]
    (hang,) = Ledger.read(plan.run).events("hang")
    assert (hang["rank"], hang["health"]) == (1, Health.STUCK)
    assert "its own work" in hang["reason"]
    assert hang["seconds"] < 4 * HANG_TIMEOUT_S
    assert outcome(plan) == undisturbed


@pytest.mark.more
def test_the_ends_of_a_stopped_link_are_named_and_all_meet_again(
    tmp_path: Path, undisturbed: tuple[list[float], str]
) -> None:
    plan = plan_in(tmp_path)
    logs, replaced = run_with(Fault((0, 1), link_after_step=5), plan, tmp_path, world_size=3)
    assert replaced == []
    for log in logs:
        assert len(processes(log)) == 2
        assert len(set(processes(log))) == 1
        assert "rescued" in log
    (hang,) = Ledger.read(plan.run).events("hang")
    assert (hang["rank"], hang["ranks"], hang["health"]) == (0, [0, 1], Health.BLOCKED)
    assert hang["reason"].startswith("ranks 0, 1 stood still")
    assert outcome(plan) == undisturbed


@pytest.mark.more
def test_one_that_never_sends_its_message_cannot_leave_and_is_replaced(
    tmp_path: Path, undisturbed: tuple[list[float], str]
) -> None:
    """Within a message, so that nothing tells it from the others: only that it cannot leave the
    round."""
    plan = plan_in(tmp_path)
    logs, replaced = run_with(
        Fault((1,), failpoint="in_message:60:sleep"), plan, tmp_path, world_size=3
    )
    assert replaced == [1]
    assert [len(set(processes(log))) for log in logs] == [1, 2, 1]
    assert outcome(plan) == undisturbed

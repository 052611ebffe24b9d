"""A rehearsal's ledger to the wall time of the whole run, on a machine whose every second is known."""

from typing import Any

import pytest

from cluster.commands.chaos import Fault, Kind
from cluster.commands.rehearsal import in_small
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig, max_steps
from jobs.plan.plan_warnings import other_work
from jobs.plan.prediction import predict
from jobs.run.ledger import Ledger

START_S, JOB_S = 8.0, 3.0  # of the training stage until its first step is due; of any job
STEP_S = {1: 0.15, 2: 0.1}
RECOVERY_S, JOIN_STEPS = 5.0, 40


def config(num_steps: int, **train: Any) -> RunConfig:
    values = {"global_batch_size": 8, "micro_batch_size": 4, "max_tokens": num_steps * 8 * 64, "eval_every_steps": 100}
    return RunConfig.model_validate(
        {"run_id": "planned", "model": {"preset": "tiny"}, "train": values | train, "data": {"source": "texts"}}
    )


def simulated(run: RunConfig, *, kill: int | None = None, add: int | None = None) -> tuple[Ledger, float]:
    """The ledger of a run on this machine, and the seconds that its stage takes."""
    clock, lines, attempt, size, step = 1000.0 + START_S, [], 0, 2, 0

    def start(world_size: int) -> None:
        nonlocal attempt, size
        attempt, size = attempt + 1, world_size
        lines.append({"event": "start", "time": clock, "attempt": attempt, "world_size": size, "step": step})

    start(2)
    while step < max_steps(run):
        step += 1
        validation_s = 0.7 if step % run.train.eval_every_steps == 0 or step == max_steps(run) else 0.0
        checkpoint_s = 0.02 if step % run.checkpoint.save_every_steps == 0 else 0.0
        wall_s = STEP_S[size] + validation_s + checkpoint_s
        begins = attempt > 1 and lines[-1].get("event") == "start"
        clock += wall_s + (RECOVERY_S - wall_s if begins else 0.0)
        seconds = {"forward": STEP_S[size], "validation": validation_s, "checkpoint": checkpoint_s}
        seconds = {name: value for name, value in seconds.items() if value}
        fields = {"attempt": attempt, "world_size": size, "wall_s": wall_s, "seconds": seconds}
        lines.append({"time": clock, "step": step, **fields})
        if step == kill:
            start(1)
        if add is not None and step == add + JOIN_STEPS:
            start(2)
    lines.append({"event": "finish", "time": clock + 1.5, "step": step})
    return Ledger(lines), clock + 2.0 - 1000.0


def rehearsal(stage_s: float, **found: Any) -> dict[str, Any]:
    stages = {"cluster": 5.0, "tokenize": JOB_S + 2.0, "train": stage_s, "evaluate": JOB_S + 4.0, "report": 2.0}
    text = {"source_bytes": 1000, "rehearsed_bytes": 1000, "evaluation": {"tokens": 400, "tokens_per_s": 100.0}}
    return {"stage_s": stages, "faults": [], "rehearsed_faults": [], "took_s": 60.0, "busy_before": 0.0} | text | found


def test_more_steps_validations_and_checkpoints() -> None:
    rehearsed, planned = config(200), config(1562)
    ledger, stage_s = simulated(rehearsed)
    found = predict(rehearsal(stage_s), ledger, rehearsed=rehearsed, planned=planned)
    _, real_s = simulated(planned)
    assert found["stage_s"]["train"] == pytest.approx(real_s, rel=0.01)
    assert found["step_s"] == {"2": 0.1}
    assert found["validation_s"] == pytest.approx(0.7)
    assert found["wall_s"] == pytest.approx(sum(found["stage_s"].values()), abs=0.3)
    assert found["tokens_per_s"] == pytest.approx(8 * 64 / 0.1)


def test_a_kill_and_a_join() -> None:
    rehearsed, planned = config(240), config(1562)
    ledger, stage_s = simulated(rehearsed, kill=60, add=66)
    faults = {
        "faults": [{"kind": "kill-node", "step": 624}, {"kind": "add-node", "step": 781}],
        "rehearsed_faults": [{"kind": "kill-node", "step": 60}, {"kind": "add-node", "step": 66}],
    }
    found = predict(rehearsal(stage_s, **faults), ledger, rehearsed=rehearsed, planned=planned)
    _, real_s = simulated(planned, kill=624, add=781)
    assert found["stage_s"]["train"] == pytest.approx(real_s, rel=0.01)
    assert found["step_s"] == {"1": 0.15, "2": 0.1}
    assert found["recovery_s"] == [RECOVERY_S, RECOVERY_S]


def test_more_lanes_and_more_text() -> None:
    rehearsed, planned = config(100), config(100, global_batch_size=32, max_tokens=100 * 32 * 64)
    ledger, stage_s = simulated(rehearsed)
    found = predict(rehearsal(stage_s, source_bytes=10_000), ledger, rehearsed=rehearsed, planned=planned)
    assert found["step_s"] == {"2": 0.4}, "forward takes all of a step here, and each rank has 4 lanes, not 1"
    assert found["stage_s"]["tokenize"] == pytest.approx(JOB_S + 10 * 2.0)


def test_a_rehearsal_is_the_run_in_small() -> None:
    planned = config(10_000)
    small, _ = in_small(planned)
    assert max_steps(small) <= 240
    assert small.train.global_batch_size == 8
    assert (small.model, small.data, small.scaling) == (planned.model, planned.data, planned.scaling)
    faults = [Fault(Kind.KILL_NODE, 4000), Fault(Kind.ADD_NODE, 5000)]
    small, moved = in_small(planned, faults=faults)
    assert [fault.kind for fault in moved] == [Kind.KILL_NODE, Kind.ADD_NODE]
    assert all(fault.step < max_steps(small) / 2 for fault in moved)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_a_run_of_first_steps_only_is_not_rehearsed(num_steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"a run of {num_steps} steps is too short .* leaves out the first 3 "):
        in_small(config(num_steps))


def test_the_shortest_run_that_is_rehearsed_is_predicted() -> None:
    planned = config(4)
    rehearsed, _ = in_small(planned)
    ledger, stage_s = simulated(rehearsed)
    found = predict(rehearsal(stage_s), ledger, rehearsed=rehearsed, planned=planned)
    assert found["step_s"] == {"2": 0.1}


def test_large_models_are_rehearsed_with_fewer_lanes_or_not_at_all() -> None:
    values = {"run_id": "large", "data": {"source": "texts"}, "model": {"preset": "gpt2-124m", "n_positions": 128}}
    train = {"global_batch_size": 64, "micro_batch_size": 1, "max_tokens": 10**9}
    small, _ = in_small(RunConfig.model_validate(values | {"train": train}))
    assert small.train.global_batch_size < 64
    assert max_steps(small) == 8
    with pytest.raises(ConfigError, match=r"a lane of 64 x 128 tokens may take .* too long for a rehearsal"):
        in_small(
            RunConfig.model_validate(values | {"train": train | {"micro_batch_size": 64, "global_batch_size": 128}})
        )


def test_other_work_is_told_of() -> None:
    assert not list(other_work({"busy_before": 0.05}))
    (said,) = other_work({"busy_before": 0.63})
    assert said.startswith("Other programs kept 63% of this machine's CPUs busy")

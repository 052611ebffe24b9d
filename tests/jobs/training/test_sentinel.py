"""A worker that corrupts silently is found and named, and the run ends with the clean run's
weights."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from jobs.run.checkpoints import RunCheckpoints
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from raymill.state.shard import Shard
from tests.fault_seeds import fault_seeds
from tests.jobs.faulty_runs import FAULTY, Fault, run_with_fault
from tests.jobs.runs import tiny_plan

NUM_STEPS = 12
LANES = 4


def plan_of(folder: Path, *, lanes: int = LANES, num_steps: int = NUM_STEPS, **how: Any) -> RunPlan:
    shard, group = how.pop("shard", "none"), how.pop("group", None)
    checkpoint = how.pop("checkpoint", {"save_every_steps": 3})
    train = {
        "global_batch_size": 2 * lanes,
        "max_tokens": num_steps * 2 * lanes * 32,
        "sample_prompts": [],
        "eval_every_steps": 1000,
        "audit_every_steps": 1,
    }
    scaling = {"max_workers": min(4, lanes), "shard": shard, "shard_group": group}
    return tiny_plan(
        str(folder / "storage"), train=train | how, scaling=scaling, checkpoint=checkpoint
    )


def final_hash(ledger: Ledger) -> str:
    assert ledger.events("finish"), ledger.events("gave_up")
    return str(ledger.events("checkpoint")[-1]["parameter_hash"])


def clean_hash(folder: Path, **how: Any) -> str:
    plan = plan_of(folder / "clean", **how)
    return final_hash(run_with_fault(plan, folder / "clean", None, world_size=1))


def faulty(folder: Path, fault: Fault, world_size: int, **how: Any) -> tuple[RunPlan, Ledger]:
    plan = plan_of(folder, **how)
    return plan, run_with_fault(plan, folder, fault, world_size=world_size)


def named(ledger: Ledger) -> set[str]:
    return {event["node"] for event in ledger.events("corruption", "named")}


def test_wrong_gradients_leave_a_node_out_and_the_rest_ends_with_the_clean_runs_weights(
    tmp_path: Path,
) -> None:
    fault = Fault(rank=1, failpoint="gradient:0.3:flip")
    plan, ledger = faulty(tmp_path, fault, 2, shard="parameters", num_steps=30)
    found = ledger.events("corruption")
    assert found[-1]["measure"] == "left_out"
    assert named(ledger) == {FAULTY}
    assert [start["world_size"] for start in ledger.events("start")] == [2, 1]
    void = [event for event in ledger.events("checkpoint") if event["step"] > found[-1]["to_step"]]
    assert void or found[-1]["step"] <= 3
    assert final_hash(ledger) == clean_hash(tmp_path, num_steps=30)
    hashes = {event["parameter_hash"] for event in ledger.events("checkpoint")[-1:]}
    assert hashes == {final_hash(ledger)}
    assert RunCheckpoints(plan.run).names, "what is proven can be read"


def test_a_wrong_copy_of_the_weights_sends_the_run_back_and_is_named_by_the_steps_taken_again(
    tmp_path: Path,
) -> None:
    fault = Fault(rank=0, failpoint="weights:5:flip_nth")
    _, ledger = faulty(tmp_path, fault, 2)
    [undecided] = ledger.events("undecided")
    assert undecided["what"] == "weights"
    assert undecided["to_step"] <= 5
    assert named(ledger) == {FAULTY}
    assert final_hash(ledger) == clean_hash(tmp_path)


@pytest.mark.parametrize(
    ("wrong_step", "is_named"), [(9, True), pytest.param(8, False, marks=pytest.mark.slow)]
)
def test_a_run_that_keeps_one_checkpoint_has_a_proven_one_to_go_back_to(
    tmp_path: Path, wrong_step: int, *, is_named: bool
) -> None:
    """A copy that has been wrong for a step has made the other one wrong too: by a value that shows
    in its gradients, as a flipped bit may not."""
    saving = {"save_every_steps": 1, "num_to_keep": 1, "keep_best": 0}
    plan = plan_of(tmp_path, audit_every_steps=5, num_steps=15, checkpoint=saving)
    fault = Fault(rank=0, failpoint=f"weights:{wrong_step}:one_nth")
    ledger = run_with_fault(plan, tmp_path, fault, world_size=2, waits_for_checkpoints=True)
    [undecided] = ledger.events("undecided")
    assert (undecided["step"], undecided["to_step"]) == (10, 4)
    assert named(ledger) == ({FAULTY} if is_named else set())
    before = ledger.lines[: ledger.lines.index(undecided)]
    saved = [line for line in before if line.get("event") == "checkpoint" and line["step"] > 5]
    assert {line["proven_to"] for line in saved} == {4}
    assert ledger.events("checkpoint")[-1]["proven_to"] == 14
    assert [line["step"] for line in ledger.steps if "audit_seconds" in line] == [5, 10, 15]
    assert final_hash(ledger) == clean_hash(tmp_path, num_steps=15)


@pytest.mark.parametrize(
    "failpoint", ["lane_sum:1:flip", pytest.param("exchanged_sum:1:flip", marks=pytest.mark.slow)]
)
def test_a_worker_that_adds_up_wrong_is_named_and_left_out(tmp_path: Path, failpoint: str) -> None:
    """The excerpt is the whole gradient of so small a model."""
    _, ledger = faulty(tmp_path, Fault(rank=1, failpoint=failpoint), 2)
    found = ledger.events("corruption")
    assert {(event["node"], event["what"]) for event in found} == {(FAULTY, "sum")}
    assert [event["measure"] for event in found] == ["taken_again", "left_out"]
    assert final_hash(ledger) == clean_hash(tmp_path)


def test_of_two_that_repeat_their_answers_the_one_that_fails_its_self_test_is_left_out(
    tmp_path: Path,
) -> None:
    _, ledger = faulty(tmp_path, Fault(rank=0, failpoint="gradient:1:stick"), 2)
    [found] = ledger.events("corruption")
    assert (found["node"], found["what"], found["measure"]) == (FAULTY, "gradient", "left_out")
    assert found["repeats"]
    assert [start["world_size"] for start in ledger.events("start")] == [2, 1]
    assert final_hash(ledger) == clean_hash(tmp_path)


def test_two_that_repeat_their_answers_and_pass_their_self_tests_stop_the_run(
    tmp_path: Path,
) -> None:
    """A self-test has nothing to exchange, so it does not meet this fault."""
    plan = plan_of(tmp_path)
    fault = Fault(rank=0, failpoint="added_again:1:stick")
    with pytest.raises(AssertionError, match="also not by their self-tests"):
        run_with_fault(plan, tmp_path, fault, world_size=2)
    assert not Ledger.read(plan.run).events("corruption")
    assert not Ledger.read(plan.run).steps


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["weights", pytest.param("vectors", marks=pytest.mark.slow)])
def test_two_copies_that_differ_again_in_the_same_bits_stop_the_run(
    tmp_path: Path, what: str, rank: int
) -> None:
    """A stuck bit, which no self-test meets. Nobody can tell whose copy is right."""
    plan = plan_of(tmp_path, audit_every_steps=3)
    fault = Fault(rank=rank, failpoint=f"{what}:1:stick")
    with pytest.raises(AssertionError, match="also not by their self-tests") as stopped:
        run_with_fault(plan, tmp_path, fault, world_size=2, num_starts=2)
    said = str(stopped.value)
    assert f"on {FAULTY}" in said
    assert f"on node-{1 - rank}" in said
    assert "Give the run a third worker" in said
    ledger = Ledger.read(plan.run)
    assert not ledger.events("corruption", "named")
    attempts = [event["attempt"] for event in ledger.events("undecided") if event["what"] == what]
    assert attempts == [1, 2, 3], "the second start stops at once"
    steps = [line["step"] for line in ledger.lines if "event" not in line]
    assert max(steps) < 6
    assert len(steps) <= 9


def test_of_two_copies_the_one_that_is_never_the_same_is_left_out(tmp_path: Path) -> None:
    _, ledger = faulty(tmp_path, Fault(rank=0, failpoint="weights:1:flip"), 2)
    [undecided] = ledger.events("undecided")
    [found] = ledger.events("corruption")
    assert found["step"] == undecided["step"] == 2
    assert (found["node"], found["what"], found["measure"]) == (FAULTY, "weights", "left_out")
    assert found["votes"] == [2, 1]
    assert final_hash(ledger) == clean_hash(tmp_path)


@pytest.mark.parametrize(
    "failpoint", ["weights:7:flip_nth", pytest.param("vectors:7:flip_nth", marks=pytest.mark.slow)]
)
def test_a_wrong_update_of_what_one_worker_owns_sends_the_run_back(
    tmp_path: Path, failpoint: str
) -> None:
    """Nobody else has a copy of it, and the other one is right: two can tell whose it was."""
    _, ledger = faulty(tmp_path, Fault(rank=1, failpoint=failpoint), 2, shard="parameters")
    [found] = ledger.events("corruption")
    assert (found["node"], found["what"], found["measure"]) == (FAULTY, "update", "gone_back")
    assert found["to_step"] < found["step"]
    assert final_hash(ledger) == clean_hash(tmp_path)


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize("seed", fault_seeds(1))
@pytest.mark.parametrize("shard", ["optimizer", "gradients", "parameters"])
def test_a_worker_that_updates_matrices_wrong_is_left_out(
    tmp_path: Path, shard: Shard, seed: int
) -> None:
    """An audit sees one matrix. What the worker has done to others by then, the steps refute that
    are taken again without it."""
    fault = Fault(rank=seed % 3, failpoint="matrix_update:1:flip")
    how: dict[str, Any] = {"shard": shard, "optimizer": "muon", "num_steps": 30, "seed": seed}
    _, ledger = faulty(tmp_path, fault, 3, **how)
    found = ledger.events("corruption")
    assert {(event["node"], event["what"]) for event in found} == {(FAULTY, "update")}
    assert found[-1]["measure"] == "left_out"
    assert final_hash(ledger) == clean_hash(tmp_path, **how)


def test_a_worker_that_fails_its_self_test_trains_nothing(tmp_path: Path) -> None:
    fault = Fault(rank=2, failpoint="gradient:1:flip", from_the_start=True)
    _, ledger = faulty(tmp_path, fault, 3)
    [found] = ledger.events("corruption")
    assert (found["node"], found["what"], found["step"]) == (FAULTY, "self_test", 0)
    assert [start["world_size"] for start in ledger.events("start")] == [2]
    assert final_hash(ledger) == clean_hash(tmp_path)


GRADIENTS = ("gradient:1:flip", "gradient:0.1:flip", "gradient:0.01:flip")
COPIES = ("weights:7:flip_nth", "vectors:7:flip_nth")
CELLS = [
    *itertools.product((2, 3, 4), ("none", "parameters"), (None,), GRADIENTS),
    # A part of the state that one rank alone holds is updated again by all
    *itertools.product((2, 3), ("optimizer", "parameters"), (None,), COPIES),
    *itertools.product((2, 3, 4), ("none",), (None,), COPIES),
    *itertools.product((4,), ("gradients", "parameters"), (2,), COPIES),
]


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize("seed", fault_seeds(1))
@pytest.mark.parametrize(("world_size", "shard", "group", "failpoint"), CELLS)
def test_whatever_is_wrong_the_run_ends_with_the_clean_runs_weights(
    tmp_path: Path, world_size: int, shard: str, group: int | None, failpoint: str, seed: int
) -> None:
    """Every lane is computed twice here, so that no wrong one can pass."""
    expected = clean_hash(tmp_path, lanes=world_size, seed=seed)
    fault = Fault(rank=seed % world_size, failpoint=failpoint)
    how = {"lanes": world_size, "shard": shard, "group": group, "seed": seed}
    _, ledger = faulty(tmp_path / "faulty", fault, world_size, **how)
    assert final_hash(ledger) == expected
    assert named(ledger) <= {FAULTY}


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize("failpoint", ["lane_sum:0.1:flip", "exchanged_sum:0.3:flip"])
@pytest.mark.parametrize("shard", ["none", "optimizer", "parameters"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_whoever_adds_up_wrong_the_run_ends_with_the_clean_runs_weights(
    tmp_path: Path, world_size: int, shard: Shard, failpoint: str
) -> None:
    """The excerpt is the whole gradient of so small a model, so that no wrong sum can pass."""
    lanes = 2 * world_size + 1
    # With one group that shares all there is nothing to exchange between groups
    group = 2 if shard == "parameters" and world_size == 4 else None
    fault = Fault(rank=world_size - 1, failpoint=failpoint)
    _, ledger = faulty(tmp_path, fault, world_size, shard=shard, group=group, lanes=lanes)
    assert final_hash(ledger) == clean_hash(tmp_path, lanes=lanes)
    assert {event["what"] for event in ledger.events("corruption")} <= {"sum"}
    assert named(ledger) <= {FAULTY}


CASES: list[dict[str, Any]] = [
    {"shard": "optimizer", "precision": "bf16", "micro_batches_per_lane": 2},
    {"shard": "optimizer", "optimizer": "muon"},
    {"shard": "parameters", "precision": "bf16", "micro_batches_per_lane": 2},
    {"shard": "parameters", "optimizer": "muon"},
    {"precision": "bf16", "micro_batches_per_lane": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize("how", CASES)
def test_sums_that_are_added_up_again_have_the_same_bits(
    tmp_path: Path, how: dict[str, Any]
) -> None:
    size = 10 * how.get("micro_batches_per_lane", 1)
    plan = plan_of(tmp_path, global_batch_size=size, max_tokens=8 * size * 32, **how)
    ledger = run_with_fault(plan, tmp_path, None, world_size=3)
    assert len([line for line in ledger.steps if "audit_seconds" in line]) == 8
    assert not ledger.events("corruption", "undecided")


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "optimizer", "parameters"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_clean_steps_give_no_alarm(tmp_path: Path, world_size: int, shard: Shard) -> None:
    plan = plan_of(tmp_path, num_steps=200, shard=shard)
    ledger = run_with_fault(plan, tmp_path, None, world_size=world_size)
    assert len(ledger.steps) == 200
    assert not ledger.events("corruption", "undecided", "named", "refuted")

"""What the guard would skip or roll back is first computed by another worker: a device that answers
what is no number decides nothing."""

import json
import math
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.run.ledger import LEDGER, Ledger
from jobs.run.run_plan import RunPlan
from jobs.run.writer_generation import Fence
from jobs.sentinel.way_back import MOST_WAYS_BACK
from jobs.training.attempt import Attempt
from jobs.training.open_attempt import open_attempt
from jobs.training.train_loop import train
from raymill.state.shard import Shard
from raymill.workers.worker_group import WorkerGroup
from tests.fault_seeds import fault_seeds
from tests.jobs.faulty_runs import FAULTY, Fault, run_with_fault, work_but_wait
from tests.jobs.poisoned_runs import Faults, run_world
from tests.jobs.runs import tiny_plan
from tests.jobs.worker_processes import exit_code, worker_process
from tests.waiting import wait_until

pytestmark = pytest.mark.more

LANES = 4
NUM_STEPS = 12


def plan_of(folder: Path, *, num_steps: int = NUM_STEPS, **how: Any) -> RunPlan:
    train = {
        "global_batch_size": 2 * LANES,
        "max_tokens": num_steps * 2 * LANES * 32,
        "sample_prompts": [],
        "eval_every_steps": 1000,
        "audit_every_steps": 10,
    }
    scaling = {"max_workers": LANES, "shard": how.pop("shard", "none")}
    checkpoint = {"save_every_steps": 3}
    uri = str(folder / "storage")
    return tiny_plan(uri, train=train | how, scaling=scaling, checkpoint=checkpoint)


def final_hash(ledger: Ledger) -> str:
    assert ledger.events("finish"), ledger.events("gave_up")
    return str(ledger.events("checkpoint")[-1]["parameter_hash"])


def clean_hash(folder: Path, **how: Any) -> str:
    plan = plan_of(folder / "clean", **how)
    run_world(plan)
    return final_hash(Ledger.read(plan.run))


def faulty(folder: Path, fault: Fault, world_size: int, **how: Any) -> Ledger:
    return run_with_fault(plan_of(folder, **how), folder, fault, world_size=world_size)


def named(ledger: Ledger) -> set[str]:
    return {event["node"] for event in ledger.events("corruption", "named")}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("world_size", "audit_every_steps", "failpoint"),
    [
        (2, 10, "gradient:1:nan"),
        pytest.param(2, 30, "gradient:1:nan", marks=SLOW),
        (3, 10, "gradient:1:nan"),
        pytest.param(3, 10, "gradient:1:huge", marks=SLOW),
    ],
)
def test_a_device_that_answers_what_is_no_number_is_left_out_in_that_step(
    tmp_path: Path, world_size: int, audit_every_steps: int, failpoint: str
) -> None:
    """No audit has drawn the step, and the guard skips nothing."""
    fault = Fault(rank=1, failpoint=failpoint, from_step=6)
    ledger = faulty(tmp_path, fault, world_size, audit_every_steps=audit_every_steps)
    found = ledger.events("corruption")
    assert {(event["step"], event["node"], event["what"]) for event in found} == {
        (6, FAULTY, "gradient")
    }
    assert found[-1]["measure"] == "left_out"
    assert not ledger.events("skip", "rollback")
    assert final_hash(ledger) == clean_hash(tmp_path)


@pytest.mark.parametrize(
    ("world_size", "lanes_before"), [(1, 16), (2, 8), pytest.param(3, 8, marks=SLOW)]
)
def test_what_is_no_number_once_is_passed_over_by_computing_it_again(
    tmp_path: Path, world_size: int, lanes_before: int
) -> None:
    """Whose gradient it was, nobody knows once it is summed up: nobody is named."""
    fault = Fault(rank=world_size - 1, failpoint=f"gradient:{lanes_before + 1}:nan_nth")
    ledger = faulty(tmp_path, fault, world_size)
    [asked] = ledger.events("asked_again")
    assert (asked["step"], asked["differs"]) == (5, True)
    assert "nan" in asked["reason"]
    assert "nan" not in asked["found"]
    assert not ledger.events("skip", "rollback", "corruption")
    assert final_hash(ledger) == clean_hash(tmp_path)


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize("seed", fault_seeds(1))
@pytest.mark.parametrize("shard", ["none", "optimizer", "gradients", "parameters"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_device_that_answers_so_now_and_then_is_left_out(
    tmp_path: Path, world_size: int, shard: Shard, seed: int
) -> None:
    """From the second time on it is known whose gradient it was."""
    fault = Fault(rank=seed % world_size, failpoint="gradient:0.2:nan")
    how = {"num_steps": 40, "seed": seed}
    ledger = faulty(tmp_path, fault, world_size, shard=shard, **how)
    assert named(ledger) == {FAULTY}
    assert ledger.events("corruption")[-1]["measure"] == "left_out"
    assert not ledger.events("skip", "rollback")
    assert final_hash(ledger) == clean_hash(tmp_path, **how)


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize("failpoint", ["gradient:1:nan", "exchanged_sum:1:nan", "lane_sum:1:nan"])
@pytest.mark.parametrize("shard", ["none", "optimizer", "gradients", "parameters"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_wherever_it_comes_from_the_run_ends_with_the_clean_runs_weights(
    tmp_path: Path, world_size: int, shard: Shard, failpoint: str
) -> None:
    fault = Fault(rank=1, failpoint=failpoint, from_step=6)
    ledger = faulty(tmp_path, fault, world_size, shard=shard)
    assert named(ledger) <= {FAULTY}
    assert not ledger.events("skip", "rollback")
    assert final_hash(ledger) == clean_hash(tmp_path)


@pytest.mark.parametrize("shard", ["none", pytest.param("parameters", marks=SLOW)])
def test_data_that_is_at_fault_is_left_out_as_without_audits(tmp_path: Path, shard: Shard) -> None:
    """Two workers and one come to the same."""
    faults = Faults(poisoned=frozenset((step, step % 2) for step in (5, 8, 9, 10)))
    how: dict[str, Any] = {"max_skipped_steps": 2, "num_steps": 14}
    plans = [
        plan_of(tmp_path / "alone", audit_every_steps=0, **how),
        plan_of(tmp_path / "two", audit_every_steps=1, shard=shard, **how),
    ]
    for world_size, plan in enumerate(plans, start=1):
        run_world(plan, faults, world_size=world_size)
    alone, two = [Ledger.read(plan.run) for plan in plans]
    assert final_hash(alone) == final_hash(two)
    assert alone.rollbacks == two.rollbacks == ((7, 10),)
    # After the rollback step 5 is taken again where a checkpoint was not stored yet
    skipped = [{line["step"] for line in ledger.events("skip")} for ledger in (alone, two)]
    assert skipped == [{5, 8, 9}] * 2
    assert not alone.events("asked_again")
    asked = {(line["step"], line["differs"]) for line in two.events("asked_again")}
    assert asked == {(step, False) for step in (5, 8, 9, 10)}
    assert not two.events("corruption", "undecided")


def test_a_spike_that_one_worker_makes_is_computed_again(tmp_path: Path) -> None:
    """Its loss alone shows whose it was: no checksum of the step was made."""
    how: dict[str, Any] = {"spike_factor": 8.0, "num_steps": 72, "audit_every_steps": 100}
    fault = Fault(rank=1, failpoint="loss:141:huge_nth")
    ledger = faulty(tmp_path, fault, 2, **how)
    [found] = ledger.events("corruption")
    assert (found["step"], found["node"], found["what"]) == (71, FAULTY, "loss")
    assert not ledger.events("skip")
    assert final_hash(ledger) == clean_hash(tmp_path, **how)


@pytest.mark.parametrize(
    ("world_size", "shard"),
    [
        (2, "none"),
        pytest.param(3, "none", marks=SLOW),
        pytest.param(2, "optimizer", marks=SLOW),
        (2, "parameters"),
    ],
)
def test_weights_that_one_worker_makes_no_numbers_before_a_save_send_the_run_back(
    tmp_path: Path, world_size: int, shard: Shard
) -> None:
    fault = Fault(rank=world_size - 1, failpoint="weights:6:nan_nth")
    ledger = faulty(tmp_path, fault, world_size, shard=shard)
    assert named(ledger) == {FAULTY}
    assert not ledger.events("skip", "rollback")
    assert final_hash(ledger) == clean_hash(tmp_path)
    assert all(math.isfinite(line["loss"]) for line in ledger.steps)


def test_rollbacks_of_a_worker_that_then_fails_its_self_test_are_void(tmp_path: Path) -> None:
    """Without audits the guard blamed the data. With them, the run goes back to before that."""
    fault = Fault(rank=1, failpoint="gradient:1:nan", from_step=6)
    blind = plan_of(tmp_path, audit_every_steps=0)
    with pytest.raises(AssertionError, match="another gradient each time"):
        run_with_fault(
            blind, tmp_path, fault, world_size=2, num_starts=1, waits_for_checkpoints=True
        )
    assert Ledger.read(blind.run).rollbacks == ((4, 9),)
    again = Fault(rank=1, failpoint="gradient:1:nan", from_the_start=True)
    (tmp_path / "again").mkdir()
    ledger = run_with_fault(plan_of(tmp_path), tmp_path / "again", again, world_size=2)
    [found] = ledger.events("corruption")
    assert (found["what"], found["node"], found["to_step"]) == ("self_test", FAULTY, 3)
    assert len(ledger.events("rollback")) == 1
    assert ledger.rollbacks == ()
    assert [line["step"] for line in ledger.steps] == [*range(1, NUM_STEPS + 1)]
    assert final_hash(ledger) == clean_hash(tmp_path)


def test_where_nothing_looks_wrong_to_be_ready_to_ask_again_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three steps, the last of which saves: no operation and no message more than a run makes
    that has no audits."""
    told: Counter[str] = Counter()

    def count(name: str) -> None:
        tell = getattr(WorkerGroup, name)

        def counted(*arguments: Any) -> Any:
            told[name] += 1
            return tell(*arguments)

        monkeypatch.setattr(WorkerGroup, name, counted)

    for name in ("gather", "broadcast", "prove"):
        count(name)
    counts: list[dict[str, int]] = []
    for every_steps in (0, 1000, 2):
        plan = plan_of(tmp_path / str(every_steps), audit_every_steps=every_steps)
        with ExitStack() as opened:
            attempt = open_attempt(plan, WorkerGroup(0, 1), opened, signals=lambda: None)
            assert isinstance(attempt, Attempt)
            told.clear()
            with torch.profiler.profile() as seen:
                for step in (1, 2, 3):
                    measured = attempt.measure(step)
                    assert measured is not None
                    assert attempt.update(step, measured) is not None
            done = {at.key: at.count for at in seen.key_averages() if at.key.startswith("aten::")}
            counts.append({**told} | done)
    without, ready, audited = counts
    assert ready == without
    assert sum(audited.values()) > sum(without.values()), "the audit of step 2 is seen"


def test_a_run_without_audits_asks_nobody(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, audit_every_steps=0)
    run_world(plan, Faults(poisoned=frozenset({(5, 0)})), world_size=2)
    ledger = Ledger.read(plan.run)
    assert [line["step"] for line in ledger.events("skip")] == [5]
    assert not ledger.events("asked_again")
    assert not any("proven_to" in line for line in ledger.steps)


def test_a_run_that_continues_from_a_state_that_was_not_proven_says_so(tmp_path: Path) -> None:
    """The checkpoint of step 6 is newer than what the audit of step 5 has proven."""
    plan = plan_of(tmp_path, audit_every_steps=5)
    train(replace(plan, until=7), rank=0, world_size=1)
    train(plan, rank=0, world_size=1)
    ledger = Ledger.read(plan.run)
    assert [start["step"] for start in ledger.events("start")] == [0, 6]
    told = {line["step"]: line.get("not_proven_since") for line in ledger.steps}
    assert told == {step: None if step <= 6 else 5 for step in range(1, NUM_STEPS + 1)}
    assert {line["proven_to"] for line in ledger.steps if line["step"] > 5} == {4}
    assert ledger.events("checkpoint")[-1]["proven_to"] == 4


def test_a_launcher_that_takes_the_run_over_while_the_other_ones_workers_ask_again(
    tmp_path: Path,
) -> None:
    """What these find then is written nowhere, and changes no bit."""
    plan, file, logs = (
        plan_of(tmp_path),
        tmp_path / "waits",
        [tmp_path / "0.log", tmp_path / "1.log"],
    )
    fault = Fault(rank=1, failpoint="gradient:1:nan", from_step=6)
    old = replace(plan, launcher=Fence(plan.run, launcher=None).generation)
    nodes, meeting = ["node-0", FAULTY], str(tmp_path / "meeting")
    processes = []
    for rank, log in enumerate(logs):
        arguments = (old, fault, rank, nodes, meeting, log, False)
        processes.append(worker_process(work_but_wait, file, *arguments))
        processes[-1].start()
    wait_until(file.exists, why=logs[0].read_text)
    new = replace(plan, launcher=Fence(plan.run, launcher=None).generation)
    train(new, rank=0, world_size=1)
    before = Ledger.read(plan.run)
    file.unlink()
    for process in processes:
        exit_code(process)
    assert "was replaced by writer" in logs[0].read_text()
    assert Ledger.read(plan.run).lines == before.lines
    assert named(before) == set()
    assert final_hash(before) == clean_hash(tmp_path)


def test_a_run_that_only_goes_back_stops_and_says_so(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    undecided = {
        "event": "undecided",
        "time": 1.0,
        "step": 7,
        "generation": 0,
        "what": "weights",
        "nodes": {"0": "node-0", "1": "node-1"},
        "to_step": 0,
        "proves": None,
        "least_steps": 1,
    }
    lines: list[dict[str, Any]] = [{"time": 1.0, "step": 6}]
    for attempt in range(1, MOST_WAYS_BACK + 1):
        shown = {"0": f"{attempt:016x}", "1": f"{2 * attempt:016x}"}
        lines.append({**undecided, "attempt": attempt, "shown": shown})
    plan.run.write_bytes(LEDGER, "".join(json.dumps(line) + "\n" for line in lines).encode())
    train(plan, rank=0, world_size=1)
    [gave_up] = Ledger.read(plan.run).events("gave_up")
    assert "went back 8 times and got no further than step 6" in gave_up["reason"]
    assert "on node-0 and node-1" in gave_up["reason"]
    train(plan, rank=0, world_size=1)
    assert Ledger.read(plan.run).events("finish"), "who resumes it has changed something"

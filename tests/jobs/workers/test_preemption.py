"""Notices: a checkpoint at the end of the step in which one is heard, and a run that continues or
ends resumable."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from cluster.storage.folder import LocalStorage
from cluster.storage.uris import StorageError
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.training.train_loop import train
from jobs.workers.preemption import STOP_REQUESTED, Notice, Notices, Signals, stopping_on_sigterm
from raymill.workers.worker_group import WorkerGroup
from tests.jobs.runs import tiny_plan
from tests.time_limits import limit_s
from tests.waiting import wait_until


@pytest.fixture
def plan(tmp_path: Path) -> RunPlan:
    return tiny_plan(str(tmp_path), num_steps=8, checkpoint={"save_every_steps": 100})


def saved_steps(plan: RunPlan) -> list[int]:
    return [line["step"] for line in Ledger.read(plan.run).events("checkpoint")]


def heard(*later: Signals) -> Iterator[Signals]:
    """Simulates the signals to a worker's process, at its start and before each step."""
    yield Signals(0)
    yield from later
    while True:
        yield later[-1]


def test_sigterm_and_drains_save_at_the_end_of_the_step_and_the_run_goes_on(plan: RunPlan) -> None:
    once, drained = Signals(1), Signals(1, "node-1 in 30 s")
    news = heard(Signals(0), once, once, once, drained)
    train(plan, rank=0, world_size=1, signals=lambda: next(news))
    events = Ledger.read(plan.run).events("preempted")
    assert [(line["step"], line["notice"]) for line in events] == [(2, "save"), (5, "save")]
    # One that waits to be stored may be replaced by a newer one
    assert set(saved_steps(plan)) <= {2, 5, 8}
    assert Ledger.read(plan.run).events("finish")


def test_before_all_nodes_go_the_last_step_is_saved_and_none_is_taken_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nodes stay, so the run goes on, long after the time of which it was warned."""
    monkeypatch.setattr("jobs.workers.preemption.AFTER_END_S", 1.0)
    settings = {"eval_every_steps": 10**6}, {"save_every_steps": 10**6}
    plan = tiny_plan(str(tmp_path), num_steps=10**5, train=settings[0], checkpoint=settings[1])
    asked_s: list[float] = []
    notice_s = limit_s(0.5)

    def news() -> Signals:
        asked_s.append(time.time())
        if len(asked_s) < 4:
            return Signals(0)
        end_s = asked_s[3] + notice_s
        if asked_s[-1] > end_s:
            plan.run.write_bytes(STOP_REQUESTED, b"")
        return Signals(1, "both nodes", end_s)

    train(plan, rank=0, world_size=1, signals=news)
    end_s = asked_s[3] + notice_s
    ledger = Ledger.read(plan.run)
    first, last, stop = ledger.events("preempted")
    assert (first["notice"], last["notice"], stop["notice"]) == ("save", "last", "stop")
    longest_s = max(later - earlier for earlier, later in pairwise(asked_s[3:]) if later < end_s)
    earliest_s = end_s - notice_s / 2 - 2 * longest_s
    assert earliest_s < last["time"] < end_s, "half of the notice is kept for storing"
    assert last["step"] > first["step"] + 1
    assert not [at for at in asked_s if last["time"] < at < end_s + 1.0], (
        "a step that would be lost"
    )
    (stored,) = [it for it in ledger.events("checkpoint") if it["step"] == last["step"]]
    assert stored["time"] < end_s + 1.0


@pytest.mark.parametrize(
    ("left_s", "step_s", "notice"),
    [
        (-1.0, 10.0, Notice.NONE),  # it was to go, and stays
        (60.0, 10.0, Notice.NONE),
        (20.0, 10.0, Notice.PART),  # the step after this one would be over just too late
        (5.0, 10.0, Notice.PART),
    ],
)
def test_a_worker_leaves_before_a_step_that_would_be_lost_with_its_node(
    left_s: float, step_s: float, notice: Notice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [1000.0]
    monkeypatch.setattr("jobs.workers.preemption.time.time", lambda: now_s[0])
    known = Signals(1, "node-1", own_end_s=1000.0 + step_s + left_s)
    notices = Notices(LocalStorage(tmp_path), WorkerGroup(0, 1), lambda: known)
    now_s[0] += step_s
    notices.ask()
    assert notices.answer() is notice
    assert notices.leaves_before_s == (known.own_end_s if notice is Notice.PART else None)
    notices.close()


def test_a_request_to_stop_ends_the_run_resumable(
    plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights at the end are those of a run that was never stopped, and the ledger has the line
    that continues it."""
    train(plan, rank=0, world_size=1)
    undisturbed = Ledger.read(plan.run).events("checkpoint")[-1]["parameter_hash"]

    other = tiny_plan(str(tmp_path / "other"), num_steps=8, checkpoint={"save_every_steps": 100})
    other = replace(other, command="raymill pretrain run.yaml --run-id tiny")
    ask = Notices.ask
    num_asked = 0

    def ask_and_stop(self: Notices) -> None:
        nonlocal num_asked
        num_asked += 1
        if num_asked == 4:
            other.run.write_bytes(STOP_REQUESTED, b"")
            assert self._stop_requested.wait(limit_s(10))
        ask(self)

    monkeypatch.setattr(Notices, "ask", ask_and_stop)
    train(other, rank=0, world_size=1)
    ledger = Ledger.read(other.run)
    assert (ledger.steps[-1]["step"], saved_steps(other), ledger.events("finish")) == (4, [4], [])
    assert ledger.events("preempted")[-1]["continue_with"] == other.command
    with stopping_on_sigterm(other.run):  # the next launch takes the request back
        train(other, rank=0, world_size=1)
    ledger = Ledger.read(other.run)
    assert ledger.events("finish")
    assert ledger.events("checkpoint")[-1]["parameter_hash"] == undisturbed


def test_a_signal_that_interrupts_a_write_is_not_stuck_behind_it(
    plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client of object storage has locks, which the interrupted code may hold. Storage that is
    out of reach is asked again."""
    lock, write = threading.Lock(), LocalStorage.write_bytes
    num_tries = 0

    def write_locked(storage: LocalStorage, key: str, data: bytes) -> None:
        nonlocal num_tries
        assert lock.acquire(timeout=limit_s(2)), "it waits for the code that it interrupts"
        lock.release()
        num_tries += 1
        if num_tries == 1:
            raise StorageError("out of reach")
        write(storage, key, data)

    with stopping_on_sigterm(plan.run):
        monkeypatch.setattr(LocalStorage, "write_bytes", write_locked)
        with lock:
            os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: plan.run.exists(STOP_REQUESTED))
    assert num_tries == 2

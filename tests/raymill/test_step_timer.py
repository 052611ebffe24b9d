"""A step's phases partition its time, on a clock that knows at once and on one that is behind."""

import itertools
import time
from pathlib import Path

import pytest

from jobs.run.ledger import Ledger
from jobs.training.train_loop import train
from model.operations import compilations
from raymill.phases import COMPUTING
from raymill.step_timer import StepTimer
from tests.jobs.runs import tiny_plan


class Ticks:
    """A clock that ticks once a mark; moments past `known_until` are not known yet."""

    def __init__(self) -> None:
        self._marks = itertools.count()
        self.known_until = 10**9

    def mark(self) -> int:
        return next(self._marks)

    def elapsed_s(self, start: int, end: int) -> float | None:
        return float(end - start) if end <= self.known_until else None


def test_a_phase_inside_another_interrupts_it() -> None:
    timer = StepTimer(clock=Ticks())  # marks: made 0, open 1, open 2, close 3, close 4, take 5
    with timer.phase("forward"), timer.phase("loss"):
        pass
    assert timer.take().seconds == {"forward": 2.0, "loss": 1.0, "stall": 2.0}
    for _ in range(3):
        with timer.phase("backward"):
            pass
    taken = timer.take()
    assert (taken.seconds, taken.num_lanes) == ({"backward": 3.0, "stall": 4.0}, 3)
    assert timer.take().num_lanes == 0


def test_a_phase_that_fails_is_closed() -> None:
    timer = StepTimer(clock=Ticks())
    with pytest.raises(RuntimeError), timer.phase("load"):
        raise RuntimeError
    timer.take()
    assert timer.take().seconds == {"stall": 1.0}


def test_what_a_device_has_not_done_counts_later() -> None:
    clock = Ticks()
    timer = StepTimer(clock=clock)
    with timer.phase("forward"):  # from 1 to 2
        pass
    with timer.phase("backward"):  # from 3 to 4
        pass
    clock.known_until = 2
    assert timer.take().seconds == {"forward": 1.0, "stall": 1.0}
    clock.known_until = 10**9
    assert timer.take().seconds == {"backward": 1.0, "stall": 3.0}


def test_graphs_that_are_compiled_meanwhile__count_in_their_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timer = StepTimer(clock=Ticks(), num_compiled=lambda: compilations.number)
    assert timer.take().num_compiled == 0
    monkeypatch.setattr(compilations, "number", compilations.number + 2)
    assert timer.take().num_compiled == 2
    assert timer.take().num_compiled == 0


def test_processor_time_is_that_of_phases_that_compute() -> None:
    """A worker that sleeps while it should compute is as one whose processor others have."""

    def compute() -> None:
        end_s = time.thread_time() + 0.02
        while time.thread_time() < end_s:
            pass

    timer = StepTimer()
    with timer.phase("forward"):
        time.sleep(0.05)
        with timer.phase("sync"):
            compute()
    with timer.phase("update"):
        compute()
    taken = timer.take()
    assert taken.processor_s is not None
    assert 0.02 <= taken.processor_s < 0.04
    assert taken.seconds["forward"] >= 0.05
    assert timer.take().processor_s == 0.0
    assert StepTimer(clock=Ticks()).take().processor_s is None, "a GPU computes"


def test_phases_of_a_real_run_sum_to_its_wall_time(tmp_path: Path) -> None:
    """The ledger's own clock agrees, and few moments belong to no phase."""
    plan = tiny_plan(
        str(tmp_path),
        num_steps=60,
        train={"layer_statistics_every_steps": 20, "eval_every_steps": 20},
    )
    train(plan, rank=0, world_size=1)
    steps = Ledger.read(plan.run).steps
    sums: dict[str, float] = {}
    for line in steps[1:]:
        assert sum(line["seconds"].values()) == pytest.approx(line["wall_s"], abs=1e-5)
        computing_s = sum(line["seconds"].get(phase, 0.0) for phase in COMPUTING)
        assert 0 < line["processor_s"] < computing_s + 0.01
        for name, seconds in line["seconds"].items():
            sums[name] = sums.get(name, 0.0) + seconds
    wall_s = steps[-1]["time"] - steps[0]["time"]
    assert sum(sums.values()) == pytest.approx(wall_s, rel=0.05)
    assert sums["stall"] < 0.4 * wall_s  # of which a busy machine takes its part
    expected = {
        "load",
        "forward",
        "loss",
        "backward",
        "update",
        "statistics",
        "validation",
        "checkpoint",
    }
    assert expected <= sums.keys()
    assert sums["backward"] > sums["loss"] / 2 > 0  # a busy machine lengthens either

"""The rank that holds the others up is named, and what each rank did reaches the ledger."""

import pytest

from jobs.training.rank_phases import RankPhases, RankTime, as_fields, from_fields, stragglers
from raymill.step_timer import StepTime
from raymill.workers.worker_group import WorkerGroup


def rank(lane_ms: float, *, lanes: int = 2, sync_ms: float = 0.0) -> RankTime:
    seconds = {"forward": 0.4 * lanes * lane_ms / 1000, "backward": 0.6 * lanes * lane_ms / 1000}
    return RankTime(seconds | {"sync": sync_ms / 1000}, lanes)


@pytest.mark.parametrize(
    ("ranks", "slow"),
    [
        ([rank(10)], {}),
        ([rank(10), rank(12.9)], {}),
        ([rank(10), rank(13.1)], {1: 1.31}),
        ([rank(10), rank(10), rank(40), rank(11)], {2: 4.0}),
        ([rank(20), rank(10), rank(10), rank(30), rank(10)], {0: 2.0, 3: 3.0}),
        ([rank(10, lanes=3), rank(10, lanes=2)], {}),  # more work is not slower work
        ([rank(10), rank(10, sync_ms=500)], {}),  # who waits is not slow
        ([RankTime({}, 0.0), RankTime({}, 0.0)], {}),
    ],
)
def test_stragglers_take_longer_for_a_lane(ranks: list[RankTime], slow: dict[int, float]) -> None:
    assert stragglers(ranks) == pytest.approx(slow)


def test_a_straggler_is_named_in_its_second_window_and_once() -> None:
    phases = RankPhases(WorkerGroup(0, 2))
    usual, slow = [rank(10), rank(10)], [rank(10), rank(20)]
    told = [
        bool(phases.new_stragglers(ranks))
        for ranks in (slow, usual, slow, slow, slow, usual, slow, slow)
    ]
    assert told == [False, False, False, True, False, False, False, True]


def test_a_window_holds_the_mean_of_its_steps() -> None:
    phases = RankPhases(WorkerGroup(0, 1))
    phases.add(StepTime(1.0, {"load": 0.2, "backward": 0.8}, 4))
    phases.add(StepTime(1.0, {"load": 0.4, "stall": 0.6}, 2))
    (found,) = phases.close_window()
    assert found.num_lanes == 3
    assert {name: value for name, value in found.seconds.items() if value} == pytest.approx(
        {"load": 0.3, "backward": 0.4, "stall": 0.3}
    )
    phases.add(StepTime(1.0, {"load": 1.0}, 1))
    (alone,) = phases.close_window()
    assert alone.seconds["load"] == 1.0, "a window begins anew"
    assert from_fields(as_fields([alone])) == [RankTime({"load": 1.0}, 1.0)]


def test_a_step_that_compiles__is_left_out_of_its_window() -> None:
    """One rank may compile alone, and would seem to be a straggler."""
    phases = RankPhases(WorkerGroup(0, 1))
    phases.add(StepTime(1.0, {"forward": 1.0}, 1))
    phases.add(StepTime(60.0, {"forward": 60.0}, 1, num_compiled=1))
    (found,) = phases.close_window()
    assert found.lane_s == 1.0
    phases.add(StepTime(60.0, {"forward": 60.0}, 1, num_compiled=1))
    (alone,) = phases.close_window()
    assert alone.lane_s == 60.0, "there is no other step"

"""A run is followed through a trace to the second: each case is computed by hand."""

from dataclasses import replace

import pytest

from jobs.plan.spot_trace import SpotTrace
from jobs.plan.traces.simulation import Recovery, Simulated, simulate

RECOVERY = Recovery(see_s=2, detect_s=1, meet_s=1, load_s=1, has_notices=False)
ANNOUNCED = replace(RECOVERY, has_notices=True)


def simulated(
    changes: list[tuple[float, int]],
    until_s: float,
    recovery: Recovery = RECOVERY,
    *,
    num_steps: int = 15,
    save_every_steps: int = 100,
) -> Simulated:
    """A step takes two workers one second, and one worker two."""
    result = simulate(
        SpotTrace(tuple(changes), until_s).intervals(),
        lambda workers: 2.0 / workers,
        recovery,
        num_steps=num_steps,
        save_every_steps=save_every_steps,
    )
    whole = result.steps_s + result.lost_s + result.recovery_s + result.waiting_s
    assert whole == pytest.approx(result.wall_s)
    assert result.timeline[-1][1] == result.wall_s
    return result


def test_nodes_that_stay__cost_the_start_alone() -> None:
    result = simulated([(0, 2)], 100)
    assert (result.is_done, result.wall_s, result.steps_s) == (True, 2 + 15, 15)
    assert (result.num_resizes, result.num_returns, result.lost_s) == (0, 0, 0)


@pytest.mark.parametrize(
    ("recovery", "wall_s", "recovery_s", "lost_s"),
    [
        # 2 s to start, 8 steps; a node is lost: 3 s, then 4 steps of 2 s until the other is seen at
        # 22, 1 s of a fifth; 2 s, and 3 more steps
        (RECOVERY, 27, 2 + 3 + 2, 1),
        # Announced: 2 s, 5 steps from 12 to 22; 2 s, and 2 more steps
        (ANNOUNCED, 26, 2 + 2 + 2, 0),
    ],
)
def test_a_node_that_goes_and_comes_back(
    recovery: Recovery, wall_s: float, recovery_s: float, lost_s: float
) -> None:
    result = simulated([(0, 2), (10, 1), (20, 2)], 100, recovery)
    assert (result.is_done, result.steps, result.wall_s) == (True, 15, wall_s)
    assert (result.recovery_s, result.lost_s, result.lost_steps) == (recovery_s, lost_s, 0)
    assert (result.num_resizes, result.num_returns, result.waiting_s) == (2, 0, 0)
    assert result.steps_worker_s == 15 * 2


@pytest.mark.parametrize(
    ("recovery", "lost_steps", "wall_s"),
    # 8 steps until 10, of which 5 are in a checkpoint; 10 s without a node, 2 s to start again
    [(RECOVERY, 3, 22 + 10), (ANNOUNCED, 0, 22 + 7)],
)
def test_when_all_nodes_go__what_no_checkpoint_has_is_lost(
    recovery: Recovery, lost_steps: int, wall_s: float
) -> None:
    result = simulated([(0, 2), (10, 0), (20, 2)], 100, recovery, save_every_steps=5)
    assert (result.lost_steps, result.lost_s, result.wall_s) == (lost_steps, lost_steps, wall_s)
    assert (result.waiting_s, result.num_returns, result.num_resizes) == (10, 1, 0)


def test_changes_in_quick_succession__end_a_recovery_before_its_step() -> None:
    """The second node goes 1 s into the first one's start, and comes 1 s after that."""
    result = simulated([(0, 2), (1, 1), (2, 2)], 100, ANNOUNCED)
    # Seen at 4, when the one worker had been ready at 3, and lost a second
    assert (result.recovery_s, result.lost_s, result.wall_s) == (1 + 2 + 2, 1, 6 + 15)


def test_a_trace_that_ends_first__says_how_far_the_run_came() -> None:
    result = simulated([(0, 0), (10, 2), (20, 0)], 30, ANNOUNCED)
    assert (result.is_done, result.steps, result.wall_s) == (False, 8, 30)
    assert (result.waiting_s, result.recovery_s, result.num_returns) == (20, 2, 0)

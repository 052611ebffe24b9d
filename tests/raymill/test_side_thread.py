"""Work beside a caller: the caller's waits for it are told apart from the caller's own work."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from raymill.side_thread import SideThread
from raymill.step_timer import StepTimer

HELD_S = 0.2


@pytest.fixture
def side() -> Iterator[SideThread]:
    thread = SideThread(max_waiting=1)
    yield thread
    thread.close()


def wait(side: SideThread) -> None:
    side.submit(time.sleep, HELD_S)
    side.wait()


def submit_to_a_full_queue(side: SideThread) -> None:
    begun = threading.Event()
    side.submit(lambda: (begun.set(), time.sleep(HELD_S)))
    begun.wait()
    side.submit(time.sleep, 0)  # waits in the queue
    side.submit(time.sleep, 0)  # has no room in it


@pytest.mark.parametrize("waits", [wait, submit_to_a_full_queue])
def test_the_callers_waits_are_sync_and_not_the_phase_in_which_they_come(
    side: SideThread, waits: Callable[[SideThread], None]
) -> None:
    timer = StepTimer()
    with side.timed_by(timer), timer.phase("backward"):
        waits(side)
    seconds = timer.take().seconds
    assert seconds["sync"] >= 0.9 * HELD_S
    assert seconds["backward"] < seconds["sync"]


def test_without_a_timer_waits_belong_to_the_phase_that_is_open(side: SideThread) -> None:
    timer = StepTimer()
    with timer.phase("validation"):
        wait(side)
    seconds = timer.take().seconds
    assert seconds["validation"] >= 0.9 * HELD_S
    assert "sync" not in seconds


def test_a_call_that_fails_raises_where_the_caller_waits(side: SideThread) -> None:
    side.submit(int, "no number")
    with pytest.raises(ValueError, match="no number"):
        side.wait()

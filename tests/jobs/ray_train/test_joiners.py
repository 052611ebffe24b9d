"""Which of the started workers become part of a group, with a group of plain values."""

import threading
from typing import Any

import pytest

from jobs.ray_train.joiners import Joiners
from jobs.ray_train.seated_group import NoPlaceError
from tests.waiting import wait_until


class PlainGroup:
    """Starts a worker in each seat for which a start was allowed, as a `SeatedGroup` does; those of
    `errors` do not come."""

    def __init__(self, num_workers: int) -> None:
        self.workers = [f"first {seat}" for seat in range(num_workers)]
        self.allowed = {seat: threading.Event() for seat in range(8)}
        self.errors: dict[int, Exception] = {}

    def start_in(self, seat: int) -> Any:
        assert self.allowed[seat].wait(10)
        if seat in self.errors:
            raise self.errors[seat]
        return f"later {seat}"

    def seat(self, seat: int, started: Any) -> None:
        self.workers[seat : seat + 1] = [started]

    def get_workers(self) -> list[str]:
        return self.workers


def started(group: PlainGroup, *seats: int) -> tuple[Joiners, list[int]]:
    """Returns the joiners, and the seats that they will have given up."""
    given_up: list[int] = []
    group_of_values: Any = group
    joiners = Joiners(group_of_values, given_up.append)
    for seat in seats:
        joiners.start(seat)
    return joiners, given_up


def take_in(joiners: Joiners, *expected: int) -> None:
    taken: set[int] = set()

    def has_taken() -> bool:
        taken.update(joiners.take_in())
        return taken == {*expected}

    wait_until(has_taken, timeout_s=10, why=lambda: f"{taken} came, and {expected} are expected")


def test_a_vacant_seat_and_new_ones_are_taken_in_their_order() -> None:
    group = PlainGroup(3)
    joiners, given_up = started(group, 1, 3, 4)
    group.allowed[4].set()
    group.allowed[1].set()
    take_in(joiners, 1)
    assert joiners.seats == {3, 4}, "4 waits for 3"
    group.allowed[3].set()
    take_in(joiners, 3, 4)
    assert group.workers == ["first 0", "later 1", "first 2", "later 3", "later 4"]
    assert (joiners.seats, given_up, joiners.may_start) == (set(), [], True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [NoPlaceError("no room"), ValueError("nobody expects it")])
def test_one_behind_a_seat_whose_worker_does_not_come_begins_anew(error: Exception) -> None:
    group = PlainGroup(3)
    joiners, given_up = started(group, 3, 4)
    group.errors[3] = error
    group.allowed[4].set()
    group.allowed[3].set()
    wait_until(
        lambda: not (joiners.take_in() or joiners.seats), timeout_s=10, why=lambda: f"{given_up}"
    )
    assert given_up == [3, 4]
    assert group.workers == ["first 0", "first 1", "first 2"]
    assert not joiners.may_start, "not at once again"

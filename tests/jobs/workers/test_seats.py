"""Workers go on without those whose seats are vacant, and with them when they come back."""

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch.distributed as dist

from jobs.workers.rendezvous import Rendezvous, meeting_place
from jobs.workers.round_end import vacate
from jobs.workers.seats import Seats
from tests.jobs.meeting_worker import meet
from tests.jobs.worker_processes import exit_code, worker_process
from tests.waiting import wait_until

NUM_SEATS = 3


class MeetingProcesses:
    """Processes that add up their ranks for as long as they live."""

    def __init__(
        self, address: str, folder: Path, *, num_sums: int, how: str | None = None
    ) -> None:
        self._address, self._folder, self._num_sums, self._how = address, folder, num_sums, how
        self.processes = [self.start(seat) for seat in range(NUM_SEATS)]

    def start(self, seat: int) -> BaseProcess:
        work = partial(meet, log=self._folder / f"{seat}.log", how=self._how)
        process = worker_process(work, self._address, seat, NUM_SEATS, self._num_sums)
        process.start()
        return process

    def lose(self, seat: int) -> None:
        self.processes[seat].kill()
        self.processes[seat].join()
        self.leave_vacant(seat)

    def leave(self, seat: int, *, gone_at_s: float) -> None:
        """Has a worker leave by itself, whose node is to go at this UNIX time."""
        written = self._folder / "leaves"
        written.write_text(str(gone_at_s))
        written.rename(self._folder / f"{seat}.leaves")

    def leave_vacant(self, *seats: int) -> None:
        vacate(self._address, group="group", num_seats=NUM_SEATS, seats=seats)

    def come(self, seat: int) -> None:
        (self._folder / f"{seat}.leaves").unlink(missing_ok=True)
        self.processes[seat : seat + 1] = [self.start(seat)]

    def wait_for_sum(self, seats: list[int]) -> None:
        """Waits until these have met, as their first sum shows, and nobody else."""
        ranks = sum(range(len(seats)))
        wait_until(
            lambda: all(self._last_first_sum(seat) == ranks for seat in seats),
            why=lambda: [(seat, self._last_first_sum(seat)) for seat in seats],
        )

    def _last_first_sum(self, seat: int) -> float | None:
        log = self._folder / f"{seat}.log"
        lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        after_met: list[list[str]] = []
        for line in lines:
            after_met = [] if line[0] == "met" else [*after_met, line]
        sums = [float(line[2]) for line in after_met if line[:2] == ["sum", "0"]]
        return sums[0] if sums else None

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture
def group(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MeetingProcesses]:
    with meeting_place("127.0.0.1") as address:
        how = getattr(request, "param", None)
        seated = MeetingProcesses(address, tmp_path, num_sums=1_000_000, how=how)
        try:
            seated.wait_for_sum([0, 1, 2])
            yield seated
        finally:
            seated.end()


@pytest.mark.more
@pytest.mark.parametrize("seat", [0, 1])
def test_the_others_go_on_without_a_lost_one_and_with_it_when_it_is_back(
    group: MeetingProcesses, seat: int
) -> None:
    pids = [process.pid for process in group.processes]
    group.lose(seat)
    group.wait_for_sum([other for other in range(NUM_SEATS) if other != seat])
    group.come(seat)
    group.wait_for_sum([0, 1, 2])
    stayed = [other for other in range(NUM_SEATS) if other != seat]
    assert all(group.processes[other].pid == pids[other] for other in stayed)
    assert all(group.processes[other].is_alive() for other in range(NUM_SEATS))


@pytest.mark.more
@pytest.mark.parametrize("group", ["balanced"], indirect=True)
def test_those_who_wait_for_nobody_are_joined_too(group: MeetingProcesses) -> None:
    group.lose(1)
    group.wait_for_sum([0, 2])
    group.come(1)
    group.wait_for_sum([0, 1, 2])


@pytest.mark.more
@pytest.mark.parametrize("seat", [0, 2])
def test_the_others_go_on_at_once_without_one_that_leaves(
    group: MeetingProcesses, seat: int
) -> None:
    group.leave(seat, gone_at_s=time.time() + 600)
    group.wait_for_sum([other for other in range(NUM_SEATS) if other != seat])
    assert group.processes[seat].is_alive(), "as long as its node is there"
    group.lose(seat)  # as the controller finds out later
    others = [process for other, process in enumerate(group.processes) if other != seat]
    assert all(process.is_alive() for process in others)
    group.come(seat)
    group.wait_for_sum([*range(NUM_SEATS)])


@pytest.mark.more
def test_one_that_has_left_ends_where_its_node_stays(group: MeetingProcesses) -> None:
    group.leave(1, gone_at_s=time.time() - 600)
    assert exit_code(group.processes[1]) == 1
    group.wait_for_sum([0, 2])


@pytest.mark.more
def test_one_that_has_left_ends_with_the_others(tmp_path: Path) -> None:
    (tmp_path / "1.leaves").write_text(str(time.time() + 600))
    with meeting_place("127.0.0.1") as address:
        group = MeetingProcesses(address, tmp_path, num_sums=10)
        assert [exit_code(process) for process in group.processes] == [0, 0, 0]


@pytest.mark.more
def test_one_that_is_left_alone_goes_on_alone(group: MeetingProcesses) -> None:
    group.lose(0)
    group.lose(1)
    group.wait_for_sum([2])
    group.come(1)
    group.wait_for_sum([1, 2])


@pytest.mark.more
def test_one_that_comes_to_a_new_seat_makes_them_more(group: MeetingProcesses) -> None:
    group.come(NUM_SEATS)
    group.wait_for_sum([0, 1, 2, 3])
    group.lose(1)
    group.wait_for_sum([0, 2, 3])


@pytest.mark.more
def test_a_worker_whose_seat_was_given_up_ends(group: MeetingProcesses) -> None:
    """Its node only seemed to be lost: another worker may be started there."""
    group.leave_vacant(1)
    assert exit_code(group.processes[1], timeout_s=30) == 1
    group.wait_for_sum([0, 2])


def test_a_worker_that_comes_when_the_others_are_done_has_nothing_to_do(tmp_path: Path) -> None:
    with meeting_place("127.0.0.1") as address:
        first = Rendezvous(address, group="g", seat=0, num_seats=2)
        vacate(address, group="g", num_seats=2, seats=[1])
        done: list[int] = []
        assert first.attend(lambda meeting: done.append(meeting.number))
        late = Rendezvous(address, group="g", seat=1, num_seats=2)
        assert late.attend(lambda meeting: done.append(meeting.number))
    assert done == [1]


@pytest.fixture
def store() -> Iterator[dist.Store]:
    with meeting_place("127.0.0.1") as address:
        host, port = address.split(":")
        store = dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False)
        store.compare_set("round", "", "0")
        yield store


def test_who_is_in_a_round_is_settled_once(store: dist.Store) -> None:
    seats = Seats(store, NUM_SEATS)
    assert seats.taken(0) == {0, 1, 2}
    seats.end(0)
    assert seats.taken(1) == {0, 1, 2}
    seats.vacate([2])
    assert (seats.round(), seats.taken(1), seats.taken(2)) == (2, {0, 1, 2}, {0, 1})
    seats.vacate([2])
    assert seats.round() == 2, "a round that goes without it already is not ended"
    seats.end(2)
    seats.end(3)
    assert seats.taken(4) == {0, 1}, "a round has the seats of the one before"
    seats.take(2)
    assert (seats.round(), seats.taken(5)) == (5, {0, 1, 2})
    seats.take(2)
    assert seats.round() == 5
    seats.take(5)
    assert (seats.round(), seats.taken(6)) == (6, {0, 1, 2, 5}), "a new seat makes them more"


@pytest.mark.parametrize("seed", range(5))
def test_changes_at_the_same_time_are_all_made(store: dist.Store, seed: int) -> None:
    num_started, num_threads = 4, 8
    host_store = store.clone()
    before = random.Random(seed).sample(range(num_started), 2)
    Seats(host_store, num_started).vacate(before)
    is_taken = [seat < num_started and seat not in before for seat in range(num_threads)]

    def change(seat: int) -> dict[int, set[int]]:
        """Turns the seat over, and returns what it saw of all rounds on its way."""
        seats = Seats(store.clone(), num_started)
        if is_taken[seat]:
            seats.vacate([seat])
        else:
            seats.take(seat)
        return {number: seats.taken(number) for number in range(seats.round() + 1)}

    with ThreadPoolExecutor(num_threads) as threads:
        seen = list(threads.map(change, range(num_threads)))
    last = Seats(host_store, num_started)
    assert last.taken(last.round()) == {s for s in range(num_threads) if not is_taken[s]}
    for rounds in seen:
        for number, taken in rounds.items():
            assert last.taken(number) == taken

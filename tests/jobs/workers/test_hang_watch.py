"""Where workers stand, over a real store and with a clock by hand: who is heard, and when rank 0
judges."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist

from jobs.workers.hang_watch import HangWatch
from jobs.workers.rendezvous import meeting_place
from jobs.workers.watchdog import Beat, Health, Place, Waits
from raymill.workers.worker_group import Meeting

LOOK_S = 0.5
TIMEOUT_S = 30.0


class CountedStore:
    def __init__(self, store: dist.Store) -> None:
        self._store, self.num_calls, self.num_keys = store, 0, 0

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.num_keys += len(keys)
        return self._store.multi_get(keys)

    def __getattr__(self, name: str) -> Any:
        self.num_calls += 1
        return getattr(self._store, name)


class Workers:
    """Two workers in a message of a step, which they both have begun."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.now_s = 0.0
        self.beats = [Beat(Place.STEP, 5, 0.5, [Waits.WORKERS], []) for _ in range(2)]
        self.stores = [
            CountedStore(dist.TCPStore(host, int(port), is_master=False)) for _ in range(2)
        ]
        self.watches = [self._watch(rank) for rank in range(2)]

    def _watch(self, rank: int) -> HangWatch:
        store: Any = self.stores[rank]
        HangWatch.enter(store, rank)
        meeting = Meeting(3)
        meeting.progress.message(range(2)).__enter__()
        return HangWatch(
            store,
            meeting,
            rank=rank,
            world_size=2,
            beat=lambda: self.beats[rank],
            hang_timeout_s=TIMEOUT_S,
            clock=lambda: self.now_s,
        )

    def judged_after(self, most_s: float, *, silent: int | None = None) -> float | None:
        """Lets the workers look for so long, or until they are judged: returns after how long."""
        start_s = self.now_s
        while self.now_s < start_s + most_s:
            self.now_s += LOOK_S
            for rank in (1, 0):
                if rank != silent and self.watches[rank].look():
                    return self.now_s - start_s
        return None


@pytest.fixture
def workers() -> Iterator[Workers]:
    with meeting_place("127.0.0.1") as address:
        yield Workers(address)


def test_all_hear_of_the_verdict_once_both_have_stood_for_the_timeout(workers: Workers) -> None:
    after_s = workers.judged_after(100)
    assert after_s is not None
    assert TIMEOUT_S <= after_s <= TIMEOUT_S + 3 * LOOK_S
    for watch in workers.watches:
        hang = watch.verdict()
        assert hang is not None
        assert (hang.round, hang.health, hang.ranks) == (3, Health.BLOCKED, [0, 1])


def test_a_move_of_one_starts_the_time_again(workers: Workers) -> None:
    assert workers.judged_after(25) is None
    workers.beats[1] = Beat(Place.STEP, 6, 0.5, [Waits.WORKERS], [])
    assert workers.judged_after(TIMEOUT_S - 1) is None
    assert workers.judged_after(5)


@pytest.mark.more
@pytest.mark.parametrize(
    "beat",
    [
        Beat(Place.STEP, 5, 0.5, [Waits.STORAGE], []),
        Beat(Place.SAVE, 5, 0.5, [Waits.STORAGE, Waits.WORKERS], []),
        Beat(Place.AROUND, 5, None, [], []),
    ],
    ids=["an outage", "an outage in a message", "preparations"],
)
def test_an_outage_or_preparations_are_no_standstill_however_long(
    workers: Workers, beat: Beat
) -> None:
    workers.beats[1] = beat
    assert workers.judged_after(3600) is None
    # It is over, and no mark was made yet
    workers.beats[1] = Beat(Place.STEP, 5, 0.5, [Waits.WORKERS], [])
    assert workers.judged_after(TIMEOUT_S - 1) is None


def test_who_waits_for_a_silent_one_is_not_judged(workers: Workers) -> None:
    """Its own watchdog ends a worker that is stopped."""
    assert workers.judged_after(TIMEOUT_S - 1) is None
    assert workers.judged_after(3600, silent=1) is None


def test_a_worker_that_was_stopped_has_not_stood_still_meanwhile(workers: Workers) -> None:
    assert workers.judged_after(5) is None
    assert workers.judged_after(29, silent=1) is None
    assert workers.judged_after(15) is None


def test_a_replacement_that_has_not_met_the_others_is_no_standstill(workers: Workers) -> None:
    assert workers.judged_after(TIMEOUT_S - 1) is None
    store: Any = workers.stores[1]
    HangWatch.enter(store, 1)
    assert workers.judged_after(10, silent=1) is None


def test_only_rank_0_reads_the_others_and_only_while_it_stands(workers: Workers) -> None:
    workers.judged_after(TIMEOUT_S - 1)
    assert [store.num_keys for store in workers.stores] == [0, 0]
    calls = workers.stores[1].num_calls
    workers.judged_after(LOOK_S)
    assert workers.stores[1].num_calls - calls == 1

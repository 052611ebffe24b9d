"""Workers meet, lose one another at random moments, and meet again with the replacement: no other
worker is restarted."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from jobs.workers import rendezvous as rendezvous_module
from jobs.workers.rendezvous import FruitlessError, Rendezvous, meeting_place
from jobs.workers.seats import Seats
from raymill.errors import LostPeerError
from raymill.workers.worker_group import Meeting
from tests.jobs.meeting_worker import meet
from tests.jobs.worker_processes import exit_code, into_log, worker_process
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = pytest.mark.more

WORLD_SIZE, ROUNDS = 3, 60


class Group:
    def __init__(self, address: str, folder: Path, *, ways: dict[int, str] | None = None) -> None:
        """`ways` names ranks that do not work as they should, and how."""
        self._address, self._folder, self.num_started = address, folder, 0
        self.ways = ways or {}
        self.processes = [self.start(rank) for rank in range(WORLD_SIZE)]

    def start(self, rank: int) -> BaseProcess:
        self.num_started += 1
        work = partial(meet, log=self._folder / f"{rank}.log", how=self.ways.get(rank))
        process = worker_process(work, self._address, rank, WORLD_SIZE, ROUNDS)
        process.start()
        return process

    def kill(self, rank: int) -> None:
        self.processes[rank].kill()
        self.processes[rank].join()

    def replace(self, rank: int) -> None:
        self.kill(rank)
        self.processes[rank] = self.start(rank)

    def exit_codes(self) -> list[int]:
        return [exit_code(process) for process in self.processes]

    def lines(self, rank: int, word: str) -> list[list[str]]:
        log = self._folder / f"{rank}.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [line.split()[1:] for line in lines if line.startswith(word)]

    def wait_for_meeting(self, number: int) -> None:
        """Waits until the newest process of every rank has met the others, at least for the
        `number`-th time in all."""

        def met(rank: int) -> bool:
            lines = self.lines(rank, "met")
            return len(lines) >= number and lines[-1] == [str(self.processes[rank].pid)]

        wait_until(
            lambda: all(map(met, range(WORLD_SIZE))),
            poll_s=0.02,
            why=lambda: [self.lines(rank, "met") for rank in range(WORLD_SIZE)],
        )


@pytest.mark.parametrize(
    "victims",
    [
        pytest.param([1], marks=pytest.mark.slow),
        [0],
        pytest.param([2, 0], marks=pytest.mark.slow),
        [1, 1],
    ],
)
def test_only_the_lost_are_started_again(victims: list[int], tmp_path: Path) -> None:
    rng = random.Random(str(victims))
    with meeting_place("127.0.0.1") as address:
        group = Group(address, tmp_path)
        group.wait_for_meeting(1)
        for victim in victims:
            before = [process.pid for process in group.processes]
            time.sleep(rng.random() / 4)
            group.replace(victim)
            group.wait_for_meeting(1)
            assert [p.pid == pid for p, pid in zip(group.processes, before, strict=True)].count(
                False
            ) == 1
        assert group.exit_codes() == [0] * WORLD_SIZE
        for rank in range(WORLD_SIZE):
            whole = [
                ["sum", str(number), str(float(3 + 3 * number))][1:] for number in range(ROUNDS)
            ]
            assert group.lines(rank, "sum")[-ROUNDS:] == whole
        assert group.num_started == WORLD_SIZE + len(victims)


def test_two_lost_at_once_and_one_lost_again_before_it_met_anyone(tmp_path: Path) -> None:
    with meeting_place("127.0.0.1") as address:
        group = Group(address, tmp_path)
        group.wait_for_meeting(1)
        for rank in (1, 2):
            group.kill(rank)
        group.processes[1] = group.start(1)
        wait_until(lambda: group.lines(1, "come")[-1] == [str(group.processes[1].pid)])
        time.sleep(1)  # it waits for the other
        group.replace(1)
        group.processes[2] = group.start(2)
        assert group.exit_codes() == [0] * WORLD_SIZE
        assert len(group.lines(0, "met")) == 2


def test_a_group_whose_backend_can_never_start_gives_up_in_every_rank(tmp_path: Path) -> None:
    with meeting_place("127.0.0.1") as address:
        group = Group(address, tmp_path, ways=dict.fromkeys(range(WORLD_SIZE), "broken backend"))
        assert group.exit_codes() == [1] * WORLD_SIZE
    for rank in range(WORLD_SIZE):
        assert len(group.lines(rank, "met")) == 6
        error = (tmp_path / f"{rank}.log").read_text().splitlines()[-1]
        assert error.endswith(
            "FruitlessError: the workers met 6 times in a row and completed no step; the last time: no space for a "
            "segment in /dev/shm"
        )


def test_a_step_between_two_losses_is_no_standstill() -> None:
    """A long run may lose workers any number of times."""
    num_steps = 0

    def work(meeting: Meeting) -> None:
        nonlocal num_steps
        num_steps += num_steps < 3
        raise dist.DistNetworkError("Connection closed by peer")

    with meeting_place("127.0.0.1") as address:
        settings = {"group": "g", "seat": 0, "num_seats": 1, "max_fruitless": 2}
        rendezvous = Rendezvous(address, **settings, progress=lambda: num_steps)
        assert [rendezvous.attend(work) for _ in range(5)] == [False] * 5
        with pytest.raises(FruitlessError, match="met 2 times in a row"):
            rendezvous.attend(work)


def test_one_that_cannot_leave_a_round_that_is_over_ends(tmp_path: Path) -> None:
    with meeting_place("127.0.0.1") as address:
        group = Group(address, tmp_path, ways={0: "deaf"})
        group.wait_for_meeting(1)
        group.ways.clear()
        group.replace(1)
        assert exit_code(group.processes[0], timeout_s=30) == 1

        def all_are_done() -> bool:
            for rank, process in enumerate(group.processes):
                # Another one that waited for the deaf one's message may end with it
                if process.exitcode == 1:
                    group.processes[rank] = group.start(rank)
            return all(process.exitcode == 0 for process in group.processes)

        wait_until(all_are_done, timeout_s=60)


def test_one_that_is_held_up_elsewhere_is_freed_and_lives(tmp_path: Path) -> None:
    """On a GPU a lost worker's message holds up whatever the host asks of the device next."""
    with meeting_place("127.0.0.1") as address:
        group = Group(address, tmp_path, ways={0: "elsewhere", 2: "elsewhere"})
        group.wait_for_meeting(1)
        group.replace(1)
        assert group.exit_codes() == [0] * WORLD_SIZE
    assert group.num_started == WORLD_SIZE + 1
    assert [len(group.lines(rank, "met")) for rank in (0, 2)] == [2, 2]


class CountedStore:
    """Counts the keys that are looked up in a store, and how often."""

    def __init__(self, store: dist.Store) -> None:
        self._store, self.num_looks, self.num_keys = store, 0, 0

    def check(self, keys: list[str]) -> bool:
        self.num_looks += 1
        self.num_keys += len(keys)
        return self._store.check(keys)

    def get(self, key: str) -> bytes:
        self.num_keys += 1
        return self._store.get(key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@pytest.mark.parametrize("world_size", [2, 32])
def test_a_look_for_the_others_costs_as_many_keys_for_any_number_of_them(world_size: int) -> None:
    """A thread stands for a rank, as the store cannot tell."""
    with meeting_place("127.0.0.1") as address:
        ranks = [
            Rendezvous(address, group="g", seat=rank, num_seats=world_size)
            for rank in range(world_size)
        ]
        stores = [CountedStore(rendezvous._store) for rendezvous in ranks]
        for rendezvous, store in zip(ranks, stores, strict=True):
            rendezvous._store = store  # type: ignore[assignment]
            rendezvous._table = Seats(store, world_size)  # type: ignore[arg-type]
        with ThreadPoolExecutor(world_size) as threads:
            early = [threads.submit(rendezvous._all, 0, "came") for rendezvous in ranks[1:]]
            wait_until(lambda: all(store.num_looks > 5 for store in stores[1:]))
            assert not any(answer.done() for answer in early)
            assert ranks[0]._all(0, "came")
            assert all(answer.result() for answer in early)
        num_looks, num_keys = (
            sum(getattr(store, name) for store in stores) for name in ("num_looks", "num_keys")
        )
        print(f"{world_size} ranks: {num_keys} keys in {num_looks} looks")
        assert num_keys <= 2 * num_looks


def test_a_round_that_ends_while_some_have_not_come_lets_the_others_go() -> None:
    with meeting_place("127.0.0.1") as address, ThreadPoolExecutor(1) as threads:
        ranks = [Rendezvous(address, group="g", seat=rank, num_seats=2) for rank in range(2)]
        answer = threads.submit(ranks[0]._all, 0, "came")
        ranks[1]._table.end(0)
        assert not answer.result(limit_s(10))


def alone(address: str, **settings: Any) -> Rendezvous:
    return Rendezvous(address, group="g", seat=0, num_seats=1, **settings)


def hang(address: str, log: Path) -> None:
    into_log(log)
    rendezvous_module._ABORT_S = 0.1

    def lose(meeting: Meeting) -> None:
        dist.destroy_process_group = threading.Event().wait
        raise LostPeerError("a step")

    alone(address).attend(lose)


def test_an_abort_that_hangs_ends_the_process_and_says_so(tmp_path: Path) -> None:
    with meeting_place("127.0.0.1") as address:
        process = worker_process(hang, address, tmp_path / "log")
        process.start()
        assert exit_code(process) == 1
    assert (
        "rank 0 could not abort its messages in 0.1 s: it ends, to be replaced"
        in (tmp_path / "log").read_text()
    )


def test_a_watch_whose_meeting_place_is_gone_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []

    def work(meeting: Meeting) -> None:
        time.sleep(limit_s(1))  # the watch has found the place
        place.close()
        wait_until(
            lambda: (
                said.append(capsys.readouterr().err)
                or "no longer notices lost workers" in "".join(said)
            )
        )

    with ExitStack() as place, pytest.raises(RuntimeError):
        alone(place.enter_context(meeting_place("127.0.0.1"))).attend(work)
    dist.destroy_process_group()


def test_a_backend_that_never_connects_is_given_up_and_one_that_did_once_finds_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names: list[str] = []

    def refuse(*args: object, **more: object) -> None:
        raise dist.DistBackendError(
            "NCCL error: unhandled system error\nno space for a segment in /dev/shm"
        )

    with meeting_place("127.0.0.1") as address:
        with (
            monkeypatch.context() as patch,
            pytest.raises(FruitlessError, match=r"met 2 times .* /dev/shm"),
        ):
            patch.setattr(distributed_c10d, "_new_process_group_helper", refuse)
            alone(address, max_fruitless=2).attend(lambda meeting: None)
        for number in range(2):
            rendezvous = Rendezvous(address, group=f"g{number}", seat=0, num_seats=1)
            rendezvous.attend(lambda meeting: names.append(dist.group.WORLD.group_name))
    assert names[0] == names[1], (
        "a process that failed to connect looks for the others under the same name as a new one"
    )

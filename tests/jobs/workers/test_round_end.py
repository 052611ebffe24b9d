"""The workers that are left leave a round when it is ended from outside, also where nothing tells
them of the lost one."""

import os
import signal
from datetime import timedelta
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from jobs.workers.rendezvous import meeting_place
from jobs.workers.round_end import RoundEnd
from tests.jobs.meeting_worker import meet
from tests.jobs.worker_processes import worker_process
from tests.waiting import wait_until

WORLD_SIZE = 3


def started(address: str, folder: Path) -> list[BaseProcess]:
    """Starts workers that exchange numbers for as long as they live."""
    processes = []
    for rank in range(WORLD_SIZE):
        work = partial(meet, log=folder / f"{rank}.log")
        process = worker_process(work, address, rank, WORLD_SIZE, 1_000_000)
        process.start()
        processes.append(process)
    return processes


def count(folder: Path, rank: int, word: str) -> int:
    log = folder / f"{rank}.log"
    return (
        sum(line.startswith(word) for line in log.read_text().splitlines()) if log.exists() else 0
    )


@pytest.mark.parametrize("is_noticed", [False, True])
def test_who_is_left_leaves_the_round(is_noticed: bool, tmp_path: Path) -> None:
    """A worker that is stopped closes no connection, as one whose machine has lost its power."""
    with meeting_place("127.0.0.1") as address:
        processes = started(address, tmp_path)
        try:
            wait_until(lambda: all(count(tmp_path, rank, "sum") > 3 for rank in range(WORLD_SIZE)))
            lost = processes[1]
            assert lost.pid is not None
            os.kill(lost.pid, signal.SIGKILL if is_noticed else signal.SIGSTOP)
            if is_noticed:
                wait_until(
                    lambda: all(count(tmp_path, rank, f"rank {rank} lost") for rank in (0, 2))
                )
            else:
                assert not count(tmp_path, 0, "rank 0 lost")
            round_end = RoundEnd(address, group="group", lost=[1])
            wait_until(lambda: round_end.is_left_by(0) and round_end.is_left_by(2))
            assert not round_end.is_left_by(1)
            assert all(count(tmp_path, rank, f"rank {rank} lost") == 1 for rank in (0, 2))
            again = RoundEnd(address, group="group", lost=[1])
            assert again.is_left_by(0) and again.is_left_by(2), (
                "a round that is over is not ended twice"
            )
        finally:
            for process in processes:
                process.kill()
                process.join()


def test_a_group_or_a_place_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.workers.round_end._ANSWER", timedelta(seconds=0.5))
    with meeting_place("127.0.0.1") as address, pytest.raises(RuntimeError):
        RoundEnd(address, group="another", lost=[1])
    with pytest.raises(RuntimeError):
        RoundEnd(address, group="group", lost=[1])

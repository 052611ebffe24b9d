"""The worker processes of a training: starts the workers of a stint, waits for them, and starts
fewer after one was killed. This module does not import PyTorch; a server of forks does that
once."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from raymill.proof.rows import Row, Stint

if TYPE_CHECKING:
    from raymill.proof.worker import Ending

_STINT_LIMIT_S = 300  # a stint takes a second or two


class FailedTrainingError(RuntimeError):
    """A worker could not train. The text says why."""


@dataclass(frozen=True)
class _Worker:
    rank: int
    process: BaseProcess
    answers: Connection


@dataclass(frozen=True)
class _Task:
    """A stint, as each of its workers is told of it."""

    way: str
    stint: Stint
    folder: Path  # of the states
    store: Path  # by which they meet
    seed: int
    kind: str  # of device


@dataclass(frozen=True)
class _Failure:
    text: str


def prepare() -> None:
    """Has a server of forks import PyTorch, so that a worker starts at once."""
    # gloo would else look up the host's name, which may lead nowhere
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["raymill.proof.worker", "raymill.proof.deterministic"])


def trained(way: str, row: Row, *, folder: Path, seed: int, kind: str = "cpu") -> "Ending":
    """Trains as a row says, on devices of a kind, with the states in an empty folder. Raises
    `FailedTrainingError`."""
    ending: Ending | None = None
    for number, stint in enumerate(row.stints):
        store = folder / f"meeting-{number}"
        task = _Task(way, stint, folder, store, seed, kind)
        ending = _trained_stint(task)
    assert ending is not None, "the last stint loses nobody"
    return ending


def _trained_stint(task: _Task) -> "Ending | None":
    """Returns what the workers end with; None where one of them was killed, as the stint says."""
    workers: list[_Worker] = []
    try:
        for rank in range(task.stint.num_workers):
            workers.append(_started(task, rank))
        return _ending(workers, is_killed=task.stint.killed_in_step is not None)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()
            worker.answers.close()


def _started(task: _Task, rank: int) -> _Worker:
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, task, rank), daemon=True)
    process.start()
    theirs.close()
    return _Worker(rank, process, ours)


def _ending(workers: Sequence[_Worker], *, is_killed: bool) -> "Ending | None":
    deadline_s = time.monotonic() + _STINT_LIMIT_S
    waiting = {worker.answers: worker for worker in workers}
    endings: list[Ending] = []
    failures: list[str] = []
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline_s - time.monotonic()))
        if not ready:
            raise FailedTrainingError(f"no answer within {_STINT_LIMIT_S} s")
        for answers in ready:
            assert isinstance(answers, Connection)
            worker = waiting.pop(answers)
            answer = _answer(worker)
            if answer is None and is_killed:
                return None  # the others cannot go on, and are ended
            if answer is None:
                failures.append(f"worker {worker.rank} ended with {worker.process.exitcode}")
            elif isinstance(answer, _Failure):
                failures.append(answer.text)
            else:
                endings.append(answer)
    if failures:
        raise FailedTrainingError(failures[0])
    assert not is_killed, "the worker that was to be killed went on"
    assert len(set(endings)) == 1, endings
    return endings[0]


def _answer(worker: _Worker) -> "Ending | _Failure | None":
    """Returns what a worker has sent; None if it ended without a word."""
    try:
        answer: Ending | _Failure = worker.answers.recv()
    except EOFError:
        worker.process.join()
        return None
    return answer


def _work(answers: Connection, task: _Task, rank: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from raymill.proof.worker import take_part  # noqa: PLC0415 (the parent needs no PyTorch)

    try:
        ending = take_part(
            task.way,
            task.stint,
            rank=rank,
            folder=task.folder,
            store=task.store,
            seed=task.seed,
            kind=task.kind,
        )
        answers.send(ending)
    except (RuntimeError, ValueError) as error:  # of PyTorch's, also where another worker is lost
        answers.send(_Failure(f"{type(error).__name__}: {str(error).splitlines()[0]}"))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)

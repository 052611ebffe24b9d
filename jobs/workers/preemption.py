"""Notices that a worker, its node or the whole run will end soon, and the ranks' agreement on them.

A notice reaches one process; every rank acts on it at the end of the same step.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from functools import partial
from types import FrameType

import torch
import torch.distributed as dist

from cluster.storage.uris import Storage, StorageError
from jobs.run.storage_retry import patiently
from jobs.workers.worker_group import WorkerGroup

STOP_REQUESTED = "stop-requested"
"""A file in the run's storage: the launcher asks the run to save and stop, resumable."""

_LOCAL_POLL_S, _REMOTE_POLL_S = 0.5, 5.0


class Notice(IntEnum):
    """The larger one wins."""

    NONE = 0
    SAVE = 1  # a worker or its node may be gone soon: save, and continue as long as it lasts
    STOP = 2  # the run is asked to stop: save, and leave


class Notices:
    """Collects one worker's notices, and agrees on them with the other ranks."""

    def __init__(self, run: Storage, group: WorkerGroup, signals: Callable[[], object]) -> None:
        """`signals` returns another value once this process was warned of its end."""
        self._run, self._group, self._signals = run, group, signals
        self._heard = signals()
        self._stop_requested, self._closed = threading.Event(), threading.Event()
        if group.rank == 0:
            threading.Thread(target=self._look_for_request, name="notices", daemon=True).start()

    def ask(self) -> None:
        """Starts the exchange with the other ranks at the start of a step, which costs the step
        nothing. The news are those since the last exchange; a request to stop stays."""
        before, self._heard = self._heard, self._signals()
        notice = Notice.NONE if self._heard == before else Notice.SAVE
        if self._stop_requested.is_set():
            notice = Notice.STOP
        self._level = torch.tensor([int(notice)])  # on the host, so that no GPU is waited for
        self._work = (
            dist.all_reduce(self._level, dist.ReduceOp.MAX, async_op=True)
            if self._group.world_size > 1
            else None
        )

    def answer(self) -> Notice:
        """Returns the largest notice that any rank had at the start of the step."""
        if self._work is not None:
            with self._group.message():
                self._work.wait()
        return Notice(int(self._level))

    def close(self) -> None:
        self._closed.set()

    def _look_for_request(self) -> None:
        pause_s = _REMOTE_POLL_S if self._run.local_path("") is None else _LOCAL_POLL_S
        while not self._closed.wait(pause_s):
            with suppress(StorageError):  # an outage; a request is found after it
                if self._run.exists(STOP_REQUESTED):
                    self._stop_requested.set()
                    return


@contextmanager
def stopping_on_sigterm(run: Storage) -> Iterator[None]:
    """Turns SIGTERM to this process, the run's launcher, into a request to the workers to save and
    leave."""
    run.delete(STOP_REQUESTED)

    def request(signum: int, frame: FrameType | None) -> None:
        # In a thread: the code that a signal interrupts may hold a lock of the storage's client
        write = partial(run.write_bytes, STOP_REQUESTED, b"")
        threading.Thread(
            target=patiently, args=(write, "request to stop"), name="stop-request", daemon=True
        ).start()

    before = signal.signal(signal.SIGTERM, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

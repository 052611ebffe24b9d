"""Notices that a worker, its node or the whole run will end soon, and the ranks' agreement on them.

A notice reaches one process; every rank acts on it at the end of the same step.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from functools import partial
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist

from cluster.storage.uris import Storage, StorageError
from jobs.run.costs.budget import Budget
from jobs.run.storage_retry import patiently
from raymill.errors import LostPeerError
from raymill.workers.worker_group import WorkerGroup

STOP_REQUESTED = "stop-requested"
"""A file in the run's storage: the launcher asks the run to save and stop, resumable."""

_LOCAL_POLL_S, _REMOTE_POLL_S = 0.5, 5.0
_LAST_SAVE_S = (
    10.0  # that storing the last state may take, or half of the time that is left if that is less
)
AFTER_END_S = 15.0
"""After the announced end of a node that is still there, it is taken to stay."""

_WAIT_POLL_S = 0.5
_LEAVE_S = 0.5  # that a worker which leaves needs


class LeavingError(LostPeerError):
    """This worker leaves the others, as its node is about to go."""

    def __init__(self, text: str, *, gone_at_s: float) -> None:
        """`gone_at_s` is UNIX time."""
        super().__init__(text)
        self.gone_at_s = gone_at_s


class Signals(NamedTuple):
    """The end of a worker's process, as it is announced."""

    num_sigterms: int
    drained: object = None
    """The nodes that Ray knows to be drained."""
    end_s: float | None = None
    """UNIX time at which the first node goes, where the nodes of all workers are to go."""
    own_end_s: float | None = None
    """UNIX time at which this worker's node goes, where others stay."""


class Notice(IntEnum):
    """The larger one wins."""

    NONE = 0
    SAVE = 1  # a worker or its node may be gone soon: save, and continue as long as it lasts
    PART = 2  # a worker leaves, as its node goes before another step would be over
    LAST = (
        3  # all workers' nodes are about to go: save, and wait, as each further step would be lost
    )
    STOP = 4  # the run is asked to stop: save, and leave
    BUDGET = 5  # the run has cost what it may: save, and leave


class Notices:
    """Collects one worker's notices, and agrees on them with the other ranks."""

    def __init__(
        self,
        run: Storage,
        group: WorkerGroup,
        signals: Callable[[], Signals | None],
        budget: Budget | None = None,
    ) -> None:
        """`signals` returns another value once this process was warned of its end. `budget` is the
        run's, on rank 0."""
        self._run, self._group, self._signals = run, group, signals
        self._budget = budget
        self._heard = signals()
        self._asked_s = time.time()
        self._reserve_s = 0.0
        self._waited_for_s: float | None = None
        self.leaves_before_s: float | None = None
        """UNIX time at which this worker's node goes, where it leaves after the step that has begun."""
        self._stop_requested, self._closed = threading.Event(), threading.Event()
        if group.rank == 0:
            threading.Thread(target=self._look_for_request, name="notices", daemon=True).start()

    def ask(self) -> None:
        """Starts the exchange with the other ranks at the start of a step, which costs the step
        nothing. The news are those since the last exchange; a request to stop stays."""
        before, self._heard = self._heard, self._signals()
        now_s = time.time()
        step_s, self._asked_s = now_s - self._asked_s, now_s
        notice = Notice.NONE if self._heard == before else Notice.SAVE
        self.leaves_before_s = self._end_before_next(step_s)
        if self.leaves_before_s is not None:
            notice = Notice.PART
        if self._is_last_step(_end_s(before), step_s):
            notice = Notice.LAST
        if self._stop_requested.is_set():
            notice = Notice.STOP
        if self._budget is not None and self._budget.ends_with_this_step():
            notice = Notice.BUDGET
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
        notice = Notice(int(self._level))
        if notice is Notice.LAST:
            self._waited_for_s = _end_s(self._heard)
        return notice

    def wait_for_end(self, *, moves: Callable[[], None]) -> None:
        """Returns only if the nodes that were to go have stayed. Calls `moves` again and again."""
        end_s = (_end_s(self._heard) or time.time()) + AFTER_END_S
        while time.time() < end_s:
            moves()
            time.sleep(_WAIT_POLL_S)

    def _end_before_next(self, step_s: float) -> float | None:
        """Returns when this worker's node goes, if a step later than the one that begins would not be
        over before that."""
        now_s, end_s = self._asked_s, self._heard.own_end_s if self._heard else None
        if end_s is None or not now_s < end_s < now_s + 2 * step_s + _LEAVE_S:
            return None
        return end_s

    def _is_last_step(self, before_s: float | None, step_s: float) -> bool:
        """Says whether a step later than the one that begins would end too late for its state to be
        stored before all workers' nodes go."""
        now_s, end_s = self._asked_s, _end_s(self._heard)
        if end_s is None or now_s >= end_s or end_s == self._waited_for_s:
            return False
        if end_s != before_s:
            self._reserve_s = min(_LAST_SAVE_S, (end_s - now_s) / 2)
        return now_s + 2 * step_s > end_s - self._reserve_s

    def close(self) -> None:
        self._closed.set()

    def _look_for_request(self) -> None:
        pause_s = _REMOTE_POLL_S if self._run.local_path("") is None else _LOCAL_POLL_S
        while not self._closed.wait(pause_s):
            with suppress(StorageError):  # an outage; a request is found after it
                if self._run.exists(STOP_REQUESTED):
                    self._stop_requested.set()
                    return


def _end_s(signals: Signals | None) -> float | None:
    return signals.end_s if signals else None


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

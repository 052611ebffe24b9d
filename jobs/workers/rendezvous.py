"""Connects the workers of a group: at its start, and again whenever one of them was lost or comes
back.

They meet in rounds. A round is over once any worker has lost another one. The next one begins when
all have come whose seats are not vacant (`seats`): the workers that are left, with all that they
have loaded, and the replacement that Ray Train started where the lost one's node lives. Where a node
was lost they meet as fewer ranks, and once more when a worker has taken its seat.
"""

import gc
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from jobs.workers.failures import is_lost_peer, one_line
from jobs.workers.hang_watch import HangWatch
from jobs.workers.heartbeat import Pulse
from jobs.workers.new_meeting import new_meeting
from jobs.workers.preemption import AFTER_END_S, LeavingError
from jobs.workers.seats import Rounds, Seats
from jobs.workers.watchdog import Hang
from raymill.errors import OpenGroupError
from raymill.workers.worker_group import Meeting

_POLL_S = 0.02
# Of all waiting ranks together, which a TCPStore's one thread answers beside all else
_LOOK_UPS_PER_S = 20_000
_WATCH_S = 0.5
_GRACE_S = 1.0
_ABORT_S = 15.0  # the longest that an abort of 512 GPUs' connections may take
_CLOSING_TAG = 1 << 20  # of a message that nobody sends
# The number of fruitless rounds in a row, the last round, and why it ended
_FRUITLESS = "fruitless"
_RECONNECTED = {
    # 3, the default, ends every survivor at a network error; `_watch` aborts
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    # A failed message leaves the key "exception_dump" in the store of all rounds: each process that
    # starts later would take it for its own failure, and end 8 minutes after its first meeting.
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    # Else each failed message of a step holds up the abort for 60 s
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
}
"""Environment of workers whose group is connected again after a failure."""
# Of a message: all wait for one that waits for storage, or reads a large checkpoint
_TIMEOUT = timedelta(hours=6)


class FruitlessError(Exception):
    """The workers met too often without completing a step."""


def backend(*, use_gpu: bool) -> str:
    """Returns what carries messages: tensors on GPUs go over NCCL, and all else, as pickled values,
    over gloo."""
    return "cpu:gloo,cuda:nccl" if use_gpu else "gloo"


@contextmanager
def meeting_place(host: str) -> Iterator[str]:
    """Keeps the store through which the workers of a launch meet, while the context lasts; yields
    its address."""
    with socket.create_server((host, 0)) as listener:
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
            use_libuv=True,
        )
        yield f"{host}:{port}"
        del store


class Rendezvous:
    """One worker's connections to the others of its group, in the newest round that it has met."""

    rank: int
    seats: Sequence[int]
    """The seats of all ranks."""

    def __init__(
        self,
        address: str,
        *,
        group: str,
        seat: int,
        num_seats: int,
        use_gpu: bool = False,
        is_waiting: Callable[[], bool] = lambda: True,
        progress: Callable[[], int] = lambda: 0,
        max_fruitless: int = 6,
        pulse: Pulse | None = None,
        hang_timeout_s: float = 0.0,
    ) -> None:
        """`group` names the workers that Ray Train starts together, in seats 0 to `num_seats` - 1. One
        that comes later gets the same name, and the seat of a lost one or a new one. `is_waiting`
        reports whether the training thread waits for other workers. After `max_fruitless` rounds in
        a row without growth of the number `progress`, they meet no more. With `pulse` and a
        `hang_timeout_s` that is not 0 they judge together when all of them stand still, and whom
        they blame is ended through its pulse."""
        self._address, self._group = address, group
        self._store = self._open_store()
        self._seat, self._use_gpu = seat, use_gpu
        self.rank, self.seats = seat, range(num_seats)
        self._is_waiting, self._progress, self._max_fruitless = is_waiting, progress, max_fruitless
        self._pulse, self._hang_timeout_s = pulse, hang_timeout_s
        self._id = secrets.token_hex(8)
        self._has_met = False
        self._gone_at_s: float | None = None  # UNIX time, of a worker that has left
        self._table = Seats(self._store, num_seats)
        self._store.compare_set("round", "", "0")
        self._store.compare_set(_FRUITLESS, "", json.dumps({"round": -1, "count": 0, "reason": ""}))

    def _open_store(self) -> dist.Store:
        host, _, port = self._address.rpartition(":")
        return dist.PrefixStore(
            self._group, dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False)
        )

    def attend(self, work: Callable[[Meeting], object]) -> bool:
        """Meets the others and does the work with them. Returns False when one of them was lost, or
        comes back: then meet again. Returns True, without any work, where the others are done.

        One that leaves (`LeavingError`) has the others meet without it at once, where they would
        notice its end after seconds.

        Raises `FruitlessError`, in every rank, after too many meetings without progress."""
        met = self._meet()
        if met is None:
            return True
        meeting, left = met
        number = meeting.number
        before, reason = self._progress(), "another worker was lost"
        try:
            work(meeting)
        except OpenGroupError as error:
            self._end_process(one_line(str(error)))
        except LeavingError as error:
            reason, self._gone_at_s = str(error), error.gone_at_s
            self._say(reason)
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            reason = one_line(str(error))
            self._say(f"lost another worker and waits for it: {reason}")
        else:
            # A rank that left earlier would break connections that the others' last messages still
            # need; and rank 0 may be lost while it stores the common result, which its replacement
            # cannot make alone.
            if self._all(number, "done"):
                dist.destroy_process_group()
                return True
        finally:
            left.set()
        self._count(number, is_fruitless=self._progress() == before, reason=reason)
        if self._gone_at_s is not None:
            self._table.vacate([self._seat])
        self._table.end(number)
        gc.collect()  # the model and its buffers, which the error's traceback held
        # The abort gives the ranks that wait for this one's messages their error too.
        self._abort(meeting)
        self._within_bounds(dist.destroy_process_group)
        return False

    def _meet(self) -> tuple[Meeting, threading.Event] | None:
        """Returns the round, and the event that ends its watch; None where the others have met for
        the last time."""
        while True:
            number = self._table.round()
            if self._store.check([_by_all(number, "done")]):
                return None
            if not self._is_in(number):
                continue
            fruitless = json.loads(self._store.get(_FRUITLESS))
            if fruitless["count"] >= self._max_fruitless:
                raise FruitlessError(
                    f"the workers met {fruitless['count']} times in a row and completed no step; the last time: "
                    f"{fruitless['reason']}"
                )
            # Where this rank's predecessor took part in the round, the others may not have noticed
            # its end.
            if (
                self._store.compare_set(f"{number}/{self._seat}/came", "", self._id).decode()
                != self._id
            ):
                self._table.end(number)
                continue
            # Twice, because a worker that came may have died while it waited for the others.
            if self._all(number, "came") and self._all(number, "stayed"):
                self._has_met = True
                meeting, left = new_meeting(number), threading.Event()
                if self._connect(meeting, left):
                    return meeting, left

    def _is_in(self, number: int) -> bool:
        """Takes this worker's place in the round. Where that goes without its seat, it begins another
        one."""
        taken = self._table.taken(number)
        if self._seat not in taken:
            if self._gone_at_s is not None and time.time() < self._gone_at_s + AFTER_END_S:
                time.sleep(_WATCH_S)
            elif self._has_met:
                self._end_process("is in no meeting any more, as its node was lost or to go")
            else:
                self._table.take(self._seat)
            return False
        self.seats = sorted(taken)
        self.rank = self.seats.index(self._seat)
        HangWatch.enter(self._store, self.rank)
        return True

    def _all(self, number: int, what: str) -> bool:
        """Waits until every rank has said so; returns False when the round is over before that.

        A rank says so once in a round, as a replacement of one that came ends the round instead: so
        the ranks are counted, and the last one tells all. Thus a look costs two keys, for any
        number of ranks.
        """
        is_said, world_size = _by_all(number, what), len(self.seats)
        if self._store.add(f"{number}/{what}", 1) == world_size:
            self._store.set(is_said, "")
        pause_s = max(_POLL_S, 2 * world_size / _LOOK_UPS_PER_S)
        while not self._store.check([is_said]):
            if self._table.round() != number:
                return False
            time.sleep(pause_s)
        return True

    def _connect(self, meeting: Meeting, left: threading.Event) -> bool:
        if self._pulse:
            self._pulse.meeting = meeting
        threading.Thread(
            target=self._watch, args=(meeting, left), name="rendezvous", daemon=True
        ).start()
        os.environ |= _RECONNECTED
        ranks = range(len(self.seats))
        try:
            with meeting.progress.message(ranks):
                dist.init_process_group(
                    backend(use_gpu=self._use_gpu),
                    store=dist.PrefixStore(str(meeting.number), self._store),
                    rank=self.rank,
                    world_size=len(self.seats),
                    timeout=_TIMEOUT,
                    # With it NCCL connects here, and what keeps it from starting is found before
                    # anything is loaded.
                    device_id=torch.device("cuda", torch.cuda.current_device())
                    if self._use_gpu
                    else None,
                    _ranks=[*ranks],  # else the name of a group counts those that did not connect
                )
        except RuntimeError as error:  # one of the workers is already gone, or NCCL cannot start
            left.set()
            self._count(meeting.number, is_fruitless=True, reason=one_line(str(error)))
            self._table.end(meeting.number)
            return False
        return True

    def _watch(self, meeting: Meeting, left: threading.Event) -> None:
        """Gets this worker out of a round that is over, where it still waits: for a worker that
        died while they connected, for a message of NCCL's, which never ends by itself, or for one
        whose end gloo did not notice (a send to a killed worker, seen once in some tens of kills).
        Ends the round where all workers hang."""
        try:
            # Its own, because a store serves one caller at a time
            store, waits_since = self._open_store(), None
            rounds, hang_watch = Rounds(store), self._hang_watch(store, meeting)
            while not left.wait(_WATCH_S):
                if rounds.round() == meeting.number:
                    waits_since = None
                    if hang_watch and hang_watch.look():
                        rounds.end(meeting.number)
                    continue
                if hang_watch:
                    self._obey(hang_watch.verdict(), left)
                    hang_watch = None
                # Steps that wait for nobody are left here, when a worker comes: by all, as the first
                # one to look closes its connections
                meeting.ended.set()
                if len(self.seats) == 1:
                    return  # it has no message to abort
                if not self._is_waiting():
                    waits_since = None
                    continue
                waits_since = waits_since or time.monotonic()
                if time.monotonic() - waits_since <= _GRACE_S:
                    continue
                if meeting.aborted.is_set():
                    self._end_process("cannot leave a round that is over")
                self._abort(meeting)
                waits_since = None
        except RuntimeError as error:
            if not left.is_set():
                self._say(
                    f"no longer notices lost workers, as the launcher's meeting place is gone: {error}"
                )

    def _hang_watch(self, store: dist.Store, meeting: Meeting) -> HangWatch | None:
        if self._pulse is None or not self._hang_timeout_s or len(self.seats) == 1:
            return None
        return HangWatch(
            store,
            meeting,
            rank=self.rank,
            world_size=len(self.seats),
            beat=self._pulse.beat,
            hang_timeout_s=self._hang_timeout_s,
        )

    def _obey(self, hang: Hang | None, left: threading.Event) -> None:
        """Has this worker's watchdog end it where the verdict says so, and record the verdict where
        that ends none."""
        if hang is None or self._pulse is None or self.rank not in (hang.ended or hang.ranks[:1]):
            return
        self._pulse.hang = hang
        if self.rank in hang.ended and not left.wait(_ABORT_S):
            self._end_process(hang.reason)  # its watchdog is gone

    def _abort(self, meeting: Meeting) -> None:
        """Ends this worker's messages."""
        meeting.aborted.set()
        group = dist.group.WORLD
        if group is not None:
            self._within_bounds(group.abort)
            self._within_bounds(lambda: self._close_connections(group))

    def _close_connections(self, group: dist.ProcessGroup) -> None:
        """Ends the messages of this worker's host, which waits for others that live. Gloo's abort
        does nothing, but a receive that takes too long closes all of its connections: one from any
        rank whose connection is still open."""
        for rank in range(len(self.seats)):
            if rank == self.rank:
                continue
            # What that raises, or that the group is already gone
            with suppress(RuntimeError, ValueError):
                message = dist.irecv(torch.zeros(1), group=group, group_src=rank, tag=_CLOSING_TAG)
                if message is not None:
                    message.wait(timedelta(milliseconds=1))

    def _within_bounds(self, call: Callable[[], None]) -> None:
        """Calls what may hang, as NCCL's abort does at times (NVIDIA/nccl#1013): then this process
        ends."""
        thread = threading.Thread(target=call, name="abort", daemon=True)
        thread.start()
        thread.join(_ABORT_S)
        if thread.is_alive():
            self._end_process(f"could not abort its messages in {_ABORT_S:g} s")

    def _end_process(self, reason: str) -> NoReturn:
        self._say(f"{reason}: it ends, to be replaced")
        os._exit(1)

    def _say(self, what: str) -> None:
        sys.stderr.write(f"rank {self.rank} {what}\n")
        sys.stderr.flush()

    def _count(self, number: int, *, is_fruitless: bool, reason: str) -> None:
        """Counts each round once, before any rank ends it, so that all ranks of a later round read
        the same number. A backend that can never start fails every rank like a lost worker; only
        this count ends that."""
        before = self._store.get(_FRUITLESS).decode()
        last = json.loads(before)
        if last["round"] < number:
            count = last["count"] + 1 if is_fruitless else 0
            self._store.compare_set(
                _FRUITLESS, before, json.dumps({"round": number, "count": count, "reason": reason})
            )


def _by_all(number: int, what: str) -> str:
    return f"{number}/{what} by all"

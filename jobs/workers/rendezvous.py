"""Connects the workers of a group: at its start, and again whenever one of them was lost and replaced.

They meet in rounds. A round is over once any worker has lost another one. The next one begins when every rank has come:
the workers that are left, with all that they have loaded, and the replacement that Ray Train started.
"""

import gc
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from jobs.workers.failures import is_lost_peer, one_line

_POLL_S = 0.02
_WATCH_S = 0.5
_GRACE_S = 1.0
_FRUITLESS = "fruitless"  # the number of fruitless rounds in a row, the last round, and why it ended
_TIMEOUT = timedelta(minutes=30)  # of a message; in an outage, all ranks wait for the one that waits for the storage


class FruitlessError(Exception):
    """The workers met too often without completing a step."""


@contextmanager
def meeting_place(host: str) -> Iterator[str]:
    """Keeps the store through which the workers of a launch meet, while the context lasts; yields its address."""
    with socket.create_server((host, 0)) as listener:
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
        )
        yield f"{host}:{port}"
        del store


class Rendezvous:
    """One worker's connections to the others of its group."""

    def __init__(
        self,
        address: str,
        *,
        group: str,
        rank: int,
        world_size: int,
        backend: str,
        is_waiting: Callable[[], bool] = lambda: True,
        progress: Callable[[], int] = lambda: 0,
        max_fruitless: int = 6,
    ) -> None:
        """`group` names the workers that Ray Train starts together, and a lost worker's replacement gets the same name.
        `is_waiting` reports whether the training thread waits for other workers. After `max_fruitless` rounds in a row
        without growth of the number `progress`, they meet no more."""
        self._address, self._group = address, group
        self._store = self._open_store()
        self._rank, self._world_size, self._backend = rank, world_size, backend
        self._is_waiting, self._progress, self._max_fruitless = is_waiting, progress, max_fruitless
        self._id = secrets.token_hex(8)
        self._store.compare_set("round", "", "0")
        self._store.compare_set(_FRUITLESS, "", json.dumps({"round": -1, "count": 0, "reason": ""}))

    def _open_store(self) -> dist.Store:
        host, _, port = self._address.rpartition(":")
        return dist.PrefixStore(self._group, dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False))

    def attend(self, work: Callable[[], None]) -> bool:
        """Meets the others and does the work with them. Returns False when one of them was lost: then meet again.

        Raises `FruitlessError`, in every rank, after too many meetings without progress."""
        number, left = self._meet()
        before, reason = self._progress(), "another worker was lost"
        try:
            work()
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            reason = one_line(str(error))
            sys.stderr.write(f"rank {self._rank} lost another worker and waits for it: {reason}\n")
        else:
            # A rank that left earlier would break connections that the others' last messages still need; and rank 0
            # may be lost while it stores the common result, which its replacement cannot make alone.
            if self._all(number, "done"):
                dist.destroy_process_group()
                return True
        finally:
            left.set()
        self._count(number, is_fruitless=self._progress() == before, reason=reason)
        self._end(number)
        gc.collect()  # the model and its buffers, which the error's traceback held
        # The abort gives the ranks that wait for this one's messages their error too.
        group = dist.group.WORLD
        assert group is not None
        group.abort()
        dist.destroy_process_group()
        return False

    def _meet(self) -> tuple[int, threading.Event]:
        """Returns the number of the round, and the event that ends its watch."""
        while True:
            number = int(self._store.get("round"))
            fruitless = json.loads(self._store.get(_FRUITLESS))
            if fruitless["count"] >= self._max_fruitless:
                raise FruitlessError(
                    f"the workers met {fruitless['count']} times in a row and completed no step; the last time: "
                    f"{fruitless['reason']}"
                )
            # Where this rank's predecessor took part in the round, the others may not have noticed its end.
            if self._store.compare_set(f"{number}/{self._rank}/came", "", self._id).decode() != self._id:
                self._end(number)
                continue
            # Twice, because a worker that came may have died while it waited for the others.
            if self._all(number, "came") and self._all(number, "stayed") and (left := self._connect(number)):
                return number, left

    def _all(self, number: int, what: str) -> bool:
        """Waits until every rank has said so; returns False when the round is over before that."""
        self._store.set(f"{number}/{self._rank}/{what}", self._id)
        places = [f"{number}/{rank}/{what}" for rank in range(self._world_size)]
        while not self._store.check(places):
            if int(self._store.get("round")) != number:
                return False
            time.sleep(_POLL_S)
        return True

    def _connect(self, number: int) -> threading.Event | None:
        store, left = dist.PrefixStore(str(number), self._store), threading.Event()
        rank, world_size = self._rank, self._world_size
        threading.Thread(target=self._watch, args=(number, left), name="rendezvous", daemon=True).start()
        try:
            dist.init_process_group(self._backend, store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)
        except RuntimeError as error:  # one of the workers is already gone
            left.set()
            self._count(number, is_fruitless=True, reason=one_line(str(error)))
            self._end(number)
            return None
        return left

    def _watch(self, number: int, left: threading.Event) -> None:
        """Gets this worker out of a round that is over, where it still waits: for a worker that died while they
        connected, or for a message whose end gloo did not notice (a send to a killed worker, seen once in some tens of
        kills)."""
        store, waits_since = self._open_store(), None  # its own, because a store serves one caller at a time
        has_aborted = False
        while not left.wait(_WATCH_S):
            if int(store.get("round")) == number or not self._is_waiting():
                waits_since = None
                continue
            waits_since = waits_since or time.monotonic()
            waited_s = time.monotonic() - waits_since
            if waited_s > _GRACE_S and not has_aborted and dist.group.WORLD is not None:
                has_aborted = True
                dist.group.WORLD.abort()
            if waited_s > 2 * _GRACE_S:
                sys.stderr.write(f"rank {self._rank} cannot leave a round that is over: it ends, to be replaced\n")
                os._exit(1)

    def _count(self, number: int, *, is_fruitless: bool, reason: str) -> None:
        """Counts each round once, before any rank ends it, so that all ranks of a later round read the same number.
        A backend that can never start fails every rank like a lost worker; only this count ends that."""
        before = self._store.get(_FRUITLESS).decode()
        last = json.loads(before)
        if last["round"] < number:
            count = last["count"] + 1 if is_fruitless else 0
            self._store.compare_set(_FRUITLESS, before, json.dumps({"round": number, "count": count, "reason": reason}))

    def _end(self, number: int) -> None:
        self._store.compare_set("round", str(number), str(number + 1))

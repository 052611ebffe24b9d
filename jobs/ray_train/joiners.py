"""Starts workers in vacant and new seats while the others train: each in a thread, as a process needs
seconds until it has loaded what it trains with."""

import sys
import threading
import time
from collections.abc import Callable

from ray.exceptions import RayError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.worker_group.execution_group import ReplicaGroup

from jobs.ray_train.seated_group import NoPlaceError, SeatedGroup
from jobs.workers.failures import one_line

_AGAIN_S = 5.0  # after one that did not come


class Joiners:
    """The workers that are being started for a group. All methods are called by Ray Train's
    controller."""

    def __init__(self, group: SeatedGroup, give_up: Callable[[int], None]) -> None:
        """`give_up` is told of a seat whose worker did not come: it may have begun to meet the
        others. It is called in any thread."""
        self._group, self._give_up = group, give_up
        self._lock = threading.Lock()
        self._starting: set[int] = set()
        self._started: dict[int, ReplicaGroup] = {}
        self._not_before_s = 0.0

    @property
    def seats(self) -> set[int]:
        """The seats of the workers that are not yet part of the group."""
        with self._lock:
            return self._starting.union(self._started)

    @property
    def may_start(self) -> bool:
        return time.monotonic() >= self._not_before_s

    def start(self, seat: int) -> None:
        with self._lock:
            self._starting.add(seat)
        threading.Thread(
            target=self._start, args=(seat,), name=f"joiner {seat}", daemon=True
        ).start()

    def _start(self, seat: int) -> None:
        started = None
        try:
            started = self._group.start_in(seat)
        except (NoPlaceError, RayError, WorkerGroupStartupFailedError) as error:
            sys.stderr.write(f"no worker came to seat {seat}: {one_line(str(error))}\n")
        finally:
            if started is None:
                self._give_up(seat)
                self._not_before_s = time.monotonic() + _AGAIN_S
            with self._lock:
                self._starting.discard(seat)
                if started is not None:
                    self._started[seat] = started

    def take_in(self) -> set[int]:
        """Makes the joined workers a part of the group, new seats in their order. Returns their
        seats. One in front of which no worker came begins anew in that seat."""
        taken, behind_none = set(), []
        with self._lock:
            for seat in sorted(self._started):
                num_seats = len(self._group.get_workers())
                if seat <= num_seats:
                    self._group.seat(seat, self._started.pop(seat))
                    taken.add(seat)
                elif self._starting.isdisjoint(range(num_seats, seat)):
                    del self._started[seat]
                    behind_none.append(seat)
        for seat in behind_none:
            self._give_up(seat)
        return taken

"""Borrows workers of a training run while replicas find no room, and gives them back once those replicas are gone.

The run shrinks, the replicas start in its room, and it grows again afterwards (`cluster.storage.lending`). A loan is
renewed while it is needed, so an endpoint that dies does not keep it for long.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

from ray import serve

from cluster.storage.lending import Loan, give_back, lend
from cluster.storage.uris import Storage

BORROW_AFTER_S = 15.0  # without room; a replica starts faster than that
LOAN_S = 60.0
RENEW_S = 20.0
POLL_S = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seen:
    """The endpoint's current replicas."""

    num_wanted: int  # running or about to start
    num_placed: int  # with a process, including those that are leaving


@dataclass(frozen=True)
class Borrowed:
    """The workers on loan. One worker makes room for one replica."""

    num_workers: int = 0
    num_own: int = 0  # replicas that had room before the loan, or must find it without one
    waiting_since_s: float | None = None  # since when replicas wait for room


def decide(borrowed: Borrowed, seen: Seen, *, now_s: float, min_replicas: int) -> Borrowed:
    """Borrows for replicas that have waited for room for `BORROW_AFTER_S`. A worker is returned when its replica is
    gone, not when it is about to leave. The `min_replicas` must find room without a loan, which would never end."""
    since_s = now_s if borrowed.waiting_since_s is None else borrowed.waiting_since_s
    waiting_since_s = since_s if seen.num_wanted > seen.num_placed else None
    num_own = borrowed.num_own if borrowed.num_workers else max(seen.num_placed, min_replicas)
    needed = max(0, max(seen.num_wanted, seen.num_placed) - num_own)
    is_late = waiting_since_s is not None and now_s - waiting_since_s >= BORROW_AFTER_S
    return Borrowed(needed if is_late else min(borrowed.num_workers, needed), num_own, waiting_since_s)


@dataclass(eq=False)
class Borrower:
    """Acts on `decide` from its own thread, since a storage may take long to answer."""

    run: Storage
    _: KW_ONLY
    min_replicas: int
    look: Callable[[], Seen]
    clock: Callable[[], float] = time.monotonic
    borrowed = Borrowed()
    _lent_s = 0.0

    def step(self) -> None:
        """Acts once. What fails is tried again the next time. A loan is also renewed while the number of replicas is
        unknown, because the replicas that it made room for continue to serve."""
        now_s, before = self.clock(), self.borrowed
        try:
            if before.num_workers and now_s - self._lent_s >= RENEW_S:
                self._lend(before.num_workers)
            seen = self.look()
            decided = decide(before, seen, now_s=now_s, min_replicas=self.min_replicas)
            if decided.num_workers != before.num_workers:
                self._lend(decided.num_workers)
                _log.warning("%d workers of %s are borrowed: %s", decided.num_workers, self.run.uri, seen)
            self.borrowed = decided
        except Exception as error:
            # Ray Serve's controller is being replaced; the application is being redeployed and missing in status()
            # (KeyError); a storage does not answer. Whatever it is, a thread that ended would never renew a loan again.
            _log.warning("no workers are borrowed or given back now", exc_info=error)

    def _lend(self, num_workers: int) -> None:
        if num_workers:
            lend(self.run, Loan(num_workers, LOAN_S))
            self._lent_s = self.clock()
        else:
            give_back(self.run)

    def step_forever(self) -> None:
        def run() -> None:
            while True:
                time.sleep(POLL_S)
                self.step()

        threading.Thread(target=run, name="borrower", daemon=True).start()


def num_wanted_replicas(application: str) -> int:
    """Returns how many replicas Ray Serve has running, starting, or waiting for room."""
    states = serve.status().applications[application].deployments["Replica"].replica_states
    return sum(count for state, count in states.items() if state != "STOPPING")

"""Workers of a training run, borrowed while replicas find no place, and given back once those are gone.

The run shrinks, the replicas start in its place, and it grows again afterwards (`cluster.storage.lending`). A loan is
renewed as long as it is needed, so an endpoint that dies keeps nothing for long.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray import serve

from cluster.storage.lending import Loan, give_back, lend
from cluster.storage.uris import Storage

LOAN_S = 60.0
RENEW_S = 20.0
POLL_S = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seen:
    """The endpoint's replicas now."""

    num_wanted: int  # that run or are to start
    num_placed: int  # that have a process, those that leave included


@dataclass(frozen=True)
class Borrowed:
    """One worker makes room for one replica."""

    num_workers: int = 0
    num_own: int = 0  # replicas that had a place before, or have to have one
    waiting_since_s: float | None = None  # replicas for a place


def decide(borrowed: Borrowed, seen: Seen, *, now_s: float, after_s: float, min_replicas: int) -> Borrowed:
    """Borrows for replicas that have waited for a place for `after_s`. A worker is returned when its replica has gone,
    not when it is to go. The `min_replicas` have to find a place without it, as nobody would ever return theirs."""
    since_s = now_s if borrowed.waiting_since_s is None else borrowed.waiting_since_s
    waiting_since_s = since_s if seen.num_wanted > seen.num_placed else None
    num_own = borrowed.num_own if borrowed.num_workers else max(seen.num_placed, min_replicas)
    needed = max(0, max(seen.num_wanted, seen.num_placed) - num_own)
    is_late = waiting_since_s is not None and now_s - waiting_since_s >= after_s
    return Borrowed(needed if is_late else min(borrowed.num_workers, needed), num_own, waiting_since_s)


class Borrower:
    """Acts on it, from a thread of its own, as a storage may take long to answer."""

    def __init__(
        self,
        run: Storage,
        *,
        after_s: float,
        min_replicas: int,
        look: Callable[[], Seen],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._after_s = after_s
        self._min_replicas = min_replicas
        self._look = look
        self._clock = clock
        self._borrowed = Borrowed()
        self._lent_s = 0.0
        self._num_failures = 0
        self._last_failure = ""

    def status(self) -> dict[str, Any]:
        """For people."""
        failures = {"num_failures": self._num_failures, "last_failure": self._last_failure}
        return {"num_workers": self._borrowed.num_workers, **failures}

    def step(self) -> None:
        """What fails is tried again the next time. A loan is renewed also while nobody knows how many replicas there
        are, as those that were placed by it serve on."""
        try:
            self._step()
        except Exception as error:
            # Ray Serve's controller is being replaced; the application is being deployed again, and status() has none
            # (KeyError); a storage does not answer. Whatever it is, a thread that ends would never renew a loan again.
            self._num_failures += 1
            self._last_failure = f"{type(error).__name__}: {error}"
            _log.warning("no workers are borrowed or given back now, failure %d", self._num_failures, exc_info=error)

    def _step(self) -> None:
        now_s, before = self._clock(), self._borrowed
        if before.num_workers and now_s - self._lent_s >= RENEW_S:
            lend(self._run, Loan(before.num_workers, LOAN_S))
            self._lent_s = now_s
        seen = self._look()
        decided = decide(before, seen, now_s=now_s, after_s=self._after_s, min_replicas=self._min_replicas)
        if decided.num_workers != before.num_workers:
            if decided.num_workers:
                lend(self._run, Loan(decided.num_workers, LOAN_S))
                self._lent_s = now_s
            else:
                give_back(self._run)
            _log.warning("%d workers of %s are borrowed: %s", decided.num_workers, self._run.uri, seen)
        self._borrowed = decided

    def step_forever(self) -> None:
        def run() -> None:
            while True:
                time.sleep(POLL_S)
                self.step()

        threading.Thread(target=run, name="borrower", daemon=True).start()


def num_wanted_replicas(application: str) -> int:
    """As Ray Serve has it: those that run, start, or wait for a place."""
    states = serve.status().applications[application].deployments["Replica"].replica_states
    return sum(count for state, count in states.items() if state != "STOPPING")

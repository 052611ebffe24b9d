"""Workers that a run lends for a while: a record in its storage, written by who borrows and looked at by the run.

A loan ends by itself, so a borrower that is gone keeps nothing. The run counts by its own monotonic clock from when it
first saw the loan: no two machines' clocks are compared.
"""

import json
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from cluster.storage.uris import NotFoundError, Storage, StorageError

LENT_FILE = "lent.json"
POLL_S = 1.0


@dataclass(frozen=True)
class Loan:
    num_workers: int
    for_s: float
    loan_id: str = field(default_factory=lambda: secrets.token_hex(8))  # a renewal is a new one


def lend(run: Storage, loan: Loan) -> None:
    """In the place of any loan before. The run keeps its `scaling.min_workers` whatever is asked for."""
    run.write_bytes(LENT_FILE, json.dumps(asdict(loan)).encode())


def give_back(run: Storage) -> None:
    """After what ran in the workers' place has ended: the run grows into it again."""
    run.delete(LENT_FILE)


def read_loan(run: Storage) -> Loan | None:
    try:
        return Loan(**json.loads(run.read_bytes(LENT_FILE)))
    except NotFoundError:
        return None


class Lender:
    """The run's side: how many of its workers are lent now."""

    def __init__(self, run: Storage, clock: Callable[[], float] = time.monotonic) -> None:
        self._run = run
        self._clock = clock
        self._loan: Loan | None = None
        self._seen_s = 0.0

    def look(self) -> None:
        """Reads the record; during an outage of the storage what was read last holds."""
        try:
            loan = read_loan(self._run)
        except StorageError:
            return
        if loan != self._loan:
            self._loan, self._seen_s = loan, self._clock()

    def num_lent(self) -> int:
        is_over = self._loan is None or self._clock() - self._seen_s >= self._loan.for_s
        return 0 if is_over or self._loan is None else self._loan.num_workers

    def look_forever(self) -> None:
        """From a thread of its own, as a storage may take long to answer."""

        def look() -> None:
            while True:
                self.look()
                time.sleep(POLL_S)

        threading.Thread(target=look, name="lender", daemon=True).start()

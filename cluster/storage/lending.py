"""Workers that a run lends for a while: a record in its storage that the borrower writes and the
run reads.

A loan ends by itself, so a lost borrower keeps nothing. The run counts by its own monotonic clock
from when it first saw the loan: no two machines' clocks are compared.
"""

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import NoReturn

from cluster.storage.uris import Storage, StorageError

LENT_FILE = "lent.json"
POLL_S = 1.0


@dataclass(frozen=True)
class Loan:
    num_workers: int
    for_s: float
    # A renewal is a new loan, even of the same size and time.
    loan_id: str = field(default_factory=lambda: secrets.token_hex(8))


def lend(run: Storage, loan: Loan) -> None:
    """Replaces any earlier loan. The run keeps its `scaling.min_workers` even if more is asked
    for."""
    run.write_bytes(LENT_FILE, json.dumps(asdict(loan)).encode())


def give_back(run: Storage) -> None:
    """Ends the loan, once what replaced the workers has ended: the run grows again."""
    run.delete(LENT_FILE)


def read_loan(run: Storage) -> Loan | None:
    content = run.find_bytes(LENT_FILE)
    return None if content is None else Loan(**json.loads(content))


class Lender:
    """The run's view of the loan: how many of its workers are lent now."""

    def __init__(self, run: Storage, clock: Callable[[], float] = time.monotonic) -> None:
        self._run = run
        self._clock = clock
        self._loan: Loan | None = None
        self._seen_s = 0.0

    def look(self) -> None:
        """Reads the record; during an outage of the storage the last one holds."""
        try:
            loan = read_loan(self._run)
        except StorageError:
            return
        if loan != self._loan:
            self._loan, self._seen_s = loan, self._clock()

    def num_lent(self) -> int:
        if self._loan is None or self._clock() - self._seen_s >= self._loan.for_s:
            return 0
        return self._loan.num_workers

    def look_forever(self) -> NoReturn:
        """Looks in a thread of its own, as a storage may take long to answer."""
        while True:
            self.look()
            time.sleep(POLL_S)

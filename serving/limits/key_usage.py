"""The use of keys, as one replica knows it: here, and on the others as of the coordinator's last
answer."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from serving.limits.token_bucket import Debt
from serving.limits.usage_report import Account, UsageAnswer, UsageReport

# Without an answer of the coordinator (ten are due), after which a replica goes by its share
ALONE_S = 5.0


class KeyUsage:
    """The running requests and the debts of each name. All methods run in one event loop.

    While the coordinator answers, a replica adds what it does itself to what it was told. A replica
    that is alone takes the other ones for as busy as itself: of running requests it admits its
    share, and what is charged here counts once for each replica that there was.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running: Counter[str] = Counter()
        self._elsewhere: Mapping[str, int] = {}
        self._debts: dict[Account, Debt] = {}
        self._charges_s: dict[Account, float] = {}  # that are in no report that was answered
        self._num_reports = 0
        self._answered = 0
        self._answered_s = clock()
        self._num_replicas = 1

    @property
    def is_alone(self) -> bool:
        return self._clock() - self._answered_s >= ALONE_S

    @property
    def weight(self) -> int:
        """How often a charge here counts."""
        return self._num_replicas if self.is_alone else 1

    def share_of(self, limit: int) -> int:
        """Returns the part of a limit that is this replica's to give: all of it, unless it is
        alone."""
        return math.ceil(limit / self._num_replicas) if self.is_alone else limit

    def num_here(self, name: str) -> int:
        return self._running[name]

    def num_elsewhere(self, name: str) -> int:
        """Returns the number of requests that run on the other replicas."""
        return 0 if self.is_alone else self._elsewhere.get(name, 0)

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Counts one more request of this name during the context."""
        self._running[name] += 1
        try:
            yield
        finally:
            self._running[name] -= 1

    def debt_s(self, account: Account) -> float:
        debt = self._debts.get(account)
        return 0.0 if debt is None else debt.left_s(self._clock())

    def charge(self, account: Account, seconds: float) -> None:
        """Takes so much from a bucket, or gives it back if it is negative."""
        now_s = self._clock()
        self._debts.setdefault(account, Debt(now_s=now_s)).add(seconds, now_s=now_s)
        self._charges_s[account] = self._charges_s.get(account, 0.0) + seconds

    @property
    def has_news(self) -> bool:
        """Whether the coordinator lacks something that would outlive this replica."""
        return bool(self._charges_s)

    def report(self) -> UsageReport:
        now_s = self._clock()
        self._num_reports += 1
        left_s = {account: debt.left_s(now_s) for account, debt in self._debts.items()}
        return UsageReport(
            number=self._num_reports,
            answered=self._answered,
            is_alone=self.is_alone,
            running={name: number for name, number in self._running.items() if number},
            charges_s=dict(self._charges_s),
            debts_s={account: seconds for account, seconds in left_s.items() if seconds},
        )

    def adopt(self, answer: UsageAnswer, report: UsageReport, *, asked_at_s: float) -> None:
        """Takes over the coordinator's answer to a report of `asked_at_s`. What was charged since
        then comes on top."""
        now_s = self._clock()
        later_s = {
            account: seconds - report.charges_s.get(account, 0.0)
            for account, seconds in self._charges_s.items()
            if seconds != report.charges_s.get(account)
        }
        self._debts = {
            account: Debt(seconds, now_s=asked_at_s) for account, seconds in answer.debts_s.items()
        }
        for account, seconds in later_s.items():
            self._debts.setdefault(account, Debt(now_s=now_s)).add(seconds, now_s=now_s)
        self._charges_s = later_s
        self._elsewhere = answer.elsewhere
        self._num_replicas = answer.num_replicas
        self._answered, self._answered_s = report.number, now_s

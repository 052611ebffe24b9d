"""Sums up what the keys use on all replicas: the coordinator's part of the limits. It is in no
storage, since replicas report their debts with every report, and a coordinator that starts anew has
them back with the first ones."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from serving.limits.token_bucket import Debt
from serving.limits.usage_report import Account, UsageAnswer, UsageReport

LOST_S = 5.0  # without a report, after which a replica's requests no longer count as running
FORGET_S = 3600.0  # after which a replica is as good as a new one


@dataclass(frozen=True)
class LastReport:
    """A replica's last report, and when it came."""

    at_s: float
    report: UsageReport


class UsageBoard:
    """The reports of all replicas. A replica that dies takes its running requests with it; what
    it has charged stays."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: dict[str, LastReport] = {}  # by replica
        self._debts: dict[Account, Debt] = {}

    def exchange(self, replica: str, report: UsageReport) -> UsageAnswer:
        """Counts a report, and returns what the replica is to know of all others."""
        now_s = self._clock()
        last = self._last.get(replica)
        if last is None or report.number >= last.report.number:  # an older one was overtaken
            if last is None or report.is_alone:
                self._believe(report.debts_s, now_s)
            else:
                self._count(report, last.report, now_s)
            self._last[replica] = LastReport(now_s, report)
        self._forget(now_s)
        return self._answer(replica, now_s)

    def _believe(self, debts_s: Mapping[Account, float], now_s: float) -> None:
        """Takes over the debts that a replica knows, of which the greatest is nearest to the
        truth."""
        for account, seconds in debts_s.items():
            self._debt(account, now_s).raise_to(seconds, now_s=now_s)

    def _count(self, report: UsageReport, last: UsageReport, now_s: float) -> None:
        """Adds what a replica has charged. If it has had no answer to its last report, that one's
        charges are in this one again."""
        counted: Mapping[Account, float] = {} if report.answered == last.number else last.charges_s
        for account, seconds in report.charges_s.items():
            self._debt(account, now_s).add(seconds - counted.get(account, 0.0), now_s=now_s)

    def _debt(self, account: Account, now_s: float) -> Debt:
        return self._debts.setdefault(account, Debt(now_s=now_s))

    def _forget(self, now_s: float) -> None:
        self._last = {
            name: last for name, last in self._last.items() if now_s - last.at_s < FORGET_S
        }
        self._debts = {
            account: debt for account, debt in self._debts.items() if debt.left_s(now_s) > 0
        }

    def _answer(self, replica: str, now_s: float) -> UsageAnswer:
        elsewhere: Counter[str] = Counter()
        num_replicas = 0
        for name, last in self._last.items():
            if now_s - last.at_s >= LOST_S:
                continue
            num_replicas += 1
            if name != replica:
                elsewhere.update(last.report.running)
        debts_s = {account: debt.left_s(now_s) for account, debt in self._debts.items()}
        return UsageAnswer(num_replicas, dict(elsewhere), debts_s)

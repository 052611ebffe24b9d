"""Which steps an audit takes again: intervals between kept checkpoints, drawn by lot.

Who forged the record cannot know which intervals are drawn: the head fixes the record before, and the
nonce comes after it.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from jobs.run.ledger import Ledger
from jobs.training.guards import GuardState


@dataclass(frozen=True)
class Interval:
    """The steps from one kept checkpoint, or the start, to the next."""

    first: int
    last: int

    @property
    def num_steps(self) -> int:
        return self.last - self.first + 1


def intervals_of(ledger: Ledger, kept_steps: Sequence[int]) -> list[Interval]:
    """Returns the intervals that can be computed again: each ends at a kept checkpoint. Steps that
    a rollback left out are no part of them."""
    steps = _steps_that_count(ledger)
    is_left_out = GuardState(rollbacks=ledger.rollbacks).leaves_out
    ends = {step for step in kept_steps if not is_left_out(step)}
    intervals: list[Interval] = []
    for before, end in pairwise(sorted({0, *ends})):
        first, behind = bisect_right(steps, before), bisect_right(steps, end)
        if first < behind:
            intervals.append(Interval(steps[first], steps[behind - 1]))
    return intervals


def steps_behind(ledger: Ledger, intervals: Sequence[Interval]) -> list[int]:
    """Returns the steps that no interval has: those behind the last kept checkpoint."""
    last = max((interval.last for interval in intervals), default=0)
    return [step for step in _steps_that_count(ledger) if step > last]


def _steps_that_count(ledger: Ledger) -> list[int]:
    is_left_out = GuardState(rollbacks=ledger.rollbacks).leaves_out
    lines = ledger.standing.lines
    recorded = {line["step"] for line in lines if line.get("event") in (None, "skip")}
    return sorted(step for step in recorded if not is_left_out(step))


def drawn_by_lot(
    intervals: Sequence[Interval], num_samples: int, *, head: str, nonce: str
) -> list[Interval]:
    """Returns different intervals, all of them where there are no more: those with the smallest
    hashes. So a larger sample begins with the smaller one."""

    def lot(interval: Interval) -> bytes:
        text = f"{head} {nonce} {interval.first} {interval.last}"
        return hashlib.sha256(text.encode()).digest()

    return sorted(intervals, key=lot)[:num_samples]


def chance_unseen(num_intervals: int, num_forged: int, num_samples: int) -> float:
    """Returns the probability that none of the forged intervals was drawn (the hypergeometric
    distribution at 0)."""
    num_drawn = min(num_samples, num_intervals)
    ways = math.comb(num_intervals - num_forged, num_drawn)
    return ways / math.comb(num_intervals, num_drawn)

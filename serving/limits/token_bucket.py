"""A token bucket (RFC 2697), counted by the seconds that it takes to fill up again.

What is missing from a bucket, divided by the rate at which it refills, sinks by one second each
second, whatever the quota is. ITU-T I.371 counts its GCRA in this way. So a place that sums up what
several replicas have spent needs no quota, and a key whose quota changes keeps the share of it that
is used up.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Quota:
    """A bucket that holds `amount`, and refills evenly within `window_s`."""

    amount: int
    window_s: float

    def seconds_of(self, amount: float) -> float:
        """Returns the seconds that it takes to refill this amount."""
        return amount / self.amount * self.window_s

    def wait_s(self, debt_s: float, amount: float) -> float:
        """Returns the seconds until the bucket, from which `debt_s` is missing now, holds `amount`:
        0 if it does, and infinity if it never will."""
        if amount > self.amount:
            return math.inf
        return max(0.0, debt_s + self.seconds_of(amount) - self.window_s)


class Debt:
    """The deficit of a bucket, in seconds. It may exceed the whole bucket."""

    def __init__(self, left_s: float = 0.0, *, now_s: float) -> None:
        self._left_s = left_s
        self._at_s = now_s

    def left_s(self, now_s: float) -> float:
        return max(0.0, self._left_s - (now_s - self._at_s))

    def add(self, seconds: float, *, now_s: float) -> None:
        """Takes so much from the bucket, or gives it back if it is negative; more than full it is
        never."""
        self._left_s = max(0.0, self.left_s(now_s) + seconds)
        self._at_s = now_s

    def raise_to(self, seconds: float, *, now_s: float) -> None:
        """Lets at least so much be missing."""
        self._left_s = max(self.left_s(now_s), seconds)
        self._at_s = now_s

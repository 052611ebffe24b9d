"""Decides how many replicas the load needs: by requests, by waiting sequences, and by the use of
the KV cache.

Ray Serve calls `ScalingPolicy` ten times a second and starts or drains replicas. It sends this
module to its controller by value, so the module imports nothing of ours.

Ray Serve's own delays are zero. After `downscale_delay_s` it would shrink to what that one moment
needs (on the tests' day it grew again within a minute 16 times instead of 4), and it would end the
last of several replicas after both of its delays, one after the other.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ray.serve.config import AutoscalingContext

WAITING, KV_USE = "waiting", "kv_use"  # the figures that a replica reports
TARGET_KV_USE = 0.8


@dataclass(frozen=True)
class Wanted:
    """The number of replicas that the load has needed from `since_s` on, until the next entry of
    the history."""

    since_s: float
    num_replicas: int


History = tuple[Wanted, ...]


@dataclass(frozen=True)
class ScalingPolicy:
    """Ray Serve's policy, with the names of the endpoint's settings. Ray Serve itself keeps to the
    bounds."""

    target_ongoing_requests: float  # of a replica
    scale_up_after_s: float  # of load that needs more
    scale_down_after_s: float  # of load that needs less
    scale_to_zero_after_s: float  # without any request

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        history = context.policy_state.get("history", ())
        wanted = self.wanted_replicas(context)
        target, history = self.decide(
            wanted, context.target_num_replicas, history, now_s=time.monotonic()
        )
        return target, {"history": history}

    def wanted_replicas(self, context: AutoscalingContext) -> int:
        """Returns how many replicas the current load needs."""
        reported = context.aggregated_metrics or {}
        waiting, kv_use = (sum(reported.get(name, {}).values()) for name in (WAITING, KV_USE))
        by_requests = context.total_num_requests / self.target_ongoing_requests
        by_sequences = (kv_use + waiting) / TARGET_KV_USE
        # Averages over a few seconds never quite reach 0, for which a replica would be kept.
        return math.ceil(max(by_requests, by_sequences) - 1e-3)

    def decide(
        self, wanted: int, num_replicas: int, history: History, *, now_s: float
    ) -> tuple[int, History]:
        """Returns the number of replicas to have now, and the history for the next call. It grows
        once the load has needed more for `scale_up_after_s`, to what was needed all that time. It
        shrinks once the load has needed fewer for `scale_down_after_s`, to the most that was needed
        in that time: a burst that returns soon finds its replicas."""
        if history and history[-1].since_s > now_s:  # of another controller's clock
            history = ()
        if not history or history[-1].num_replicas != wanted:
            history = (*history, Wanted(now_s, wanted))
        up = min(_in_the_last(self.scale_up_after_s, history, now_s), default=num_replicas)
        down = max(_in_the_last(self.scale_down_after_s, history, now_s), default=num_replicas)
        if down == 0 and history[-1].since_s > now_s - self.scale_to_zero_after_s:
            down = 1
        oldest_s = now_s - max(self.scale_up_after_s, self.scale_down_after_s)
        history = tuple(w for w, end_s in _with_ends(history) if end_s > oldest_s)
        return max(min(num_replicas, down), up), history


def _in_the_last(seconds: float, history: History, now_s: float) -> list[int]:
    """Returns the numbers that were wanted in the last `seconds`; none if the history is
    shorter."""
    if history[0].since_s > now_s - seconds:
        return []
    return [w.num_replicas for w, end_s in _with_ends(history) if end_s > now_s - seconds]


def _with_ends(history: History) -> Iterable[tuple[Wanted, float]]:
    """Returns each entry of the history with the time at which the next one began."""
    return zip(history, [*(w.since_s for w in history[1:]), math.inf], strict=True)

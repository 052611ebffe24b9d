"""Decides how many replicas the load needs: by requests, by waiting sequences, and by the use of the KV cache.

Ray Serve calls `ScalingPolicy` ten times a second and starts or drains replicas. It sends this module to its controller
by value, so the module imports nothing of ours.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ray.serve.config import AutoscalingContext

WAITING, KV_USE = "waiting", "kv_use"  # the figures that a replica reports


@dataclass(frozen=True)
class ScalingRules:
    """The settings of `decide`, with the names of the endpoint's."""

    min_replicas: int
    max_replicas: int
    target_ongoing_requests: float  # of a replica
    scale_up_after_s: float  # of load that needs more
    scale_down_after_s: float  # of load that needs less
    scale_to_zero_after_s: float  # without any request
    target_kv_use: float = 0.8


@dataclass(frozen=True)
class Observation:
    """The load of all replicas together."""

    now_s: float
    num_replicas: int  # including those that are starting
    num_ongoing: float  # requests, at the replicas and before them
    waiting: float  # sequences without a slot, in replicas: 1.5 would fill the slots of one and a half
    kv_use: float  # of cache or slots, whichever is fuller, in replicas


@dataclass(frozen=True)
class Wanted:
    """The number of replicas that the load has needed from `since_s` on, until the next entry of the history."""

    since_s: float
    num_replicas: int


History = tuple[Wanted, ...]


def wanted_replicas(seen: Observation, rules: ScalingRules) -> int:
    """Returns how many replicas the current load needs."""
    by_requests = seen.num_ongoing / rules.target_ongoing_requests
    by_sequences = (seen.kv_use + seen.waiting) / rules.target_kv_use
    # Averages over a few seconds never quite reach 0, for which a replica would be kept.
    wanted = math.ceil(max(by_requests, by_sequences) - 1e-3)
    return min(max(wanted, rules.min_replicas), rules.max_replicas)


def decide(seen: Observation, history: History, rules: ScalingRules) -> tuple[int, History]:
    """Returns the number of replicas to have now, and the history for the next call. It grows once the load has needed
    more for `scale_up_after_s`, to what was needed all that time. It shrinks once the load has needed fewer for
    `scale_down_after_s`, to the most that was needed in that time: a burst that returns soon finds its replicas."""
    wanted = wanted_replicas(seen, rules)
    if not history or history[-1].num_replicas != wanted:
        history = (*history, Wanted(seen.now_s, wanted))
    up = min(_in_the_last(rules.scale_up_after_s, history, seen.now_s), default=seen.num_replicas)
    down = max(_in_the_last(rules.scale_down_after_s, history, seen.now_s), default=seen.num_replicas)
    if down == 0 and history[-1].since_s > seen.now_s - rules.scale_to_zero_after_s:
        down = 1
    oldest_s = seen.now_s - max(rules.scale_up_after_s, rules.scale_down_after_s)
    history = tuple(w for w, end_s in _with_ends(history) if end_s > oldest_s)
    return max(min(seen.num_replicas, down), up), history


def _in_the_last(seconds: float, history: History, now_s: float) -> list[int]:
    """Returns the numbers that were wanted in the last `seconds`; none if the history is shorter."""
    if history[0].since_s > now_s - seconds:
        return []
    return [w.num_replicas for w, end_s in _with_ends(history) if end_s > now_s - seconds]


def _with_ends(history: History) -> Iterable[tuple[Wanted, float]]:
    """Returns each entry of the history with the time at which the next one began."""
    return zip(history, [*(w.since_s for w in history[1:]), math.inf], strict=True)


class ScalingPolicy:
    """Ray Serve's policy. All delays are in our rules: Ray Serve's own are zero, and its bounds equal ours."""

    def __init__(self, **rules: Any) -> None:
        self._rules = ScalingRules(**rules)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        reported = context.aggregated_metrics or {}
        seen = Observation(
            now_s=time.time() if context.current_time is None else context.current_time,
            num_replicas=context.target_num_replicas,
            num_ongoing=context.total_num_requests,
            waiting=sum(reported.get(WAITING, {}).values()),
            kv_use=sum(reported.get(KV_USE, {}).values()),
        )
        target, history = decide(seen, context.policy_state.get("history", ()), self._rules)
        return target, {"history": history}

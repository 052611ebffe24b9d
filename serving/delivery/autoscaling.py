"""Decides how many replicas the load needs: by requests, by waiting sequences, and by the use of the KV cache.

Ray Serve calls `ScalingPolicy` ten times a second and starts or drains replicas. It sends this module to its controller
by value, so the module imports nothing of ours.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

from ray.serve.config import AutoscalingContext

WAITING, KV_USE = "waiting", "kv_use"  # the figures that a replica reports


@dataclass(frozen=True)
class ScalingRules:
    """The settings of `decide`."""

    min_replicas: int
    max_replicas: int
    target_ongoing_requests: float  # of a replica
    num_slots: int  # of a replica
    up_after_s: float  # of load that needs more
    down_after_s: float  # of load that needs less
    to_zero_after_s: float  # without any request
    target_kv_use: float = 0.8


@dataclass(frozen=True)
class Observation:
    """The load of all replicas together."""

    now_s: float
    num_replicas: int  # including those that are starting
    num_ongoing: float  # requests, at the replicas and before them
    num_waiting: float  # sequences without a slot
    kv_use: float  # of cache or slots, whichever is fuller, in replicas: 1.5 is one and a half full replicas


@dataclass(frozen=True)
class Wanted:
    """The fewest and the most replicas that the load has needed in each of these seconds."""

    first_s: int
    last_s: int
    fewest: int
    most: int


History = tuple[Wanted, ...]


def wanted_replicas(seen: Observation, rules: ScalingRules) -> int:
    """Returns how many replicas the current load needs."""
    by_requests = seen.num_ongoing / rules.target_ongoing_requests
    by_sequences = (seen.kv_use + seen.num_waiting / rules.num_slots) / rules.target_kv_use
    # Averages over a few seconds never quite reach 0, for which a replica would be kept.
    wanted = math.ceil(max(by_requests, by_sequences) - 1e-3)
    return min(max(wanted, rules.min_replicas), rules.max_replicas)


def decide(seen: Observation, history: History, rules: ScalingRules) -> tuple[int, History]:
    """Returns the number of replicas to have now, and the history for the next call. It grows once the load has needed
    more for `up_after_s`, to what was needed all that time. It shrinks once the load has needed fewer for
    `down_after_s`, to the most that was needed in that time, so that a burst that returns soon finds its replicas."""
    history = _remember(seen, wanted_replicas(seen, rules), history, rules)
    up = min((w.fewest for w in _last(rules.up_after_s, history, seen.now_s)), default=seen.num_replicas)
    down = max((w.most for w in _last(rules.down_after_s, history, seen.now_s)), default=seen.num_replicas)
    if down == 0 and not _last(rules.to_zero_after_s, history, seen.now_s, fewer_than=1):
        down = 1
    return max(min(seen.num_replicas, down), up), history


def _remember(seen: Observation, wanted: int, history: History, rules: ScalingRules) -> History:
    now_s = math.floor(seen.now_s)
    oldest_s = now_s - 1 - max(rules.up_after_s, rules.down_after_s, rules.to_zero_after_s)
    kept = tuple(w for w in history if w.last_s >= oldest_s)
    last = kept[-1] if kept else Wanted(now_s, now_s - 1, wanted, wanted)
    if last.fewest == last.most == wanted:
        return (*kept[:-1], Wanted(last.first_s, now_s, wanted, wanted))
    if last.last_s < now_s:
        return (*kept, Wanted(now_s, now_s, wanted, wanted))
    # The last entry covers this second already.
    before = () if last.first_s == now_s else (Wanted(last.first_s, now_s - 1, last.fewest, last.most),)
    return (*kept[:-1], *before, Wanted(now_s, now_s, min(last.fewest, wanted), max(last.most, wanted)))


def _last(seconds: float, history: History, now_s: float, *, fewer_than: int | None = None) -> History:
    """Returns what was wanted in the last `seconds`; nothing if the history is shorter, or if `fewer_than` was
    reached."""
    if history[0].first_s > now_s - seconds:
        return ()
    recent = tuple(w for w in history if w.last_s >= math.floor(now_s - seconds))
    return () if fewer_than is not None and any(w.most >= fewer_than for w in recent) else recent


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
            num_waiting=sum(reported.get(WAITING, {}).values()),
            kv_use=sum(reported.get(KV_USE, {}).values()),
        )
        target, history = decide(seen, context.policy_state.get("history", ()), self._rules)
        return target, {"history": history}

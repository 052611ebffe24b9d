"""The number of replicas, decided over a simulated day: waits stay short, replicas do not flap, and
few are kept."""

import heapq
import inspect
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve.config import AutoscalingContext, AutoscalingPolicy

from serving.delivery.autoscaling import KV_USE, WAITING, History, ScalingPolicy

POLICY = ScalingPolicy(
    target_ongoing_requests=14,
    scale_up_after_s=2,
    scale_down_after_s=180,
    scale_to_zero_after_s=300,
)
MAX_REPLICAS = 8
NOTHING_KNOWN: dict[str, Any] = dict.fromkeys(inspect.signature(AutoscalingContext).parameters)
NUM_SLOTS = 16
DAY_S, SERVICE_S, COLD_START_S, WAIT_SLO_S = 86_400, 8.0, 20, 10.0


def context(
    num_requests: float = 28,
    *,
    waiting: float = 0,
    kv_use: float = 0,
    num_replicas: int = 2,
    **state: History,
) -> AutoscalingContext:
    """What Ray Serve shows the policy. Of the cache and the queue each replica reports its part."""
    about = NOTHING_KNOWN | {
        "total_num_requests": num_requests,
        "target_num_replicas": num_replicas,
        "policy_state": state,
    }
    reported = {WAITING: waiting, KV_USE: kv_use}
    parts = {name: {"one": amount / 2, "other": amount / 2} for name, amount in reported.items()}
    return AutoscalingContext(**about | {"aggregated_metrics": parts})


@pytest.mark.parametrize(
    ("seen", "wanted"),
    [
        (context(kv_use=1.6), 2),
        (context(29), 3),
        (context(kv_use=1.7), 3),  # few requests of many sequences
        (context(kv_use=1.6, waiting=1), 4),
        (context(0), 0),
        (context(0.01), 0),  # an average
        (context(1, kv_use=0.1), 1),
    ],
)
def test_what_a_moment_needs(seen: AutoscalingContext, wanted: int) -> None:
    assert POLICY.wanted_replicas(seen) == wanted


def test_the_policy_keeps_its_history_in_ray_serve() -> None:
    target, state = POLICY(context())
    assert target == 2
    began_s = state["history"][0].since_s
    assert [entry.num_replicas for entry in POLICY(context(140, **state))[1]["history"]] == [2, 10]
    earlier = {"history": tuple(replace(entry, since_s=began_s - 3) for entry in state["history"])}
    assert POLICY(context(num_replicas=1, **earlier))[0] == 2


def follow(loads: list[tuple[int, float]], *, num_replicas: int) -> list[int]:
    """The decisions of each second, under so many requests for so many seconds each."""
    history: History = ()
    decisions = []
    for now_s, num_ongoing in enumerate(load for seconds, load in loads for _ in range(seconds)):
        wanted = POLICY.wanted_replicas(context(num_ongoing))
        decided, history = POLICY.decide(wanted, num_replicas, history, now_s=now_s + 0.5)
        num_replicas = min(decided, MAX_REPLICAS)  # as Ray Serve does it
        decisions.append(num_replicas)
    return decisions


def test_more_after_seconds_fewer_after_three_minutes_none_after_five() -> None:
    decisions = follow([(200, 14), (10, 70), (400, 0)], num_replicas=1)
    assert decisions[:202] == [1] * 202 and decisions[203] == 5
    assert 210 + 180 <= decisions.index(1, 210) <= 210 + 182
    assert 210 + 300 <= decisions.index(0) <= 210 + 302


def test_a_spike_of_a_second_starts_nothing_and_a_lull_of_a_minute_ends_nothing() -> None:
    decisions = follow([(200, 28), (1, 100), (60, 28), (100, 1), (200, 28)], num_replicas=2)
    assert set(decisions) == {2}


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(1, 250), st.integers(0, 200)), max_size=12), st.integers(0, 8)
)
def test_whatever_the_load_nothing_ends_within_minutes_of_having_been_started(
    loads: list[tuple[int, float]], num_replicas: int
) -> None:
    decisions = follow(loads, num_replicas=num_replicas)
    ups = [i for i in range(1, len(decisions)) if decisions[i] > decisions[i - 1]]
    downs = [i for i in range(1, len(decisions)) if decisions[i] < decisions[i - 1]]
    assert not any(0 < down - up < POLICY.scale_down_after_s - 1 for up in ups for down in downs)


@dataclass
class Day:
    """What a day was like."""

    waits_s: list[float]
    replicas: list[int]  # of each second, those that start included

    @property
    def slo_share(self) -> float:
        return float(np.mean(np.array(self.waits_s) <= WAIT_SLO_S))

    @property
    def replica_hours(self) -> float:
        return sum(self.replicas) / 3600


def arrivals(seed: int) -> np.ndarray:
    """Requests in each second of a day: a sine of 0.4 to 4 a second, six bursts of three times as
    many for five minutes, and two hours of silence."""
    rng = np.random.default_rng(seed)
    second = np.arange(DAY_S)
    rate = 2.2 - 1.8 * np.cos(2 * np.pi * (second / DAY_S - 0.15))
    for start in rng.integers(0, DAY_S, 6):
        rate[start : start + 300] *= 3
    rate[7200:14_400] = 0
    return rng.poisson(rate)


def live(seed: int, *, fixed: int | None = None) -> Day:
    """A day with the policy, or with a fixed fleet. Slots are filled first come, first served."""
    rng = np.random.default_rng(seed + 1)
    waits_s, replicas = [], []
    queue: deque[int] = deque()
    running: list[float] = []  # when each ends
    starting: list[int] = []  # when each is ready
    num_ready, history = fixed or 0, ()
    for now_s, num_new in enumerate(arrivals(seed)):
        queue.extend([now_s] * int(num_new))
        num_ready += sum(ready_s <= now_s for ready_s in starting)
        starting = [ready_s for ready_s in starting if ready_s > now_s]
        while running and running[0] <= now_s:
            heapq.heappop(running)
        while queue and len(running) < num_ready * NUM_SLOTS:
            waits_s.append(now_s - queue.popleft())
            heapq.heappush(running, now_s + rng.exponential(SERVICE_S))
        target = num_ready + len(starting)
        if fixed is None:
            waiting, in_use = len(queue) / NUM_SLOTS, len(running) / NUM_SLOTS
            seen = context(len(queue) + len(running), waiting=waiting, kv_use=in_use)
            decided, history = POLICY.decide(
                POLICY.wanted_replicas(seen), target, history, now_s=now_s
            )
            target = min(decided, MAX_REPLICAS)
            more = target - num_ready - len(starting)
            starting += [now_s + COLD_START_S] * more
            num_ready -= max(0, -more - len(starting))
            starting = starting[: len(starting) + min(0, more)]
        replicas.append(target)
    return Day(waits_s, replicas)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_day_of_traffic(seed: int) -> None:
    day = live(seed)
    peak = max(day.replicas)
    fixed = live(seed, fixed=peak)
    changes = np.diff(day.replicas)
    reversals = [
        (up, down)
        for up in np.flatnonzero(changes > 0)
        for down in np.flatnonzero(changes < 0)
        if 0 < down - up < POLICY.scale_down_after_s - 1
    ]
    print(
        f"seed {seed}: {len(day.waits_s)} requests, {100 * day.slo_share:.2f} % wait at most {WAIT_SLO_S:.0f} s, "
        f"{np.count_nonzero(changes)} changes, {day.replica_hours:.1f} replica-hours against {fixed.replica_hours:.0f} "
        f"of {peak} fixed replicas ({100 * fixed.slo_share:.2f} %)"
    )
    assert day.slo_share >= 0.98
    assert day.replica_hours <= 0.5 * fixed.replica_hours
    assert not reversals and np.count_nonzero(changes) < 24 * 12
    assert min(day.replicas[9000:14_000]) == 0  # nobody asks at night
    assert max(day.waits_s) <= COLD_START_S + 60


def test_the_policy_survives_the_way_to_the_controller() -> None:
    policy = AutoscalingPolicy(policy_function=ScalingPolicy, policy_kwargs=asdict(POLICY))
    policy.serialize_policy()
    assert policy.get_policy()(**asdict(POLICY)).target_ongoing_requests == 14


def test_a_clock_that_steps_back_delays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the old code nothing changed for as long as the step was: the wall clock counted, and
    entries lay ahead."""
    busy = 100 * POLICY.target_ongoing_requests
    history: History = ()
    for now_s in (5000.0, 5001.0, 1000.0, 1000.0 + POLICY.scale_up_after_s + 1):
        target, history = POLICY.decide(int(busy), 1, history, now_s=now_s)
    assert target == busy
    monkeypatch.setattr(time, "time", lambda: pytest.fail("the wall clock was asked"))
    POLICY(context())

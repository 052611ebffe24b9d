"""What a run costs is counted from its ledger: whose devices were held, for how long, at which
price."""

from typing import Any

import pytest

from cluster.settings.run import ScalingConfig
from jobs.run.costs.run_cost import SPOT, run_cost
from jobs.run.ledger import Line

PRICES = ScalingConfig(
    threads_per_worker=2, price_per_device_hour=3600.0, spot_price_per_device_hour=360.0
)


def start(at_s: float, *nodes: str, launcher: int = 1) -> Line:
    """Nodes whose name begins with an s are labeled as spot ones."""
    workers = [
        {"node_id": node} | ({"market": SPOT} if node.startswith("s") else {}) for node in nodes
    ]
    return {
        "event": "start",
        "time": at_s,
        "world_size": len(nodes),
        "workers": workers,
        "launcher": launcher,
    }


def step(at_s: float) -> Line:
    return {"time": at_s, "step": 1}


def event(name: str, at_s: float, **fields: Any) -> Line:
    return {"event": name, "time": at_s, **fields}


@pytest.mark.parametrize(
    ("lines", "worker_s"),
    [
        ([start(10, "a", "b"), step(13)], {"": 2 * 3}),
        # b is lost after 13: a was held until c had come, and what is noted of it counts no one
        (
            [start(10, "a", "b"), step(13), event("spares", 18), start(20, "a", "c"), step(21)],
            {"": 2 * 3 + 7 + 2},
        ),
        # Both nodes went: an hour without any
        ([start(10, "s1", "s2"), step(13), start(3613, "s3", "b"), step(3614)], {SPOT: 7, "": 1}),
        # Two workers of one node, of which one is replaced there
        ([start(10, "a", "a"), step(13), start(15, "a", "a"), step(16)], {"": 2 * 6}),
        # A stop on request, and the end of a budget
        (
            [
                *(start(10, "a"), step(13), event("preempted", 14, notice="stop")),
                *(event("checkpoint", 15), start(90, "a"), step(91), event("spent", 92)),
                *(start(190, "a"), step(191)),
            ],
            {"": 4 + 2 + 1},
        ),
        # A launcher was killed, and the next one found the same node
        ([start(10, "a"), step(13), start(90, "a", launcher=2), step(91)], {"": 3 + 1}),
        # The next attempt records a checkpoint before it starts
        ([start(10, "a"), step(13), event("checkpoint", 80), start(90, "b")], {"": 3}),
        ([start(10, "a"), step(13), event("preempted", 14, notice="save"), step(16)], {"": 6}),
    ],
    ids=[
        "steps",
        "a node is lost",
        "all nodes are lost",
        "a worker is lost",
        "pauses",
        "two launches",
        "an unlisted checkpoint",
        "a notice",
    ],
)
def test_time_counts_while_devices_are_held(lines: list[Line], worker_s: dict[str, float]) -> None:
    assert run_cost(lines).worker_s == worker_s


def test_each_kind_of_node_has_its_price() -> None:
    cost = run_cost([start(10, "s1", "b"), step(13)])
    assert cost.money(PRICES) == pytest.approx(3 * 2 * (1 + 0.1))
    assert cost.money(PRICES, now_s=14) == pytest.approx(4 * 2 * (1 + 0.1))
    assert cost.money_per_hour(PRICES) == pytest.approx(3600 * 2 * (1 + 0.1))
    on_demand = PRICES.model_copy(update={"spot_price_per_device_hour": None})
    assert cost.money(on_demand) == pytest.approx(3 * 2 * 2)
    assert cost.money(ScalingConfig()) == 0


def test_lines_of_steps_between_two_events_are_not_needed() -> None:
    lines = [start(10, "a"), *map(step, range(11, 30)), start(40, "a", "b"), step(50)]
    assert run_cost(lines).worker_s == run_cost([lines[0], *lines[-3:]]).worker_s

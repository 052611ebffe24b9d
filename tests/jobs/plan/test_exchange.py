"""The planner's exchange against what can be reckoned by hand."""

from typing import Any

import pytest

from cluster.settings.plan import PlanConfig
from cluster.settings.run import RunConfig
from jobs.plan.bucket_sizes import part_sizes, sizes_of_bundles
from jobs.plan.exchange import MESSAGE_S, Exchange, exchange
from jobs.plan.memory import layout_of
from raymill.state.flat_layout import FlatLayout
from raymill.state.messages import joined_buckets

# 300 GB/s within a node, 10 GB/s between nodes
OPTIONS = PlanConfig(gpu="a100", network_gbit_per_s=80)
LANE_S = 3.0


def run(
    *, precision: str = "bf16", micro_batches: int = 1, recompute: bool = False, **scaling: Any
) -> RunConfig:
    train = {
        "micro_batch_size": 2,
        "micro_batches_per_lane": micro_batches,
        "global_batch_size": 128 * micro_batches,
    }
    train |= {"precision": precision, "recompute": recompute, "max_tokens": 10**9}
    return RunConfig.model_validate(
        {"model": {"preset": "gpt3-1.3b"}, "train": train, "scaling": scaling}
    )


def exchanged(
    config: RunConfig, world_size: int, layout: FlatLayout | None = None, lane_s: float = LANE_S
) -> Exchange:
    layout = layout or layout_of(config)
    return exchange(config, layout, OPTIONS, world_size=world_size, num_lanes=64, lane_s=lane_s)


def seconds_of_bytes(found: Exchange) -> float:
    return found.seconds - found.traffic.num_messages * MESSAGE_S


def test_a_flat_exchange_is_bound_by_its_slowest_link() -> None:
    layout = FlatLayout.of({"weight": (10**9,)})
    alone, node, two = (exchanged(run(), size, layout) for size in (1, 8, 16))
    assert alone.traffic.link_bytes == alone.traffic.card_bytes == alone.seconds == 0
    assert node.traffic.link_bytes == pytest.approx(8e9 * 7 / 8)
    assert node.traffic.card_bytes == 0
    assert seconds_of_bytes(node) == pytest.approx(7e9 / 3e11, rel=1e-6)
    # Of eight GPUs on a node, each sends the other one its eighth of all sums, and the result back
    assert two.traffic.card_bytes == pytest.approx(8e9 / 16)
    assert seconds_of_bytes(two) == pytest.approx(two.traffic.card_bytes / 1e10, rel=1e-6)
    assert two.traffic.num_messages == 2 * 4 * len(layout.buckets), "each has 16 MiB and more"
    # Seven ranks have one subtree of 8 lanes, or this one and one of 2.
    assert exchanged(run(), 7, layout).traffic.link_bytes == pytest.approx(
        4e9 * 6 / 7 * 3, rel=0.02
    )


def test_the_messages_of_more_nodes_grow_with_the_logarithm_of_their_number() -> None:
    counts = [exchanged(run(), size).traffic.num_messages for size in (8, 16, 32, 64)]
    assert max(counts) == counts[1], "from then on buckets are joined"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_groups_of_a_node_send_an_eighth_through_each_card(precision: str) -> None:
    config = run(precision=precision, shard="gradients", shard_group=8)
    num_values, width = layout_of(config).size, 2 if precision == "bf16" else 4
    found = exchanged(config, 64)
    ring = 8 * num_values * 7 / 8  # of one GPU of each of 8 nodes
    assert found.traffic.card_bytes == pytest.approx(ring / 8)
    # A lane's gradients go to their owners as computed, embeddings in fp32; the weights come back
    # after the update.
    assert found.traffic.link_bytes == pytest.approx((width + 4) * num_values * 7 / 8, rel=0.1)
    flat = exchanged(run(precision=precision), 64).traffic
    assert found.traffic.card_bytes == pytest.approx(flat.card_bytes), "which begins within nodes"


def test_parameters_are_gathered_twice_for_each_micro_batch() -> None:
    matrices = 24 * 12 * 2048**2
    layout = layout_of(run())
    rest = 4 * (layout.size - matrices)
    # In a turn of the pass two blocks are there already
    whole, again = 2 * matrices, 2 * matrices * 22 / 24
    for lanes_each, world_size in ((1, 64), (2, 32), (8, 8)):
        found = exchanged(run(shard="parameters", shard_group=8), world_size).traffic
        inside = whole + (2 * lanes_each - 1) * again + lanes_each * (whole + rest) + rest
        assert found.link_bytes == pytest.approx(inside * 7 / 8, rel=1e-6)
        nodes = world_size // 8
        assert found.card_bytes == pytest.approx(8 * layout.size / 8 * (nodes - 1) / nodes)
    over_nodes = exchanged(run(shard="parameters", shard_group=32), 64).traffic
    between = 8 * layout.size / 32 / 2
    assert over_nodes.card_bytes == pytest.approx(
        (2 * whole + again + 2 * rest) * 24 / 32 + between
    )
    pieces = exchanged(run(shard="parameters", shard_group=8, micro_batches=4), 64).traffic
    assert pieces.link_bytes == pytest.approx(
        (whole + 7 * again + 4 * (whole + rest) + rest) * 7 / 8
    )


def test_computing_hides_what_is_sent_beside_it() -> None:
    for config in (run(), run(shard="gradients", shard_group=8), run(shard="parameters")):
        slow, fast = exchanged(config, 64, lane_s=1e6), exchanged(config, 64, lane_s=1e-9)
        update_s = 28 * layout_of(config).size / 8 / 2e12
        sent_beside_it_s = 7 / 8 * update_s if config.scaling.shard == "gradients" else 0.0
        assert fast.exposed_s == pytest.approx(fast.seconds - sent_beside_it_s, rel=1e-3)
        assert slow.exposed_s < 0.2 * slow.seconds
    none, zero_1 = (exchanged(run(shard=shard), 64, lane_s=1e6) for shard in ("none", "optimizer"))
    num_bundles = 16
    assert none.exposed_s <= none.seconds / num_bundles, "the last buckets wait for backward's end"
    assert none.exposed_s < zero_1.exposed_s, "the weights go round once they are updated"
    assert none.traffic.link_bytes == zero_1.traffic.link_bytes
    assert none.traffic.card_bytes == zero_1.traffic.card_bytes
    short = exchanged(run(shard="parameters"), 64, lane_s=1.0)
    recomputed = exchanged(run(shard="parameters", recompute=True), 64, lane_s=1.0)
    assert recomputed.exposed_s != short.exposed_s, "its backward pass is a larger part"


def test_a_stretch_of_an_update_hides_the_sending_of_the_one_before() -> None:
    """By an A100's 2 TB/s: an eighth of the update has nothing before it."""
    config = run(shard="optimizer")
    layout, zero_1 = layout_of(config), exchanged(config, 8, lane_s=1e6)
    sums_s = 4 * layout.size * 7 / 8 / 300e9 + 3 * len(layout.buckets) * MESSAGE_S
    gather_s = sums_s
    update_s = 28 * layout.size / 8 / 2e12
    last_bucket_s = sums_s / len(layout.buckets)
    exposed_s = gather_s - 7 / 8 * update_s + last_bucket_s
    assert zero_1.exposed_s == pytest.approx(exposed_s, rel=0.01)


@pytest.mark.parametrize(
    "scaling", [{}, {"shard": "gradients", "shard_group": 8}, {"shard": "parameters"}]
)
def test_so_many_sequences_compute_for_as_long_as_they_exchange(scaling: dict[str, Any]) -> None:
    config, sequence_s = run(**scaling), 0.1
    found = exchanged(config, 64, lane_s=2 * sequence_s)
    assert found.least_sequences - 1 < found.seconds / sequence_s <= found.least_sequences
    assert found.compute_s == 2 * sequence_s


@pytest.mark.parametrize("group_size", [1, 2, 3, 8])
@pytest.mark.parametrize("costs", [{}, {"h.0.w": 2.0, "h.1.w": 2.0}])
def test_a_planner_counts_the_parts_that_a_member_has(
    group_size: int, costs: dict[str, float]
) -> None:
    shapes = {"wte": (3001, 512), "h.0.w": (2048, 512), "h.1.w": (2048, 512), "h.1.b": (2048,)}
    layout = FlatLayout.of(shapes, matrix_costs=costs)
    parts = layout.parts(0, world_size=group_size).spans
    assert part_sizes(layout, 0, world_size=group_size).tolist() == [len(part) for part in parts]
    bundles = joined_buckets(parts, 4)
    planned = sizes_of_bundles(layout, group_size=group_size, num_groups=4)
    assert planned == [sum(map(len, bundle)) for bundle in bundles]

"""Which buckets go together, and what a planner counts of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymill.state.flat_layout import BLOCK, FlatLayout
from raymill.state.messages import (
    LEAST_MESSAGE,
    joined,
    joined_buckets,
    sizes_of_bundles,
)
from raymill.state.span import Span


@given(
    blocks=st.lists(st.integers(0, 4 * LEAST_MESSAGE // BLOCK), min_size=1, max_size=60),
    num_peers=st.integers(2, 9),
)
def test_a_bundle_ends_with_the_bucket_that_makes_it_long_enough(
    blocks: list[int], num_peers: int
) -> None:
    sizes = np.array(blocks, np.int64) * BLOCK
    least = min(num_peers * LEAST_MESSAGE, int(sizes.sum()) // 16)
    bundles = joined(sizes, num_peers)
    assert [number for numbers in bundles for number in numbers] == [*range(len(blocks))]
    for numbers in bundles:
        together = sizes[numbers.start : numbers.stop]
        assert together[:-1].sum() < least or len(numbers) == 1
        assert together.sum() >= least or numbers.stop == len(blocks)


def test_buckets_are_joined_as_their_sizes_are() -> None:
    ends = np.cumsum([3, 1, 4, 1, 5, 9]) * BLOCK
    buckets = [Span(start, stop) for start, stop in zip([0, *ends[:-1]], ends, strict=True)]
    sizes = np.array([len(bucket) for bucket in buckets])
    numbers = [buckets[numbers.start : numbers.stop] for numbers in joined(sizes, 3)]
    assert joined_buckets(buckets, 3) == numbers


@pytest.mark.parametrize("group_size", [1, 2, 3, 8])
@pytest.mark.parametrize("costs", [{}, {"h.0.w": 2.0, "h.1.w": 2.0}])
def test_a_planner_counts_the_parts_that_a_member_has(
    group_size: int, costs: dict[str, float]
) -> None:
    shapes = {"wte": (3001, 512), "h.0.w": (2048, 512), "h.1.w": (2048, 512), "h.1.b": (2048,)}
    layout = FlatLayout.of(shapes, matrix_costs=costs)
    parts = layout.parts(0, world_size=group_size).spans
    assert layout.part_sizes(0, world_size=group_size).tolist() == [len(part) for part in parts]
    bundles = joined_buckets(parts, 4)
    planned = sizes_of_bundles(layout, group_size=group_size, num_groups=4)
    assert planned == [sum(map(len, bundle)) for bundle in bundles]

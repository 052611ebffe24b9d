"""Which buckets go together, and what a planner counts of them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from raymill.state.flat_layout import BLOCK
from raymill.state.messages import (
    LEAST_MESSAGE,
    Message,
    joined,
    joined_buckets,
    most_cost,
    numbers_of_sendings,
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


def test_an_update_is_sent_in_eight_stretches_of_buckets_or_one_for_each() -> None:
    assert numbers_of_sendings(80) == [range(start, start + 10) for start in range(0, 80, 10)]
    assert numbers_of_sendings(3) == [range(1), range(1, 2), range(2, 3)]


def test_a_message_costs_its_share_and_a_quarter_of_the_shortest_to_begin() -> None:
    halves = [Message(0, 1, 0.5), Message(0, 2, 0.5), Message(1, 0, 1.0)]
    assert most_cost(halves, 4) == 2 * (0.5 + 0.25 / 4)
    assert 4 * LEAST_MESSAGE == 1 << 20

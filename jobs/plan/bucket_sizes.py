"""Sizes of buckets and of their parts, which a planner counts for thousands of buckets at once."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from raymill.state.flat_layout import BLOCK, FlatLayout
from raymill.state.messages import joined


@lru_cache(maxsize=256)
def bucket_sizes(layout: FlatLayout) -> NDArray[np.int64]:
    """Returns the number of values of each bucket (N,)."""
    return np.array([len(bucket) for bucket in layout.buckets], np.int64)


def part_sizes(layout: FlatLayout, rank: int, *, world_size: int) -> NDArray[np.int64]:
    """Returns the number of values of the rank's part of each bucket (N,)."""
    if not layout.matrices:  # all at once what `part_of` divides bucket by bucket
        num_blocks = bucket_sizes(layout) // BLOCK
        end = (rank + 1) * num_blocks // world_size
        return (end - rank * num_blocks // world_size) * BLOCK
    parts = layout.parts(rank, world_size=world_size).spans
    return np.array([len(part) for part in parts], np.int64)


@lru_cache(maxsize=256)
def sizes_of_bundles(layout: FlatLayout, *, group_size: int, num_groups: int) -> list[int]:
    """Returns the number of values of the buckets, or of the first member's parts of them, that go
    together from one group to the others. A planner asks for the same ones again and again."""
    sizes = part_sizes(layout, 0, world_size=group_size)
    starts = [numbers.start for numbers in joined(sizes, num_groups)]
    together: list[int] = np.add.reduceat(sizes, starts).tolist()
    return together

"""Divides neighboring matrices among ranks, each of which owns whole ones: the matrices of a bucket
lie in the order of their owners.

    bucket     q k v | o | fc | proj       of four ranks, which have none so far
    parts      0       1   2    3
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

from raymill.state.span import Span

_MOST_TOGETHER = 7
"""Matrices of a bucket: all ways to divide them are tried, 1,716 at most."""


@dataclass(frozen=True, slots=True)
class WholeMatrix:
    """A matrix that one rank owns and updates."""

    blocks: Span  # of the flat buffer
    cost: float  # of its update


def buckets_of_matrices(matrices: Sequence[WholeMatrix], *, most_values: int) -> list[Span]:
    """Returns buckets of neighboring matrices, with so many values at most, unless a matrix has
    more."""
    buckets: list[Span] = []
    count = 0
    for matrix in matrices:
        joined = Span(buckets[-1].start, matrix.blocks.stop) if buckets else matrix.blocks
        if buckets and count < _MOST_TOGETHER and len(joined) <= most_values:
            buckets[-1] = joined
            count += 1
        else:
            buckets.append(matrix.blocks)
            count = 1
    return buckets


def parts_of_matrices(matrices: Sequence[WholeMatrix], costs: list[float]) -> list[Span]:
    """Returns each rank's matrices of a bucket, so that the most that a rank has to do is least.
    `costs` has what each has to do so far, and is counted up."""
    by_cost = sorted(range(len(costs)), key=lambda rank: costs[rank])
    candidates = sorted(by_cost[: len(matrices)])

    def costs_after(owners: Sequence[int]) -> list[float]:
        after = {rank: costs[rank] for rank in candidates}
        for owner, matrix in zip(owners, matrices, strict=True):
            after[owner] += matrix.cost
        return sorted(after.values(), reverse=True)

    owners = min(combinations_with_replacement(candidates, len(matrices)), key=costs_after)
    lengths = [0] * len(costs)
    for owner, matrix in zip(owners, matrices, strict=True):
        costs[owner] += matrix.cost
        lengths[owner] += len(matrix.blocks)
    parts: list[Span] = []
    end = matrices[0].blocks.start
    for length in lengths:
        parts.append(Span(end, end + length))
        end += length
    return parts

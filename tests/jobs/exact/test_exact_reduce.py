"""The order of the exact sum: its tree, and the steps that sum a rank's lanes along it in few buffers."""

from collections.abc import Sequence
from functools import reduce

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jobs.exact.exact_reduce import halves, lane_steps, subtrees_of_ranks, tree_sum
from tests.jobs.reference_reduce import reduce_lanes, reduce_worlds


def nodes_of(root: range) -> set[range]:
    """Returns all nodes of the tree under `root`."""
    return {root} if len(root) == 1 else {root}.union(*map(nodes_of, halves(root)))


@given(st.integers(1, 200), st.integers(1, 20))
def test_ranks_have_few_subtrees_that_hold_each_lane_once(num_lanes: int, world_size: int) -> None:
    world_size = min(world_size, num_lanes)
    ranks = subtrees_of_ranks(num_lanes, world_size)
    assert nodes_of(range(num_lanes)).issuperset(node for nodes in ranks for node in nodes)
    assert sorted(lane for nodes in ranks for node in nodes for lane in node) == [*range(num_lanes)]
    sizes = [sum(map(len, nodes)) for nodes in ranks]
    assert len(sizes) == world_size
    assert min(sizes) >= 1
    assert max(sizes) <= -(-num_lanes // world_size), "no rank delays the step"
    if world_size.bit_count() == 1:
        assert [len(nodes) for nodes in ranks] == [1] * world_size
        assert [nodes[0].start for nodes in ranks] == sorted(nodes[0].start for nodes in ranks)


@pytest.mark.parametrize(
    ("num_lanes", "world_size", "most"), [(64, 7, 1.29), (64, 63, 1.01), (64, 5, 1.9), (512, 56, 1.29), (512, 63, 1.07)]
)
def test_a_world_that_lost_a_worker_sends_little_more_than_a_ring(num_lanes: int, world_size: int, most: float) -> None:
    num_subtrees = sum(map(len, subtrees_of_ranks(num_lanes, world_size)))
    assert (num_subtrees / world_size + 1) / 2 <= most


def test_subtrees_by_example() -> None:
    assert subtrees_of_ranks(8, 3) == [[range(2), range(6, 7)], [range(2, 4), range(7, 8)], [range(4, 6)]]
    assert subtrees_of_ranks(5, 4) == [[range(1)], [range(1, 2)], [range(2, 3)], [range(3, 5)]]
    with pytest.raises(ValueError, match="3 ranks do not each have a lane of 2"):
        subtrees_of_ranks(2, 3)


def test_the_sum_follows_the_tree() -> None:
    """1e8 swallows a 3 in fp32, so the result shows the order."""
    values = [1e8, 3.0, 3.0, -1e8, 3.0]

    def leaf(node: range) -> Tensor | None:
        return torch.tensor(values[node.start]) if len(node) == 1 else None

    x = [torch.tensor(value) for value in values]
    canonical = (x[0] + x[1]) + (x[2] + (x[3] + x[4]))
    assert float(tree_sum(range(5), leaf)) == float(canonical)
    from_the_left = (((x[0] + x[1]) + x[2]) + x[3]) + x[4]
    assert float(from_the_left) != float(canonical)


def lane_value(lane: int) -> Tensor:
    """Returns (64,) of many magnitudes, so that each order of summing rounds differently."""
    generator = torch.Generator().manual_seed(lane)
    return torch.randn(64, generator=generator) * 10.0 ** torch.randint(-3, 4, (1,), generator=generator)


def stepped(subtrees: Sequence[range], num_pieces: int) -> list[Tensor]:
    """Returns the buffers after the steps of the subtrees' lanes, each in pieces."""
    steps = lane_steps(subtrees, num_pieces=num_pieces)
    buffers = [torch.full((64,), torch.nan) for _ in range(1 + max(step.buffer for step in steps))]
    pieces = [lane * num_pieces + n for subtree in subtrees for lane in subtree for n in range(num_pieces)]
    for number, step in zip(pieces, steps, strict=True):
        buffers[step.buffer] = buffers[step.buffer] + lane_value(number) if step.adds else lane_value(number)
        for target in range(step.buffer - 1, step.buffer - 1 - step.merges, -1):
            buffers[target] += buffers[target + 1]
    return buffers


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 3))
def test_ranks_together_make_the_whole_tree(num_lanes: int, world_size: int, num_pieces: int) -> None:
    """Each rank's buffers, finished by the tree, are the sum that one rank alone makes."""

    def of_lane(lane: int) -> Tensor:
        return reduce(torch.add, [lane_value(lane * num_pieces + n) for n in range(num_pieces)])

    by_node: dict[range, Tensor] = {}
    for subtrees in subtrees_of_ranks(num_lanes, min(world_size, num_lanes)):
        buffers = stepped(subtrees, num_pieces)
        for buffer, expected in zip(buffers, reduce_lanes(subtrees, lane_value=of_lane), strict=False):
            assert torch.equal(buffer, expected)
        by_node |= dict(zip(subtrees, buffers, strict=False))
    alone = reduce_worlds(1, num_lanes=num_lanes, lane_value=of_lane)
    assert torch.equal(tree_sum(range(num_lanes), by_node.get), alone)


def test_buffers_are_as_few_as_the_tree_is_high() -> None:
    for height in range(7):
        steps = lane_steps([range(2**height)])
        assert max(step.buffer for step in steps) == max(height - 1, 0)

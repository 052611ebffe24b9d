"""The order of the exact sum: its tree, and the steps that sum a rank's lanes along it in few buffers."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jobs.exact.exact_reduce import halves, lane_steps, maximal_subtrees, tree_sum
from jobs.tokens.batch_plan import lanes_of_rank
from tests.jobs.reference_reduce import reduce_lanes, reduce_worlds


def nodes_of(root: range) -> set[range]:
    """Returns all nodes of the tree under `root`."""
    return {root} if len(root) == 1 else {root}.union(*map(nodes_of, halves(root)))


@st.composite
def lanes_and_root(draw: st.DrawFn) -> tuple[range, range]:
    root = range(draw(st.integers(1, 200)))
    start = draw(st.integers(0, root.stop - 1))
    return range(start, draw(st.integers(start + 1, root.stop))), root


@given(lanes_and_root())
def test_subtrees_are_the_fewest_nodes_that_hold_just_these_lanes(case: tuple[range, range]) -> None:
    lanes, root = case
    subtrees = maximal_subtrees(lanes, root=root)
    assert [lane for node in subtrees for lane in node] == list(lanes)
    nodes = nodes_of(root)
    assert nodes.issuperset(subtrees)
    # Fewest: no two of them are the halves of a node, which would take their place.
    parents = {halves(node): node for node in nodes if len(node) > 1}
    assert not any(pair in parents for pair in itertools.pairwise(subtrees))


def test_subtrees_of_a_power_of_two_world_are_one_each() -> None:
    for world_size in (1, 2, 4, 8, 16):
        for rank in range(world_size):
            lanes = lanes_of_rank(rank, world_size=world_size, num_lanes=16)
            assert maximal_subtrees(lanes, root=range(16)) == [lanes]


def test_subtrees_by_example() -> None:
    assert maximal_subtrees(range(1, 6), root=range(8)) == [range(1, 2), range(2, 4), range(4, 6)]
    assert maximal_subtrees(range(0, 5), root=range(7)) == [range(0, 3), range(3, 5)]
    assert maximal_subtrees(range(3, 3), root=range(7)) == []


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


def stepped(lanes: range, num_lanes: int) -> list[Tensor]:
    """Returns the buffers after the steps of the rank's lanes."""
    steps = lane_steps(lanes, num_lanes=num_lanes)
    buffers = [torch.full((64,), torch.nan) for _ in range(1 + max(step.buffer for step in steps))]
    for lane, step in zip(lanes, steps, strict=True):
        buffers[step.buffer] = buffers[step.buffer] + lane_value(lane) if step.adds else lane_value(lane)
        for target in range(step.buffer - 1, step.buffer - 1 - step.merges, -1):
            buffers[target] += buffers[target + 1]
    return buffers


@given(st.integers(1, 40), st.integers(1, 8))
def test_ranks_together_make_the_whole_tree(num_lanes: int, world_size: int) -> None:
    """Each rank's buffers, finished by the tree, are the sum that one rank alone makes."""
    world_size = min(world_size, num_lanes)
    by_node: dict[range, Tensor] = {}
    for rank in range(world_size):
        lanes = lanes_of_rank(rank, world_size=world_size, num_lanes=num_lanes)
        subtrees = maximal_subtrees(lanes, root=range(num_lanes))
        buffers = stepped(lanes, num_lanes)
        for buffer, expected in zip(
            buffers, reduce_lanes(lanes, num_lanes=num_lanes, lane_value=lane_value), strict=False
        ):
            assert torch.equal(buffer, expected)
        by_node |= dict(zip(subtrees, buffers, strict=False))
    alone = reduce_worlds(1, num_lanes=num_lanes, lane_value=lane_value)
    assert torch.equal(tree_sum(range(num_lanes), by_node.get), alone)


def test_buffers_are_as_few_as_the_tree_is_high() -> None:
    for height in range(7):
        steps = lane_steps(range(2**height), num_lanes=2**height)
        assert max(step.buffer for step in steps) == max(height - 1, 0)

"""The exact gradient: the same bits of the sum for any number of processes, where a plain all-reduce has others."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jobs.batch_plan import lanes_of_rank
from jobs.exact_reduce import halves, maximal_subtrees, reduce_lanes, tree_sum
from tests.jobs.reduce_worlds import NUM_LANES, digest, lane_value

REPOSITORY = Path(__file__).resolve().parents[2]
MAX_WORLD_SIZE = 5


def nodes_of(root: range) -> set[range]:
    """All nodes of the tree under `root`."""
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
    """1e8 swallows a 3 in fp32, so the result tells the order."""
    values = [1e8, 3.0, 3.0, -1e8, 3.0]

    def leaf(node: range) -> Tensor | None:
        return torch.tensor(values[node.start]) if len(node) == 1 else None

    x = [torch.tensor(value) for value in values]
    canonical = (x[0] + x[1]) + (x[2] + (x[3] + x[4]))
    assert float(tree_sum(range(5), leaf)) == float(canonical)
    from_the_left = (((x[0] + x[1]) + x[2]) + x[3]) + x[4]
    assert float(from_the_left) != float(canonical)


@given(st.integers(1, 40), st.integers(1, 8))
def test_ranks_together_make_the_whole_tree(num_lanes: int, world_size: int) -> None:
    """In one process: each rank's subtree sums, finished by the tree, are the sum that one rank alone makes."""
    world_size = min(world_size, num_lanes)
    by_node: dict[range, Tensor] = {}
    computed: list[int] = []

    def value(lane: int) -> Tensor:
        computed.append(lane)
        return lane_value(lane)

    for rank in range(world_size):
        lanes = lanes_of_rank(rank, world_size=world_size, num_lanes=num_lanes)
        sums = reduce_lanes(lanes, num_lanes=num_lanes, lane_value=value)
        by_node |= dict(zip(maximal_subtrees(lanes, root=range(num_lanes)), sums, strict=True))
    assert computed == list(range(num_lanes))
    (alone,) = reduce_lanes(range(num_lanes), num_lanes=num_lanes, lane_value=lane_value)
    assert torch.equal(tree_sum(range(num_lanes), by_node.get), alone)


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[str]]]:
    """What real processes found, worlds of 1 to 5 of them in turn."""
    folder = tmp_path_factory.mktemp("worlds")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.jobs.reduce_worlds", str(MAX_WORLD_SIZE), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, list[str]]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("num_lanes", NUM_LANES)
def test_any_number_of_processes_gives_the_same_bits(digests: dict[str, dict[str, list[str]]], num_lanes: int) -> None:
    (alone,) = reduce_lanes(range(num_lanes), num_lanes=num_lanes, lane_value=lane_value)
    for world_size in range(1, MAX_WORLD_SIZE + 1):
        assert digests[f"{num_lanes} lanes, {world_size} ranks"]["exact"] == [digest(alone)] * world_size


@pytest.mark.parametrize("num_lanes", NUM_LANES)
def test_a_plain_all_reduce_does_not(digests: dict[str, dict[str, list[str]]], num_lanes: int) -> None:
    """Shows that the test above can fail."""
    sizes = range(1, MAX_WORLD_SIZE + 1)
    assert len({digests[f"{num_lanes} lanes, {size} ranks"]["plain"][0] for size in sizes}) > 1

"""Halving and doubling against the tree as it is defined, bit by bit, for any number of peers and
lanes, and the messages that they take."""

import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raymill.state.bundle import Bundle
from raymill.state.division import Division, order_of_parts, seats_of
from raymill.state.doubling import gather, gather_messages, teams_to_gather
from raymill.state.flat_layout import BLOCK
from raymill.state.messages import Message, most_cost
from raymill.state.peers import Peers
from raymill.state.span import Span
from raymill.sums.exact_reduce import subtrees_of_ranks, tree_sum
from raymill.sums.halving import HalvedSums, Room
from raymill.sums.teams import TeamPlan, team_plan
from tests.jobs.wires import WiredPeers, run_peers
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

CPU = torch.device("cpu")


def lanes_of(num_lanes: int, num_values: int) -> list[Tensor]:
    """Values of very different sizes, whose sum has other bits in any other order."""
    generator = torch.Generator().manual_seed(num_lanes)
    lanes: list[Tensor] = []
    for _ in range(num_lanes):
        exponents = torch.randint(-8, 8, (num_values,), generator=generator)
        lanes.append(torch.randn(num_values, generator=generator) * 2.0**exponents)
    return lanes


def sum_of(lanes: list[Tensor], node: range) -> Tensor:
    return tree_sum(node, lambda node: lanes[node.start].clone() if len(node) == 1 else None)


def uneven_parts(bucket: Span, num_peers: int) -> list[Span]:
    """Parts as whole matrices leave them: some peers have several blocks, others none."""
    num_blocks = len(bucket) // BLOCK
    chosen = random.Random(f"{bucket} {num_peers}").choices(range(num_blocks + 1), k=num_peers - 1)
    cuts = [bucket.start, *(bucket.start + cut * BLOCK for cut in sorted(chosen)), bucket.stop]
    return [Span(start, stop) for start, stop in itertools.pairwise(cuts)]


@pytest.mark.parametrize("is_owned", [False, True])
@pytest.mark.parametrize("num_peers", [1, 2, 3, 4, 6])
def test_values_are_found_among_the_packed_ones(num_peers: int, *, is_owned: bool) -> None:
    buckets = [Span(2 * BLOCK, 9 * BLOCK), Span(9 * BLOCK, 20 * BLOCK)]
    parts = [uneven_parts(bucket, num_peers)[::-1] for bucket in buckets] if is_owned else None
    bundle = Bundle(buckets, num_peers, parts=parts)
    flat = torch.arange(24 * BLOCK).float()
    packed = bundle.packed(flat)
    for span in (Span(0, 24 * BLOCK), Span(5 * BLOCK, 12 * BLOCK), Span(0, BLOCK)):
        places = [*bundle.packed_places(span)]
        for place, in_packed in places:
            assert torch.equal(place.of(flat), in_packed.of(packed))
        inside = span & bundle.span
        assert sum(len(place) for place, _ in places) == len(inside)


def plan_of(num_lanes: int, num_peers: int) -> TeamPlan:
    return team_plan([range(num_lanes)], subtrees_of_ranks(num_lanes, num_peers))


def exchanged(
    num_lanes: int, num_peers: int, buckets: list[Span], *, is_owned: bool
) -> tuple[Tensor, list[Tensor], list[WiredPeers]]:
    """Returns the sum by its definition, what each peer has of it in the end, and the peers."""
    lanes = lanes_of(num_lanes, buckets[-1].stop)
    subtrees = subtrees_of_ranks(num_lanes, num_peers)
    plan = plan_of(num_lanes, num_peers)
    parts = [uneven_parts(bucket, num_peers)[::-1] for bucket in buckets] if is_owned else None
    bundle = Bundle(buckets, num_peers, parts=parts)

    def run(peers: Peers) -> Tensor:
        sums = [sum_of(lanes, node) for node in subtrees[peers.index]]
        vectors = [bundle.packed(flat) for flat in sums]
        HalvedSums(peers, plan, Room(CPU)).finish(vectors, bundle.division)
        bundle.unpack_part(vectors[0], sums[0], peers.index)
        whole = torch.full_like(sums[0], torch.nan)
        for part in bundle.parts(peers.index):
            part.of(whole).copy_(part.of(sums[0]))
        bundle.gather(peers, whole)
        return whole

    results, wired = run_peers(num_peers, run)
    return sum_of(lanes, range(num_lanes)), results, wired


def test_memory_for_what_arrives_stays_where_it_is() -> None:
    room = Room(CPU)
    places: list[int] = []
    before = room.views([4, 2])
    for lengths in ([4, 2], [1, 5], [3]):
        places.append(room.views(lengths)[0].data_ptr())
    assert places == [before[0].data_ptr()] * 3
    assert [len(view) for view in room.views([4, 3])] == [4, 3]


@given(st.integers(1, 9), st.integers(4, 64), st.lists(st.integers(0, 5), min_size=1, max_size=3))
@settings(deadline=None, max_examples=60)
def test_any_world_has_the_trees_bits(num_peers: int, num_lanes: int, sizes: list[int]) -> None:
    num_peers = min(num_peers, num_lanes)
    buckets, start = [], 0
    for size in sizes:
        buckets.append(Span(start, start + size * BLOCK))
        start += size * BLOCK
    for is_owned in (False, True):
        expected, results, _ = exchanged(num_lanes, num_peers, buckets, is_owned=is_owned)
        assert all(torch.equal(result, expected) for result in results)


@pytest.mark.more
def test_real_processes_of_some_worlds_have_the_trees_bits(tmp_path: Path) -> None:
    """On any nodes, and with parts that ranks must own."""
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.jobs.exchange_worlds", str(tmp_path), "3", "7", "8"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=limit_s(60), check=False
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert len(outcomes) == 3 * 2 * 3 * 3
    assert [outcome for outcome in outcomes if not outcome["is_right"]] == []


@pytest.mark.parametrize("num_peers", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("num_lanes", [32, 47])
def test_a_power_of_two__sends_a_rings_bytes_in_two_messages_a_doubling(
    num_peers: int, num_lanes: int
) -> None:
    size = num_peers * BLOCK
    _, _, peers = exchanged(num_lanes, num_peers, [Span(0, size)], is_owned=False)
    for peer in peers:
        assert len(peer.sent) == 2 * math.log2(num_peers)
        assert sum(length for _, length in peer.sent) == 2 * (size - BLOCK)
        first_receiver, first_length = peer.sent[0]
        assert (first_receiver, first_length) == (peer.index ^ 1, size // 2), "neighbors begin"
        assert peer.sent[-1] == peer.sent[0], "and end"


@pytest.mark.parametrize(("num_peers", "num_lanes"), [(6, 13), (7, 64), (12, 64), (24, 96)])
def test_other_numbers_of_peers__send_what_is_counted(num_peers: int, num_lanes: int) -> None:
    size = 4 * num_peers * BLOCK
    _, _, peers = exchanged(num_lanes, num_peers, [Span(0, size)], is_owned=False)
    plan = plan_of(num_lanes, num_peers)
    counted = [*plan.messages(), *gather_messages(num_peers, teams_to_gather(num_peers))]
    num_sent = Counter(message.sender for message in counted)
    assert [len(peer.sent) for peer in peers] == [num_sent[peer.index] for peer in peers]
    for peer in peers:
        share = sum(message.share for message in counted if message.sender == peer.index)
        sent = sum(length for _, length in peer.sent)
        assert sent == pytest.approx(share * size, abs=6 * BLOCK)


@given(st.integers(2, 70), st.integers(1, 3))
def test_no_peer_takes_longer_than_with_a_message_to_each_other(
    num_peers: int, lanes_each: int
) -> None:
    num_lanes = num_peers * lanes_each
    subtrees = subtrees_of_ranks(num_lanes, num_peers)
    direct: list[Message] = []
    for sender, nodes in enumerate(subtrees):
        for receiver in range(num_peers):
            if receiver != sender:
                direct += [Message(sender, receiver, 1 / num_peers)] * len(nodes)
    halved = most_cost(plan_of(num_lanes, num_peers).messages(), num_peers)
    assert halved <= most_cost(direct, num_peers) * (1 + 1e-9)


@given(st.integers(1, 70), st.integers(0, 300))
def test_parts_and_pieces_cover_all_once(num_peers: int, num_blocks: int) -> None:
    division = Division.of(num_blocks * BLOCK, num_peers=num_peers)
    assert sorted(division.order) == [*range(num_peers)]
    parts = [division.part(peer) for peer in order_of_parts(num_peers)]
    values = [place for part in parts for place in range(part.start, part.stop, BLOCK)]
    assert values == [*range(0, num_blocks * BLOCK, BLOCK)]
    assert max(map(len, parts)) - min(map(len, parts)) <= BLOCK


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_neighbors_who_halve_sit_on_one_node(sizes: list[int]) -> None:
    """As far as its workers allow: of each power of two of them."""
    nodes = [node for node, size in enumerate(sizes) for _ in range(size)]
    seats = seats_of(nodes)
    assert sorted(seats) == [*range(len(nodes))]
    for distance in (1, 2, 4, 8):
        num_crossing = 0
        for seat in range(len(seats) - distance):
            if seat & distance == 0:
                num_crossing += nodes[seats[seat]] != nodes[seats[seat + distance]]
        within = sum(size // (2 * distance) * distance for size in sizes)
        pairs = len([seat for seat in range(len(seats) - distance) if seat & distance == 0])
        assert num_crossing <= pairs - within


def test_nodes_of_six__halve_among_four_and_two_of_each() -> None:
    assert seats_of("aaaaaabbbbbb") == [0, 1, 2, 3, 6, 7, 8, 9, 4, 5, 10, 11]
    assert seats_of("aaabbb") == [0, 1, 3, 4, 2, 5]
    assert seats_of("a" * 7 + "b" * 8) == [*range(7, 15), *range(7)]


def test_several_roots__are_put_into_buffers_of_their_numbers() -> None:
    """As where the sums of a node's workers are finished before those of all nodes."""
    roots, subtrees = [range(4), range(4, 6)], [[range(2), range(5, 6)], [range(2, 4), range(4, 5)]]
    lanes = lanes_of(6, 4 * BLOCK)
    division = Division.of(4 * BLOCK, num_peers=2)

    def run(peers: Peers) -> list[Tensor]:
        vectors = [sum_of(lanes, node) for node in subtrees[peers.index]]
        HalvedSums(peers, team_plan(roots, subtrees), Room(CPU)).finish(vectors, division)
        for vector in vectors:
            gather(peers, vector, division, [range(2)])
        return vectors

    for vectors in run_peers(2, run)[0]:
        for vector, root in zip(vectors, roots, strict=True):
            assert torch.equal(vector, sum_of(lanes, root))

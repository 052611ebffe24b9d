"""The choice of a snapshot, of its readers, of second copies and of the interval: plain values in
and out."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.snapshots.choice import (
    COPIES,
    MAX_SHARE,
    Holding,
    choose,
    contradictions,
    copies,
    interval,
    num_slots,
    reader_of,
    sharded_area,
)
from jobs.snapshots.slots import NUM_SLOTS, Header


def held(
    node: str,
    step: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    attempt: int = 1,
    area: str = "state",
) -> Holding:
    header = Header(attempt, step, rank, world_size, step, [], {}, sequence=step)
    return Holding(node, area, step % 2, header)


def choice_of(
    *holdings: Holding,
    explained_step: int = 100,
    at_least: int = 0,
    left_out: range = range(0),
    after_attempt: int = 0,
):
    return choose(
        holdings,
        explained_step=explained_step,
        at_least=at_least,
        is_left_out=lambda step: step in left_out,
        after_attempt=after_attempt,
    )


def test_the_newest_state_that_any_node_holds_is_taken() -> None:
    choice = choice_of(held("a", 6), held("a", 7), held("b", 7), held("b", 8))
    assert choice is not None
    assert choice.header.step == 8
    assert [[share.node for share in holders] for holders in choice.shares] == [["b"]]


def test_of_one_share_of_one_step_all_nodes_hold_the_same_bits() -> None:
    def summed(held: Holding, checksum: int) -> Holding:
        return replace(held, header=replace(held.header, checksum=checksum))

    alike = [summed(held(node, step), step) for node in "ab" for step in (6, 7)]
    assert contradictions(alike) == []
    other = [summed(held("c", 6), 8), summed(held("c", 7, attempt=2), 9)]
    assert contradictions([*alike, *other]) == [alike[0], alike[2], other[0]]
    assert contradictions([*alike, *other], after_attempt=1) == [], "these are void"
    shares = [summed(held("a", 6, rank=rank, world_size=2), rank) for rank in range(2)]
    assert contradictions(shares) == []


def test_no_state_is_ahead_of_the_ledger() -> None:
    choice = choice_of(held("a", 7), held("a", 8), explained_step=7)
    assert choice is not None
    assert choice.header.step == 7
    assert choice_of(held("a", 8), explained_step=7) is None


def test_a_newer_checkpoint_is_better() -> None:
    assert choice_of(held("a", 7), at_least=8) is None
    assert choice_of(held("a", 8), at_least=8) is not None


def test_what_a_rollback_left_out_stays_out() -> None:
    choice = choice_of(held("a", 4), held("a", 5), held("a", 6), left_out=range(5, 7))
    assert choice is not None
    assert choice.header.step == 4


def test_what_an_attempt_with_a_worker_that_was_wrong_has_left_stays_out() -> None:
    holdings = [held("a", 8, attempt=1), held("a", 6, attempt=2), held("b", 6, attempt=2)]
    choice = choice_of(*holdings, after_attempt=1)
    assert choice is not None
    assert choice.header.step == 6
    assert choice_of(*holdings, after_attempt=2) is None


def test_a_sharded_state_needs_every_share_of_one_step_attempt_and_world() -> None:
    shares = [held("a", 8, rank=0, world_size=2), held("b", 7, rank=1, world_size=2)]
    assert choice_of(*shares) is None
    other_attempt = held("b", 8, rank=1, world_size=2, attempt=2)
    assert choice_of(*shares, other_attempt) is None
    other_world = held("b", 8, rank=1, world_size=3)
    assert choice_of(*shares, other_world) is None
    choice = choice_of(*shares, held("a", 7, rank=0, world_size=2))
    assert choice is not None
    assert choice.header.step == 7


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"), st.integers(1, 6), st.integers(0, 2), st.sampled_from([1, 2, 3])
        )
    )
)
def test_a_choice_is_complete_and_none_newer_is(found: list[tuple[str, int, int, int]]) -> None:
    holdings = [
        held(node, step, rank=rank % world, world_size=world) for node, step, rank, world in found
    ]
    headers = [share.header for share in holdings]

    def complete(step: int) -> bool:
        return any(
            {head.rank for head in headers if head.step == step and head.world_size == world}
            == set(range(world))
            for world in (1, 2, 3)
        )

    choice = choice_of(*holdings, explained_step=5)
    steps = [step for step in range(1, 6) if complete(step)]
    if not steps:
        assert choice is None
        return
    assert choice is not None
    assert choice.header.step == steps[-1]
    world = choice.header.world_size
    assert [{share.header.rank for share in holders} for holders in choice.shares] == [
        {rank} for rank in range(world)
    ]


def test_a_rank_whose_node_holds_a_share_brings_it() -> None:
    assert reader_of({"a"}, ["c", "b", "a"]) == 2
    assert reader_of({"a", "b"}, ["c", "b", "a"]) == 1
    assert reader_of({"a"}, ["c", "b"]) == 0
    assert reader_of({"a", "b", "c"}, ["b", "b", "a"]) is None


def test_a_state_on_one_node_is_copied_to_another_and_to_the_same_one_again() -> None:
    share = held("a", 8)
    assert copies([held("a", 7), share], ["a", "b", "c"]) == [(share, "b")]
    old_copy = held("c", 5, area=COPIES + share.area)
    assert copies([share, old_copy], ["a", "b", "c"]) == [(share, "c")]


def test_a_state_that_two_nodes_train_is_not_copied_nor_what_an_older_attempt_left() -> None:
    assert copies([held("a", 8), held("b", 7)], ["a", "b", "c"]) == []
    assert copies([held("a", 8, attempt=2), held("b", 7)], ["a", "b"]) == [
        (held("a", 8, attempt=2), "b")
    ]
    assert copies([held("a", 8)], ["a"]) == []
    assert copies([], ["a", "b"]) == []


def test_shares_are_spread_over_the_other_nodes() -> None:
    shares = [held("a", 8, rank=rank, world_size=2, area=f"rank-{rank}") for rank in range(2)]
    assert [node for _, node in copies(shares, ["a", "b", "c"])] == ["b", "c"]


@pytest.mark.parametrize(
    ("node_of_rank", "group_size"), [("AB", 2), ("AAAB", 2), ("AAAABB", 3), ("ABBB", 2)]
)
def test_whichever_node_is_lost_a_whole_state_of_the_copied_step_is_left(
    node_of_rank: str, group_size: int
) -> None:
    """The shares of which two nodes write one move on too: a step is whole only if it was copied of
    all."""
    nodes = sorted({*node_of_rank})

    def written(*steps: int) -> list[Holding]:
        areas = [sharded_area(rank, group_size, node_of_rank) for rank in range(len(node_of_rank))]
        return [
            held(node, step, rank=rank % group_size, world_size=group_size, area=areas[rank])
            for rank, node in enumerate(node_of_rank)
            for step in steps
        ]

    wanted = copies(written(9, 10), nodes)
    assert {share.header.step for share, _ in wanted} == {10}
    assert copies(written(10, 9)[::-1], nodes) == wanted, (
        "in whichever order the nodes answer: each copy takes memory"
    )
    copied = [replace(share, node=target, area=COPIES + share.area) for share, target in wanted]
    pinned = [share for share, _ in wanted if num_slots(share.area) > NUM_SLOTS]
    for lost in nodes:
        left = [share for share in [*written(37, 38), *pinned, *copied] if share.node != lost]
        found = choice_of(*left)
        assert found is not None and found.header.step in (10, 38)


@pytest.mark.parametrize("node_of_rank", ["AABB", "AABBAA"])
def test_groups_that_have_each_share_on_two_nodes_copy_and_pin_nothing(node_of_rank: str) -> None:
    areas = [sharded_area(rank, 2, node_of_rank) for rank in range(len(node_of_rank))]
    assert len({*areas}) == len(areas) and {*map(num_slots, areas)} == {NUM_SLOTS}
    shares = [
        held(node, 8, rank=rank % 2, world_size=2, area=areas[rank])
        for rank, node in enumerate(node_of_rank)
    ]
    assert copies(shares, ["A", "B"]) == []


def test_a_state_whose_shares_are_all_on_one_node_is_copied_and_pins_nothing() -> None:
    areas = [sharded_area(rank, 2, "AA") for rank in range(2)]
    assert {*map(num_slots, areas)} == {NUM_SLOTS}
    shares = [held("A", 8, rank=rank, world_size=2, area=area) for rank, area in enumerate(areas)]
    assert copies(shares, ["A", "B"]) == [(share, "B") for share in shares]


@given(copy_s=st.floats(1e-6, 10), step_s=st.floats(1e-4, 1000))
def test_snapshots_cost_no_more_than_their_share(copy_s: float, step_s: float) -> None:
    steps = interval(copy_s=copy_s, step_s=step_s)
    assert copy_s / (steps * step_s) <= MAX_SHARE * (1 + 1e-9)
    assert steps == 1 or copy_s / ((steps - 1) * step_s) > MAX_SHARE * (1 - 1e-9)

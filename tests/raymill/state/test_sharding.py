"""Who holds what: each copy of the state is whole, one is stored, and sums of the gradient meet in
each part once."""

from collections import Counter
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.settings.run import ScalingConfig
from jobs.exact.run_values import run_sharding
from raymill.state.shard import Shard
from raymill.state.sharding import Sharding
from raymill.sums.exact_reduce import subtrees_of_ranks
from raymill.sums.step_plan import StepPlan
from tests.jobs.shardings import sharding

SIZES = st.sampled_from([(1, None), (4, None), (4, 2), (6, 3), (6, 1), (12, 4), (7, 7)])


def of_ranks(shard: Shard, world_size: int, group: int | None) -> list[Sharding]:
    in_groups = shard in ("gradients", "parameters")
    size = group if in_groups else None
    return [
        sharding(shard, rank=rank, world_size=world_size, group=size) for rank in range(world_size)
    ]


@given(st.sampled_from(get_args(Shard)), SIZES)
def test_copies_are_whole_and_one_of_them_is_stored(
    shard: Shard, sizes: tuple[int, int | None]
) -> None:
    ranks = of_ranks(shard, *sizes)
    for rank in ranks:
        assert rank.holders[rank.place] == rank.rank
        assert [ranks[number].copy for number in rank.holders] == [rank.copy] * rank.num_holders
    copies = Counter(rank.copy for rank in ranks)
    assert copies == dict.fromkeys(range(ranks[0].num_copies), ranks[0].num_holders)
    writers = [rank for rank in ranks if rank.writes]
    assert [rank.place for rank in writers] == [*range(ranks[0].num_holders)]
    assert ranks[0].is_whole == (ranks[0].num_holders == 1)


@given(st.sampled_from(get_args(Shard)), SIZES)
def test_counterparts_are_one_member_of_each_group(
    shard: Shard, sizes: tuple[int, int | None]
) -> None:
    ranks = of_ranks(shard, *sizes)
    for rank in ranks:
        assert rank.rank in rank.counterparts
        assert [ranks[number].group for number in rank.counterparts] == [*range(rank.num_groups)]
        assert {ranks[number].member for number in rank.counterparts} == {rank.member}


def test_counterparts_sit_by_their_nodes() -> None:
    """Three nodes of three workers: two of each halve among themselves first."""
    nodes = [*"aaabbbccc"]
    ranks = [
        run_sharding(ScalingConfig(max_workers=1), rank=rank, world_size=9, nodes=nodes)
        for rank in range(9)
    ]
    assert ranks[0].counterparts == [0, 1, 3, 4, 6, 7, 2, 5, 8]
    plans = [StepPlan(rank, 9, 1) for rank in ranks]
    by_seat = subtrees_of_ranks(9, 9)
    assert plans[0].subtrees[3] == by_seat[2], "neighbors have neighboring lanes"
    assert all(plan.subtrees == plans[0].subtrees for plan in plans)
    in_pairs = ScalingConfig(shard="gradients", shard_group=2, max_workers=1)
    groups = run_sharding(in_pairs, rank=3, world_size=12, nodes=[*"aabbaabbaabb"])
    assert groups.seated_groups == (0, 2, 1, 3, 4, 5), "groups 0, 2 and 4 are on one node"
    assert groups.counterparts == [1, 5, 3, 7, 9, 11]


@pytest.mark.parametrize(
    ("shard", "divided", "sends_sums", "sends_values"),
    [
        ("none", set(), True, False),
        ("optimizer", {"exp_avg"}, False, True),
        ("gradients", {"exp_avg", "gradient"}, True, True),
        ("parameters", {"exp_avg", "gradient", "values"}, True, False),
    ],
)
def test_what_is_divided_says_what_is_sent(
    shard: Shard, divided: set[str], sends_sums: bool, sends_values: bool
) -> None:
    of_four = sharding(shard, rank=1, world_size=4)
    assert {
        name for name in ("values", "gradient", "exp_avg") if of_four.is_divided(name)
    } == divided
    assert (of_four.sends_sums, of_four.sends_values) == (sends_sums, sends_values)
    assert of_four.is_sole_copy == (shard != "none")
    assert of_four.owners == ([0, 1, 2, 3] if shard == "optimizer" else None)
    assert sharding(shard, world_size=1) == Sharding(), "a rank alone has nobody to divide with"


def test_a_copy_beside_another_one_is_not_the_sole_one() -> None:
    assert sharding("gradients", world_size=2, group=2).is_sole_copy
    assert not sharding("gradients", world_size=4, group=2).is_sole_copy
    assert not Sharding().is_sole_copy, "nobody else has a part of it"

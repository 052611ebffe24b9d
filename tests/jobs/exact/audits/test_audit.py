"""Who computes what a second time."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.exact.audits.audit import Audits, steps_between
from raymill.state.flat_layout import BLOCK
from raymill.sums.step_plan import StepPlan
from tests.jobs.shardings import in_groups


def plan_of(rank: int, world_size: int, group_size: int, num_lanes: int = 12) -> StepPlan:
    return StepPlan(in_groups(rank, world_size, group_size), num_lanes, 2)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 50), st.integers(0, 9))
def test_each_turn_is_computed_by_one_other_rank_and_all_ranks_know_whose(
    num_groups: int, group_size: int, step: int, seed: int
) -> None:
    world_size = num_groups * group_size
    plans = [plan_of(rank, world_size, group_size) for rank in range(world_size)]
    nodes = range(world_size)
    audits = [Audits.of(1, plan, nodes, seed=seed) for plan in plans]
    found = [at.of_step(step, plan) for at, plan in zip(audits, plans, strict=True)]
    audit = found[0]
    assert audit is not None
    assert found == [audit] * world_size
    assert sorted(audit.subjects) == [*range(world_size)]
    if world_size > 1:
        assert all(rank != subject for rank, subject in enumerate(audit.subjects))
    for plan, turn in zip(plans, audit.turns, strict=True):
        assert 0 <= turn < len(plan.turns)


@pytest.mark.parametrize(
    ("nodes", "num_shared"),
    [("aabb", 0), ("aaabbb", 0), ("abab", 0), ("aab", 1), ("aaaa", 4), ("aaab", 2)],
)
def test_it_is_a_rank_on_another_node_where_there_is_one(nodes: str, num_shared: int) -> None:
    plan = plan_of(0, len(nodes), 1)
    for step in range(1, 20):
        audit = Audits.of(1, plan, nodes, seed=3).of_step(step, plan)
        assert audit is not None
        pairs = [nodes[rank] == nodes[subject] for rank, subject in enumerate(audit.subjects)]
        assert sum(pairs) == num_shared


def test_every_turn_is_drawn_in_time() -> None:
    plan = plan_of(0, 2, 1)
    audits = Audits.of(3, plan, "ab", seed=1)
    drawn = [audits.of_step(step, plan) for step in range(1, 300)]
    steps = [step for step, audit in enumerate(drawn, start=1) if audit]
    assert {later - earlier for earlier, later in pairwise(steps)} == {3}
    assert {audit.turns[0] for audit in drawn if audit} == {*range(len(plan.turns))}


def test_a_step_that_is_doubted_has_all_turns_of_all_ranks_checked() -> None:
    """Groups of two, whose last turn one member computes again."""
    plans = [plan_of(rank, 4, 2, num_lanes=5) for rank in range(4)]
    audits = [Audits.of(30, plan, "abcd", seed=1) for plan in plans]
    asked = [at.of_all_turns(7, plan, around=2) for at, plan in zip(audits, plans, strict=True)]
    assert asked == [asked[0]] * 4, "the same on every rank"
    for rank, plan in enumerate(plans):
        assert [*asked[0].checked_turns(rank, plan)] == [*range(len(plan.turns))]
        assert asked[0].subjects[rank] != rank
    drawn = Audits.of(7, plans[0], "abcd", seed=1).of_step(7, plans[0])
    assert drawn is not None
    assert drawn.checked_turns(2, plans[0]) == [drawn.turns[2]]


def test_a_step_can_be_audited_beside_those_that_are_due() -> None:
    plan = plan_of(0, 2, 1)
    audits = Audits.of(30, plan, "ab", seed=1, also=[7])
    assert [step for step in range(1, 61) if audits.of_step(step, plan)] == [7, 30, 60]
    assert Audits.of(0, plan, "ab", seed=1, also=[7]).of_step(7, plan) is None


@pytest.mark.parametrize("around", [0, 3, 250, 498, 499])
def test_an_excerpt_lies_around_the_block_that_looks_wrong(around: int) -> None:
    plan = plan_of(0, 2, 1)
    span = Audits.of(1, plan, "ab", seed=1).excerpt(3, plan, num_blocks=500, around=around)
    assert span.start <= around * BLOCK < span.stop
    assert 0 <= span.start < span.stop <= 500 * BLOCK
    assert len(span) == 64 * BLOCK


@pytest.mark.parametrize(("num_blocks", "num_lanes"), [(3, 4), (500, 4), (500, 64), (500, 5000)])
def test_an_excerpt_is_whole_blocks_drawn_anew_each_time_and_bounded_over_all_lanes(
    num_blocks: int, num_lanes: int
) -> None:
    plan = plan_of(0, 2, 1, num_lanes)
    audits = Audits.of(1, plan, "ab", seed=1)
    spans = [audits.excerpt(step, plan, num_blocks=num_blocks) for step in range(1, 200)]
    assert spans == [
        Audits.of(1, plan, "ab", seed=1).excerpt(step, plan, num_blocks=num_blocks)
        for step in range(1, 200)
    ], "the same on every rank"
    for span in spans:
        assert span.start % BLOCK == span.stop % BLOCK == 0
        assert 0 <= span.start < span.stop <= num_blocks * BLOCK
        assert len(span) * num_lanes <= 1 << 20 or len(span) == BLOCK
    assert (len({*spans}) == 1) is (num_blocks == 3), "all blocks, if they are few"


def test_by_default_an_audit_costs_one_percent_at_most() -> None:
    plan = plan_of(0, 2, 1)
    assert len(plan.turns) == 6
    assert steps_between(plan) == 40  # 2.4 turns more in 240
    assert Audits.of(None, plan, "ab", seed=1).every_steps == 40
    assert Audits.of(0, plan, "ab", seed=1).of_step(40, plan) is None

"""Who computes what in a step: every micro-batch counts once, and the members of a group have
equally many turns."""

from hypothesis import given
from hypothesis import strategies as st

from raymill.sums.exact_reduce import subtrees_of_ranks
from raymill.sums.step_plan import StepPlan
from tests.jobs.shardings import in_groups


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_each_micro_batch_counts_once(
    num_lanes: int, of_lane: int, num_groups: int, group_size: int
) -> None:
    num_groups = min(num_groups, num_lanes)
    world_size = num_groups * group_size
    plans = [
        StepPlan(in_groups(rank, world_size, group_size), num_lanes, of_lane)
        for rank in range(world_size)
    ]
    counted = [number for numbers in plans[0].counted for number in numbers]
    assert sorted(counted) == [*range(num_lanes * of_lane)]
    for rank, plan in enumerate(plans):
        computed = [number for turn in plan.turns for number in turn]
        own = plan.counted[rank]
        assert computed[: len(own)] == own
        assert len(computed) - len(own) <= (group_size > 1), (
            "at most one is computed for company's sake"
        )
        assert len(plan.turns) == len(plans[rank - rank % group_size].turns)
        assert rank in plan.sharding.counterparts


def test_the_pieces_of_a_turn_are_neighbors_in_the_order_of_members() -> None:
    plans = [StepPlan(in_groups(rank, 4, 2), 6, 2) for rank in range(4)]
    assert subtrees_of_ranks(6, 2) == [[range(3)], [range(3, 6)]]
    assert [plan.turns for plan in plans] == [
        [[0], [2], [4]],
        [[1], [3], [5]],
        [[6], [8], [10]],
        [[7], [9], [11]],
    ]
    # Lanes 0, 1 and 2 are ((0 + 1) + ((2 + 3) + (4 + 5))) of their pieces, a step for each.
    assert [(step.buffer, step.adds, step.merges) for step in plans[0].steps] == [
        (0, False, 0),
        (0, True, 0),
        (1, False, 0),
        (1, True, 0),
        (2, False, 0),
        (2, True, 2),
    ]
    assert plans[0].num_buffers == 3
    assert [len(plans[0].steps_of_turn(turn)) for turn in range(3)] == [2, 2, 2]


def test_a_rank_that_sums_alone_has_a_step_for_each_of_its_lanes() -> None:
    plan = StepPlan(in_groups(0, 2), 4, 3)
    assert [(step.buffer, step.adds) for step in plan.steps] == [(0, False), (0, True)]
    assert plan.num_buffers == 1


def test_a_member_without_a_micro_batch_computes_the_last_one_again() -> None:
    plans = [StepPlan(in_groups(rank, 3, 3), 4, 1) for rank in range(3)]
    assert [plan.turns for plan in plans] == [[[0], [3]], [[1], [3]], [[2], [3]]]
    assert plans[0].counted == [[0, 3], [1], [2]]
    assert len(plans[0].steps_of_turn(1)) == 1

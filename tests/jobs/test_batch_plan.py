"""The batch plan: each row once an epoch, each sample of a step on one rank, whatever the world size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.batch_plan import (
    lane_sample_indices,
    lanes_of_rank,
    position,
    rows_of_samples,
    sample_row,
    sample_rows,
)

seeds = st.integers(0, 2**63 - 1)


@given(seed=seeds, epoch=st.integers(0, 1000), num_rows=st.integers(1, 3000))
def test_an_epoch_is_a_permutation_of_the_rows(seed: int, epoch: int, num_rows: int) -> None:
    rows = sample_rows(np.arange(num_rows), seed=seed, epoch=epoch, num_rows=num_rows)
    assert sorted(rows.tolist()) == list(range(num_rows))


@given(seed=seeds, epoch=st.integers(0, 1000), num_rows=st.integers(1, 2**40), data=st.data())
def test_one_place_alone_is_the_same_as_among_others(seed: int, epoch: int, num_rows: int, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=20))
    rows = sample_rows(places, seed=seed, epoch=epoch, num_rows=num_rows)
    assert rows.tolist() == [sample_row(place, seed=seed, epoch=epoch, num_rows=num_rows) for place in places]
    assert 0 <= rows.min() <= rows.max() < num_rows
    assert len(set(rows.tolist())) == len(set(places))


def test_seeds_and_epochs_order_differently_and_evenly() -> None:
    num_rows = 1000
    orders = {
        (seed, epoch): tuple(sample_rows(np.arange(num_rows), seed=seed, epoch=epoch, num_rows=num_rows).tolist())
        for seed in range(20)
        for epoch in range(20)
    }
    assert len(set(orders.values())) == 400
    # Place 0 falls evenly on ten ranges of rows: 40 each, and chi² with 9 degrees of freedom exceeds 28 once in 1,000.
    counts = np.bincount([order[0] // 100 for order in orders.values()], minlength=10)
    assert ((counts - 40) ** 2 / 40).sum() < 28
    # Neighbours in the epoch are no neighbours in the store.
    distances = np.abs(np.diff(orders[0, 0]))
    assert 250 < distances.mean() < 420  # of a random order: num_rows / 3


def test_the_order_is_pinned() -> None:
    """A changed order would silently change every run that is resumed."""
    assert sample_rows(range(10), seed=7, epoch=2, num_rows=10).tolist() == [1, 0, 3, 4, 5, 2, 8, 7, 9, 6]
    first = sample_rows(range(10), seed=7, epoch=2, num_rows=1000).tolist()
    assert first == [706, 188, 411, 466, 926, 478, 619, 849, 216, 150]


@given(
    num_lanes=st.integers(1, 24),
    micro_batch_size=st.integers(1, 5),
    step=st.integers(0, 10**6),
    data=st.data(),
)
def test_shards_of_a_step_are_disjoint_and_cover_it(
    num_lanes: int, micro_batch_size: int, step: int, data: st.DataObject
) -> None:
    world_size = data.draw(st.integers(1, min(7, num_lanes)))
    global_batch_size = num_lanes * micro_batch_size
    ranges = [lanes_of_rank(rank, world_size=world_size, num_lanes=num_lanes) for rank in range(world_size)]
    assert [lane for lanes in ranges for lane in lanes] == list(range(num_lanes))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1
    assert min(map(len, ranges)) >= 1
    indices = np.concatenate(
        [
            lane_sample_indices(step, lane, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size)
            for lanes in ranges
            for lane in lanes
        ]
    )
    assert indices.tolist() == list(range(step * global_batch_size, (step + 1) * global_batch_size))


def test_more_ranks_than_lanes_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 0 of 3 has no place in 2 lanes"):
        lanes_of_rank(0, world_size=3, num_lanes=2)


@pytest.mark.parametrize("world_size", range(1, 8))
def test_a_run_sees_each_row_once_an_epoch(world_size: int) -> None:
    num_rows, num_lanes, micro_batch_size = 60, 8, 3
    batch = num_lanes * micro_batch_size
    seen = []
    for step in range(5):  # 120 samples, two epochs, the border in the middle of step 2
        for rank in range(world_size):
            for lane in lanes_of_rank(rank, world_size=world_size, num_lanes=num_lanes):
                indices = lane_sample_indices(step, lane, global_batch_size=batch, micro_batch_size=micro_batch_size)
                seen += rows_of_samples(indices, seed=3, num_rows=num_rows).tolist()
    assert sorted(seen[:60]) == sorted(seen[60:]) == list(range(60))
    assert seen[:60] != seen[60:]


def test_positions_count_epochs() -> None:
    assert position(0, num_rows=7) == (0, 0)
    assert position(20, num_rows=7) == (2, 6)
    expected = [sample_row(g % 7, seed=1, epoch=g // 7, num_rows=7) for g in range(21)]
    assert rows_of_samples(np.arange(21), seed=1, num_rows=7).tolist() == expected


def test_places_outside_the_epoch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 5\), got 2 to 5"):
        sample_rows([2, 5], seed=0, epoch=0, num_rows=5)

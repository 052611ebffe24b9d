"""The batch plan: each row once per epoch, each sample of a step on one rank, whatever the world
size."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.tokens.batch_plan import SampleOrder, counts_of_sources
from raymill.sums.exact_reduce import subtrees_of_ranks

seeds = st.integers(0, 2**63 - 1)
weight_lists = st.lists(st.floats(0.01, 1.0), min_size=2, max_size=4).map(tuple)


def one_source(seed: int, num_rows: int, window_rows: int) -> SampleOrder:
    return SampleOrder(seed, window_rows, (num_rows,))


@given(
    seed=seeds,
    epoch=st.integers(0, 1000),
    num_rows=st.integers(1, 2000),
    window_rows=st.integers(40, 2500),
)
def test_an_epoch_takes_each_row_once_window_after_window(
    seed: int, epoch: int, num_rows: int, window_rows: int
) -> None:
    first = epoch * num_rows
    sources, rows = one_source(seed, num_rows, window_rows).rows(np.arange(first, first + num_rows))
    assert not sources.any()
    for start in range(0, num_rows, window_rows):
        window = range(start, min(num_rows, start + window_rows))
        assert sorted(rows[window].tolist()) == list(window)


@given(
    seed=seeds, num_rows=st.integers(1, 2**40), window_rows=st.integers(1, 2**41), data=st.data()
)
def test_a_sample_alone_is_the_same_as_among_others(
    seed: int, num_rows: int, window_rows: int, data: st.DataObject
) -> None:
    order = one_source(seed, num_rows, window_rows)
    samples = data.draw(st.lists(st.integers(0, 10 * num_rows), min_size=1, max_size=20))
    rows = order.rows(samples)[1]
    assert rows.tolist() == [int(order.rows([sample])[1][0]) for sample in samples]
    assert 0 <= rows.min() <= rows.max() < num_rows


@given(
    seed=seeds, num_rows=st.integers(1, 2**40), window_rows=st.integers(1, 2**41), data=st.data()
)
def test_the_sample_of_a_row_is_found_without_a_scan(
    seed: int, num_rows: int, window_rows: int, data: st.DataObject
) -> None:
    """Of billions of rows, too: the permutation of a window has an inverse."""
    window_rows = max(window_rows, num_rows // 50)
    order = one_source(seed, num_rows, window_rows)
    rows = data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=20))
    epoch = data.draw(st.integers(0, 1000))
    samples = order.samples_of(0, rows, epoch=epoch)
    assert order.rows(samples)[1].tolist() == rows
    assert set(order.epochs(samples).tolist()) == {epoch}


@settings(max_examples=10, deadline=None)
@given(
    seed=seeds,
    weights=st.one_of(st.just(()), weight_lists),
    window_rows=st.integers(50, 1000),
    num_samples=st.integers(0, 11_000),
    data=st.data(),
)
def test_the_samples_of_all_rows_are_all_samples(
    seed: int,
    weights: tuple[float, ...],
    window_rows: int,
    num_samples: int,
    data: st.DataObject,
) -> None:
    num_sources = max(1, len(weights))
    sizes = data.draw(
        st.lists(st.integers(300, 900), min_size=num_sources, max_size=num_sources).map(tuple)
    )
    order = SampleOrder(seed, window_rows, sizes, weights)
    found: list[int] = []
    for source, size in enumerate(sizes):
        for epoch in range(num_epochs := order.num_epochs(source, num_samples)):
            samples = order.samples_of(source, np.arange(size), epoch=epoch)
            sources, rows = order.rows(samples)
            assert (sources == source).all()
            assert rows.tolist() == list(range(size))
            found += samples[samples < num_samples].tolist()
        later = order.samples_of(source, np.arange(size), epoch=num_epochs)
        assert later.min() >= num_samples, "no sample is in an epoch behind those"
    assert sorted(found) == list(range(num_samples))


def test_seeds_epochs_windows_and_sources_order_differently_and_evenly() -> None:
    orders = {}
    for seed in range(20):
        rows = (
            one_source(seed, 2000, 1000).rows(np.arange(10 * 2000))[1].reshape(10, 2, 1000) % 1000
        )
        orders |= {
            (seed, epoch, window): tuple(rows[epoch, window])
            for epoch in range(10)
            for window in range(2)
        }
    assert len(set(orders.values())) == 400
    # Place 0 falls evenly on ten ranges of rows: 40 each, and chi² with 9 degrees of freedom
    # exceeds 28 once in 1,000.
    counts = np.bincount([order[0] // 100 for order in orders.values()], minlength=10)
    assert ((counts - 40) ** 2 / 40).sum() < 28
    # Neighbors in the epoch are no neighbors in the store.
    distances = np.abs(np.diff(orders[0, 0, 0]))
    assert 250 < distances.mean() < 420  # of a random order: a third of the window
    sources, rows = SampleOrder(0, 1000, (1000, 1000), (0.5, 0.5)).rows(np.arange(2000))
    assert rows[sources == 0].tolist() != rows[sources == 1].tolist()


def test_the_order_is_pinned() -> None:
    """A changed order would silently change every run that is resumed."""
    assert one_source(7, 10, 6).rows(range(10))[1].tolist() == [3, 5, 0, 4, 2, 1, 9, 7, 6, 8]
    sources, rows = SampleOrder(7, 1 << 20, (1000, 5), (0.7, 0.3)).rows(range(3000, 3010))
    assert (sources.tolist(), rows.tolist()) == (
        [0, 1, 0, 0, 0, 1, 0, 0, 1, 0],
        [622, 0, 950, 380, 419, 4, 742, 749, 3, 508],
    )


@pytest.mark.more
@pytest.mark.parametrize(
    "weights",
    [
        (0.7, 0.3),
        (0.01, 0.99),
        (0.5, 0.25, 0.125, 0.125),
        (1 / 3, 1 / 3, 1 / 3),
        (0.4, 0.2, 0.2, 0.1, 0.1),
    ],
)
@pytest.mark.parametrize("seq_len", [64, 1024, 4096])
def test_any_million_tokens_honour_the_weights(weights: tuple[float, ...], seq_len: int) -> None:
    order = SampleOrder(0, 1000, (10**9,) * len(weights), weights)
    num_samples = 1_000_000 // seq_len
    for start in [
        0,
        1,
        4_321,
        9_990,
        10**6 + 17,
        *np.random.default_rng(0).integers(0, 10**9, 20).tolist(),
    ]:
        sources, _ = order.rows(np.arange(start, start + num_samples))
        shares = np.bincount(sources, minlength=len(weights)) / num_samples
        assert np.abs(shares - weights).max() < 0.01, start


@settings(max_examples=20, deadline=None)
@given(seed=seeds, weights=weight_lists, window_rows=st.integers(1, 40), data=st.data())
def test_each_source_has_its_own_epochs(
    seed: int, weights: tuple[float, ...], window_rows: int, data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 90), min_size=len(weights), max_size=len(weights)))
    sources, rows = SampleOrder(seed, window_rows, tuple(sizes), weights).rows(np.arange(1000))
    for source, size in enumerate(sizes):
        taken = rows[sources == source]
        epochs = taken[: len(taken) // size * size].reshape(-1, size)
        assert (np.sort(epochs, axis=1) == np.arange(size)).all()


def test_a_source_of_hardly_any_weight_still_gets_its_turn() -> None:
    sources, _ = SampleOrder(0, 10, (100, 100, 100), (1e-7, 0.5, 0.5)).rows(np.arange(10_000))
    assert np.bincount(sources).tolist() == [1, 5000, 4999]


def test_the_pattern_is_pinned() -> None:
    """Its length decides which sample takes which row."""
    assert counts_of_sources((0.7, 0.3)).tolist() == [7000, 3000]
    assert counts_of_sources((1.0,) * 2000).tolist() == [10] * 2000
    # What tiny sources take, the largest give by halves, one after another
    counts = counts_of_sources((1.0,) * 20 + (1e-9,) * 10_000).tolist()
    assert counts[:20] == [2505] * 3 + [2541] + [5009] * 16
    assert counts[20:] == [1] * 10_000


def test_epochs_are_counted_over_many_periods_of_the_pattern() -> None:
    assert SampleOrder(0, 100, (1000, 1000), (0.5, 0.5)).num_epochs(1, 30_000) == 15


@pytest.mark.parametrize(
    "weights",
    [
        (1.0,) * 10_001,
        (1.0, 3.0) * 10_000,
        (4000.0, 4000.0, *(0.25,) * 8000),
        (1e9, *(1e-3,) * 9_999),
    ],
    ids=[
        "10,001 equal ones",
        "20,000 of two weights",
        "two large and 8,000 small ones",
        "one large and 9,999 tiny ones",
    ],
)
def test_each_of_very_many_sources_gets_its_turn(weights: tuple[float, ...]) -> None:
    """One of 10,001 got none, and with two large ones a share was below zero."""
    counts = counts_of_sources(weights)
    sources, _ = SampleOrder(0, 1000, (10,) * len(weights), weights).rows(
        np.arange(counts.sum(), counts.sum() + 100)
    )
    assert sources.max() < len(weights)
    assert counts.min() >= 1
    expected = np.maximum(1, np.array(weights) / sum(weights) * counts.sum())
    assert (counts <= np.ceil(expected)).all(), (
        "none gets more than its share, and one if that is below one"
    )
    assert (
        counts[np.array(weights) == max(weights)].min()
        > counts[np.array(weights) == min(weights)].max() - 1
    )


def samples_of_rank(
    step: int, rank: int, world_size: int, num_lanes: int, micro_batch_size: int
) -> np.ndarray:
    size = num_lanes * micro_batch_size
    batch = range(step * size, (step + 1) * size)
    lanes = itertools.chain(*subtrees_of_ranks(num_lanes, world_size)[rank])
    return np.concatenate(
        [batch[lane * micro_batch_size : (lane + 1) * micro_batch_size] for lane in lanes]
    )


@pytest.mark.more
@settings(max_examples=40, deadline=None)
@given(
    seed=seeds,
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    window_rows=st.integers(1, 80),
    micro_batch_size=st.integers(1, 3),
    worlds=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    data=st.data(),
)
def test_resizes_leave_every_row_to_be_seen_once_an_epoch(
    seed: int,
    sizes: list[int],
    window_rows: int,
    micro_batch_size: int,
    worlds: list[int],
    data: st.DataObject,
) -> None:
    """The world changes at random steps, and falls back to the last checkpoint each time: a step
    taken again is the same."""
    weights = tuple(1 / len(sizes) for _ in sizes) if len(sizes) > 1 else ()
    order = SampleOrder(seed, window_rows, tuple(sizes), weights)
    taken: dict[int, tuple[int, int]] = {}
    step = 0
    for world_size in worlds:
        step = max(0, step - data.draw(st.integers(0, 3)))
        for step in range(step, step + data.draw(st.integers(1, 12))):  # noqa: B020
            batch: dict[int, tuple[int, int]] = {}
            for rank in range(world_size):
                indices = samples_of_rank(step, rank, world_size, 5, micro_batch_size)
                rows = zip(*(part.tolist() for part in order.rows(indices)), strict=True)
                assert not batch.keys() & set(indices.tolist())
                batch |= dict(zip(indices.tolist(), rows, strict=True))
            assert sorted(batch) == list(
                range(step * 5 * micro_batch_size, (step + 1) * 5 * micro_batch_size)
            )
            assert all(taken.setdefault(sample, row) == row for sample, row in batch.items())
        step += 1
    assert sorted(taken) == list(range(len(taken)))
    for source, size in enumerate(sizes):
        rows = [taken[sample][1] for sample in sorted(taken) if taken[sample][0] == source]
        for start in range(0, len(rows), size):
            epoch = rows[start : start + size]
            assert len(set(epoch)) == len(epoch)
            assert set(epoch) <= set(range(size))

"""Chooses the rows of the token store for each lane of each step, as pure functions of (seed, step,
lane).

A sample's global index counts samples over the whole run, the batches of its steps end to end. Each
sample takes the next row of a source. Rows are shuffled within successive windows, differently in
each epoch of the source. Nothing is buffered or iterated, so a run's whole data position is one
integer: the tokens seen.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from jobs.corpus.text_hashes import mix64

Indices = npt.NDArray[np.int64]

# Samples after which the pattern of sources repeats: a weight is exact to 1 / 10,000
PATTERN_SAMPLES = 10_000
_SAMPLES_OF_SOURCE = 10  # of the pattern, on average at least: with very many sources it is longer
# Four make a pseudorandom permutation (Luby and Rackoff, 1988); eight cost microseconds
_ROUNDS = 8


@dataclass(frozen=True)
class SampleOrder:
    """The row that each sample of a run takes."""

    seed: int
    window_rows: int
    num_rows: tuple[int, ...]  # by source
    weights: tuple[float, ...] = ()  # share of the samples of each source; empty with one source

    def rows(self, samples: npt.ArrayLike) -> tuple[Indices, Indices]:
        """Returns the source of each sample and its row there. An epoch of a source takes each of
        its rows once."""
        sources, epochs, places = self._turns(samples)
        rows = np.empty_like(places)
        keys = np.stack([sources, epochs, places // self.window_rows], axis=1)
        windows, inverse, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
        order = np.argsort(inverse.ravel(), kind="stable")  # NumPy 2.0 gives a column
        groups = np.split(order, np.cumsum(counts))[:-1]
        for (source, epoch, window), group in zip(windows.tolist(), groups, strict=True):
            first, size, key = self._window(source, epoch, window)
            rows[group] = first + _permuted(places[group] - first, key, size)
        return sources, rows

    def epochs(self, samples: npt.ArrayLike) -> Indices:
        """Returns the epoch of its source, from 0, in which each sample takes its row."""
        return self._turns(samples)[1]

    def samples_of(self, source: int, rows: npt.ArrayLike, *, epoch: int) -> Indices:
        """Returns the sample that takes each of these rows of a source in an epoch of it: the
        inverse of `rows`, by arithmetic alone."""
        numbered = np.asarray(rows, dtype=np.int64)
        places = np.empty_like(numbered)
        windows = numbered // self.window_rows
        for window in np.unique(windows).tolist():
            first, size, key = self._window(source, epoch, window)
            is_here = windows == window
            places[is_here] = first + _permuted(numbered[is_here] - first, key, size, back=True)
        pattern, _, num_in_pattern = _source_pattern(self.weights)
        numbers = epoch * self.num_rows[source] + places
        periods, ranks = np.divmod(numbers, num_in_pattern[source])
        return periods * len(pattern) + np.flatnonzero(pattern == source)[ranks]

    def num_epochs(self, source: int, num_samples: int) -> int:
        """Returns how many epochs of a source the run's first samples begin."""
        pattern, _, num_in_pattern = _source_pattern(self.weights)
        periods, rest = divmod(num_samples, len(pattern))
        num_turns = periods * int(num_in_pattern[source])
        num_turns += int(np.count_nonzero(pattern[:rest] == source))
        return -(-num_turns // self.num_rows[source])

    def _turns(self, samples: npt.ArrayLike) -> tuple[Indices, Indices, Indices]:
        """Returns the source of each sample, the epoch of that source, and the place in the
        epoch."""
        indices = np.asarray(samples, dtype=np.int64)
        pattern, ranks, num_in_pattern = _source_pattern(self.weights)
        periods, in_pattern = np.divmod(indices, len(pattern))
        sources = pattern[in_pattern]
        # Of earlier samples, so many took a row of the source.
        numbers = periods * num_in_pattern[sources] + ranks[in_pattern]
        num_rows = np.array(self.num_rows, dtype=np.int64)[sources]
        epochs, places = np.divmod(numbers, num_rows)
        return sources, epochs, places

    def _window(self, source: int, epoch: int, window: int) -> tuple[int, int, str]:
        """Returns the first row of a window, its number of rows, and the key of its order."""
        first = window * self.window_rows
        size = min(self.window_rows, self.num_rows[source] - first)
        return first, size, f"{self.seed} {source} {epoch} {window}"


@cache
def _source_pattern(weights: tuple[float, ...]) -> tuple[Indices, Indices, Indices]:
    """Returns the source of each sample of the pattern, its number within that source, and the
    samples of each source.

    The j-th of a source's n samples is due at (j + 1/2) / n of the pattern, so any stretch holds
    each source's share.
    """
    counts = np.ones(1, dtype=np.int64)
    if len(weights) > 1:
        counts = counts_of_sources(weights)
    sources = np.repeat(np.arange(len(counts)), counts)
    ranks = np.concatenate([np.arange(count) for count in counts])
    due = (ranks + 0.5) / counts[sources]
    order = np.argsort(due, kind="stable")
    return sources[order], ranks[order], counts


def counts_of_sources(weights: Sequence[float]) -> Indices:
    """Divides the pattern's samples by largest remainder, with at least one sample for each source.
    What that takes beyond the pattern's length, the largest sources give."""
    num_samples = max(PATTERN_SAMPLES, _SAMPLES_OF_SOURCE * len(weights))
    shares = np.array(weights) / sum(weights) * num_samples
    counts = np.maximum(1, np.floor(shares)).astype(np.int64)
    missing = num_samples - int(counts.sum())
    while missing < 0:
        largest = np.argmax(counts)
        counts[largest] -= min(-missing, counts[largest] // 2)
        missing = num_samples - int(counts.sum())
    by_remainder = np.argsort(counts - shares, kind="stable")
    counts[by_remainder[:missing]] += 1
    return counts


def _permuted(places: Indices, key: str, size: int, *, back: bool = False) -> Indices:
    """Returns the numbers at `places` (N,) of a permutation of [0, size), without a table of it;
    `back` returns the places of these numbers.

    A Feistel network permutes the smallest range of 2^(2h) numbers that covers them; a result
    outside is permuted again until it falls inside ("cycle walking", Black and Rogaway, 2002), at
    most four times on average. The way back takes the rounds in reverse, and walks the same cycle.
    """
    digest = hashlib.shake_256(f"raymill sample order {key}".encode()).digest(8 * _ROUNDS)
    keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    values = places.astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        left = values[outside] >> half_bits
        right = values[outside] & mask
        if back:
            for round_key in keys[::-1]:
                left, right = right ^ (mix64(left + round_key) & mask), left
        else:
            for round_key in keys:
                left, right = right, left ^ (mix64(right + round_key) & mask)
        values[outside] = (left << half_bits) | right
        outside = values >= size
    return values.astype(np.int64)

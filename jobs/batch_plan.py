"""Which rows of the token store make which lane of which step: pure functions of (seed, step, lane).

A sample's global index counts samples over the whole run: `step * global_batch_size + place in the batch`.
Its row comes from a permutation of the rows, another one each epoch. Nothing is buffered, nothing iterates:
a run's whole data position is one integer: the tokens seen.
"""

import hashlib

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

_ROUNDS = 8  # four make a pseudorandom permutation (Luby and Rackoff, 1988); eight cost microseconds


def _round_keys(seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    digest = hashlib.shake_256(f"raymill sample order {seed} {epoch}".encode()).digest(8 * _ROUNDS)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea, Flood, 2014): each output bit depends on each input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample_rows(indices: npt.ArrayLike, *, seed: int, epoch: int, num_rows: int) -> Indices:
    """The rows at places `indices` of the epoch: a permutation of [0, num_rows), without a table of it.

    A Feistel network permutes the 2^(2h) numbers that just cover the rows; a result past the last row is
    permuted again until it falls inside ("cycle walking", Black and Rogaway, 2002), at most four times on
    average.
    """
    places = np.asarray(indices, dtype=np.int64)
    if num_rows < 1 or (places.size and (places.min() < 0 or places.max() >= num_rows)):
        raise ValueError(f"places must lie in [0, {num_rows}), got {places.min()} to {places.max()}")
    half_bits = max(1, ((num_rows - 1).bit_length() + 1) // 2)
    half, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    keys = _round_keys(seed, epoch)
    values = places.astype(np.uint64).reshape(-1)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        values[outside] = (left << half) | right
        outside = values >= num_rows
    return values.astype(np.int64).reshape(places.shape)


def sample_row(index: int, *, seed: int, epoch: int, num_rows: int) -> int:
    return int(sample_rows([index], seed=seed, epoch=epoch, num_rows=num_rows)[0])


def position(global_index: int, *, num_rows: int) -> tuple[int, int]:
    """(epoch, place in the epoch) of a sample."""
    return divmod(global_index, num_rows)


def rows_of_samples(global_indices: Indices, *, seed: int, num_rows: int) -> Indices:
    """The rows of samples counted over the whole run; a batch may cross from one epoch to the next."""
    epochs, places = np.divmod(global_indices, num_rows)
    rows = np.empty_like(places)
    for epoch in np.unique(epochs):
        rows[epochs == epoch] = sample_rows(places[epochs == epoch], seed=seed, epoch=int(epoch), num_rows=num_rows)
    return rows


def lane_sample_indices(step: int, lane: int, *, global_batch_size: int, micro_batch_size: int) -> Indices:
    """Global indices of the samples (micro_batch_size,) of one lane of a step; steps count from 0."""
    first = step * global_batch_size + lane * micro_batch_size
    return np.arange(first, first + micro_batch_size, dtype=np.int64)


def lanes_of_rank(rank: int, *, world_size: int, num_lanes: int) -> range:
    """The contiguous lanes of a rank. All ranks together own each lane once; sizes differ by one at most."""
    if not 0 <= rank < world_size <= num_lanes:
        raise ValueError(f"rank {rank} of {world_size} has no place in {num_lanes} lanes")
    return range(rank * num_lanes // world_size, (rank + 1) * num_lanes // world_size)

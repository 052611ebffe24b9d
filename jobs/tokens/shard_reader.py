"""Reads tokens of shards: by memory map where they or copies are near; else by ranged reads, cached
and read ahead.

All of it is bounded: the maps and the blocks in memory by number, what is read ahead by its caller,
who names the rows of two steps, and the copies by the cache of the node.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cluster.storage.file_cache import FileCache
from cluster.storage.uris import Entry, Storage
from jobs.tokens.token_store import Shard, TokenStoreError

Tokens = npt.NDArray[Any]

BLOCK_BYTES = 1 << 20  # the unit of sequential reads, whose neighbors share a block
_MAX_BLOCKS = 64
_MAX_MAPS = 256  # each holds a file open; a process may have 1,024
_NUM_THREADS = 8  # of read-ahead; boto3 keeps ten connections


class Piece(NamedTuple):
    """Tokens [start, end) of a shard."""

    shard: Shard
    start: int
    end: int


def read_piece(store: Storage, piece: Piece, dtype: np.dtype[Any]) -> bytes:
    """Reads a piece by itself, in one request. Where a conversation's loss does not count an id, it
    is negative."""
    start, end = piece.start * dtype.itemsize, piece.end * dtype.itemsize
    return store.read_bytes(piece.shard.file, start=start, end=end)


class ShardReader:
    """Reads from a disk where a shard or its copy is on one: it is mapped, and the page cache does
    the rest.

    Else scattered pieces take a request each, ahead of need where they are named early; others
    share blocks, of which the last ones used are kept. For one thread; opens no shard before the
    first read.
    """

    def __init__(self, storage: Storage, dtype: np.dtype[Any], *, near: FileCache) -> None:
        """`near` has copies on this node's disk of the shards of a remote store."""
        self._storage, self._dtype, self._near = storage, dtype, near
        self._mapped = lru_cache(_MAX_MAPS)(self._map)
        self._blocks = lru_cache(_MAX_BLOCKS)(self._fetch)
        # Starts them when needed
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="read-ahead")
        self._ahead: dict[Piece, Future[bytes]] = {}

    def read(self, piece: Piece, *, scattered: bool) -> Tokens:
        """Returns the tokens of the piece; `scattered` means that its neighbors will not be read
        soon.

        Raises what the storage raises, also for a piece that was read ahead; another call tries
        again.
        """
        if (tokens := self._on_disk(piece.shard)) is not None:
            return tokens[piece.start : piece.end]
        if scattered:
            future = self._ahead.pop(piece, None)
            return np.frombuffer(
                future.result() if future else self._fetch(piece), dtype=self._dtype
            )
        size = BLOCK_BYTES // self._dtype.itemsize
        starts = range(piece.start // size * size, piece.end, size)
        blocks = (
            Piece(piece.shard, start, min(piece.shard.tokens, start + size)) for start in starts
        )
        tokens = np.frombuffer(b"".join(map(self._blocks, blocks)), dtype=self._dtype)
        return tokens[piece.start - starts.start : piece.end - starts.start]

    def read_ahead(self, pieces: Iterable[Piece]) -> None:
        """Begins to read these scattered pieces, in order, and holds them until they are read;
        those named before and not now are dropped. Raises `TokenStoreError` for a shard that was to
        come near and has other bytes."""
        if self._near.altered:
            raise TokenStoreError(f"{self._near.altered[0]}; delete it and tokenize again")
        wanted = dict.fromkeys(piece for piece in pieces if self._on_disk(piece.shard) is None)
        for piece in self._ahead.keys() - wanted.keys():
            self._ahead.pop(piece).cancel()
        for piece in wanted:
            if piece not in self._ahead:
                self._ahead[piece] = self._threads.submit(self._fetch, piece)

    def bring_near(self, shards: Iterable[Shard]) -> None:
        """Begins to copy these shards to this node's disk, in order, as many as have room there."""
        self._mapped.cache_clear()  # a copy that is removed takes space while it is mapped
        self._near.want(
            [Entry(each.file, each.tokens * self._dtype.itemsize, each.sha256) for each in shards]
        )

    def _on_disk(self, shard: Shard) -> Tokens | None:
        with suppress(FileNotFoundError):
            return self._mapped(shard)
        return None

    def _map(self, shard: Shard) -> Tokens:
        path = self._storage.local_path(shard.file) or self._near.folder / shard.sha256
        return np.memmap(path, dtype=self._dtype, mode="r", shape=(shard.tokens,))

    def _fetch(self, piece: Piece) -> bytes:
        return read_piece(self._storage, piece, self._dtype)

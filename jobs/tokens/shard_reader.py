"""Reads tokens of shards: by memory map where they or copies are near; else by ranged reads, cached and read ahead.

All of it is bounded: the maps by number, the blocks in memory by bytes, what is read ahead by its caller, who names the
rows of two steps, and the copies by the cache of the node.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cluster.storage.file_cache import FileCache
from cluster.storage.uris import Entry, Storage
from jobs.tokens.token_store import Shard, TokenStoreError

Tokens = npt.NDArray[Any]

BLOCK_BYTES = 1 << 20  # the unit of sequential reads, whose neighbors share a block
_MAX_MAPS = 256  # each holds a file open; a process may have 1,024
_NUM_THREADS = 8  # of read-ahead; boto3 keeps ten connections


class Piece(NamedTuple):
    """Tokens [start, end) of a shard."""

    shard: Shard
    start: int
    end: int


def open_shards(
    storage: Storage, *, dtype: np.dtype[Any], cache_bytes: int = 64 << 20, near_bytes: int = 0
) -> "_MappedShards | RemoteShards":
    """Returns a reader, for one thread, that opens no shard before the first read. Of a remote store it keeps up to
    `cache_bytes` in memory, and this node up to `near_bytes` on its disk."""
    if storage.local_path("") is not None:
        return _MappedShards(lambda shard: storage.local_path(shard.file), dtype)
    near = FileCache(storage, Path.home() / ".cache" / "raymill" / "shards", max_bytes=near_bytes)
    return RemoteShards(storage, dtype, max_bytes=cache_bytes, near=near)


class _MappedShards:
    """Keeps the most recently used shards mapped; the page cache does the rest."""

    def __init__(self, path_of: Callable[[Shard], Path | None], dtype: np.dtype[Any]) -> None:
        self._path_of, self._dtype = path_of, dtype
        self.mapped = lru_cache(_MAX_MAPS)(self._map)

    def read(self, piece: Piece, *, scattered: bool) -> Tokens:
        return self.mapped(piece.shard)[piece.start : piece.end]

    def _map(self, shard: Shard) -> Tokens:
        path = self._path_of(shard)
        assert path is not None
        return np.memmap(path, dtype=self._dtype, mode="r", shape=(shard.tokens,))

    def read_ahead(self, pieces: Iterable[Piece]) -> None:
        """Does nothing: a page fault costs less than a thread."""

    def bring_near(self, shards: Iterable[Shard]) -> None:
        """Does nothing: they are near."""


class RemoteShards:
    """Reads by ranged requests: scattered pieces one by one, and ahead of need where they are named early; others by
    blocks, of which the last ones used are kept within `max_bytes`.

    A shard that was brought near is read from its copy on this node's disk.
    """

    def __init__(self, storage: Storage, dtype: np.dtype[Any], *, max_bytes: int, near: FileCache) -> None:
        self._storage, self._dtype, self._near = storage, dtype, near
        self._copies = _MappedShards(lambda shard: near.path(shard.sha256), dtype)
        self._blocks = lru_cache(max(1, max_bytes // BLOCK_BYTES))(self._fetch)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="read-ahead")  # starts them when needed
        self._ahead: dict[Piece, Future[bytes]] = {}

    def read(self, piece: Piece, *, scattered: bool) -> Tokens:
        """Returns the tokens of the piece; `scattered` means that its neighbors will not be read soon.

        Raises what the storage raises, also for a piece that was read ahead; another call tries again.
        """
        with suppress(FileNotFoundError):
            return self._copies.read(piece, scattered=scattered)
        if scattered:
            future = self._ahead.pop(piece, None)
            return np.frombuffer(future.result() if future else self._fetch(piece), dtype=self._dtype)
        size = BLOCK_BYTES // self._dtype.itemsize
        starts = range(piece.start // size * size, piece.end, size)
        blocks = (Piece(piece.shard, start, min(piece.shard.tokens, start + size)) for start in starts)
        tokens = np.frombuffer(b"".join(map(self._blocks, blocks)), dtype=self._dtype)
        return tokens[piece.start - starts.start : piece.end - starts.start]

    def read_ahead(self, pieces: Iterable[Piece]) -> None:
        """Begins to read these scattered pieces, in order, and holds them until they are read; those named before and
        not now are dropped. Raises `TokenStoreError` for a shard that was to come near and has other bytes."""
        if self._near.altered:
            raise TokenStoreError(f"{self._near.altered[0]}; delete it and tokenize again")
        wanted = dict.fromkeys(piece for piece in pieces if not self._is_near(piece.shard))
        for piece in self._ahead.keys() - wanted.keys():
            self._ahead.pop(piece).cancel()
        for piece in wanted:
            if piece not in self._ahead:
                self._ahead[piece] = self._threads.submit(self._fetch, piece)

    def bring_near(self, shards: Iterable[Shard]) -> None:
        """Begins to copy these shards to this node's disk, in order, as many as have room there."""
        self._copies.mapped.cache_clear()  # a copy that is removed takes space while it is mapped
        self._near.want([Entry(each.file, each.tokens * self._dtype.itemsize, each.sha256) for each in shards])

    def _is_near(self, shard: Shard) -> bool:
        with suppress(FileNotFoundError):
            return bool(self._copies.mapped(shard).size)
        return False

    def _fetch(self, piece: Piece) -> bytes:
        itemsize = self._dtype.itemsize
        return self._storage.read_bytes(piece.shard.file, start=piece.start * itemsize, end=piece.end * itemsize)

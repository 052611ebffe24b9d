"""Reads tokens of shards: by memory map on a disk, elsewhere by ranged reads, cached and read ahead within a bound."""

from collections import OrderedDict, deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cluster.storage.uris import Storage
from jobs.tokens.token_store import Shard

Tokens = npt.NDArray[Any]

BLOCK_BYTES = 1 << 20  # the unit of sequential reads, whose neighbors share a block
_MAX_MAPS = 256  # each holds a file open; a process may have 1,024
_NUM_THREADS = 8  # of read-ahead; boto3 keeps ten connections


class Piece(NamedTuple):
    """Tokens [start, end) of a shard."""

    shard: Shard
    start: int
    end: int


def open_shards(storage: Storage, *, dtype: np.dtype[Any], cache_bytes: int) -> "_MappedShards | RemoteShards":
    """Returns a reader, for one thread, that opens no shard before the first read."""
    if storage.local_path("") is not None:
        return _MappedShards(storage, dtype)
    return RemoteShards(storage, dtype, max_bytes=cache_bytes)


class _MappedShards:
    """Keeps the most recently used shards mapped; the page cache does the rest."""

    def __init__(self, storage: Storage, dtype: np.dtype[Any]) -> None:
        self._storage, self._dtype = storage, dtype
        self._mapped = lru_cache(_MAX_MAPS)(self._map)

    def read(self, piece: Piece, *, scattered: bool) -> Tokens:
        return self._mapped(piece.shard)[piece.start : piece.end]

    def _map(self, shard: Shard) -> Tokens:
        path = self._storage.local_path(shard.file)
        assert path is not None
        return np.memmap(path, dtype=self._dtype, mode="r", shape=(shard.tokens,))

    def read_ahead(self, pieces: Iterable[Piece]) -> None:
        """Does nothing: a page fault costs less than a thread."""


class RemoteShards:
    """Reads by ranged requests, and caches up to `max_bytes` of pieces read lately or read ahead by a few threads.

    Pieces already read make room for those read ahead. A piece that finds no room is read anyway, and not kept.
    """

    def __init__(self, storage: Storage, dtype: np.dtype[Any], *, max_bytes: int) -> None:
        self._storage, self._dtype, self._max_bytes = storage, dtype, max_bytes
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="read-ahead")  # starts them when needed
        self._queue: deque[Piece] = deque()
        self._ahead: dict[Piece, Future[bytes]] = {}  # being read or already read, not requested yet
        self._used: OrderedDict[Piece, bytes] = OrderedDict()  # the last used last
        self.held_bytes = 0

    def read(self, piece: Piece, *, scattered: bool) -> Tokens:
        """Returns the tokens of the piece; `scattered` means that its neighbors will not be read soon.

        Raises what the storage raises, also for a piece that was read ahead; another call tries again.
        """
        if scattered:
            return np.frombuffer(self._bytes(piece), dtype=self._dtype)
        size = BLOCK_BYTES // self._dtype.itemsize
        starts = range(piece.start // size * size, piece.end, size)
        blocks = (Piece(piece.shard, start, min(piece.shard.tokens, start + size)) for start in starts)
        tokens = np.frombuffer(b"".join(map(self._bytes, blocks)), dtype=self._dtype)
        return tokens[piece.start - starts.start : piece.end - starts.start]

    def read_ahead(self, pieces: Iterable[Piece]) -> None:
        """Reads these scattered pieces next, in order, instead of those named before and not requested yet."""
        wanted = dict.fromkeys(pieces)
        for old, future in list(self._ahead.items()):
            if old not in wanted and (future.cancel() or future.done()):
                del self._ahead[old]
                self.held_bytes -= self._size(old)
        self._queue = deque(wanted)
        self._fill()

    def _bytes(self, piece: Piece) -> bytes:
        if piece in self._used:
            self._used.move_to_end(piece)
            return self._used[piece]
        future = self._ahead.pop(piece, None)
        if future is not None:
            self.held_bytes -= self._size(piece)
            data = future.result()
        else:
            if self._queue and self._queue[0] == piece:
                self._queue.popleft()
            data = self._fetch(piece)
        if self._make_room(piece):
            self._used[piece] = data
            self.held_bytes += self._size(piece)
        self._fill()
        return data

    def _fill(self) -> None:
        while self._queue:
            first = self._queue[0]
            if first not in self._ahead and first not in self._used:
                if not self._make_room(first):
                    return
                self._ahead[first] = self._threads.submit(self._fetch, first)
                self.held_bytes += self._size(first)
            self._queue.popleft()

    def _make_room(self, piece: Piece) -> bool:
        while self._used and self.held_bytes + self._size(piece) > self._max_bytes:
            self.held_bytes -= self._size(self._used.popitem(last=False)[0])
        return self.held_bytes + self._size(piece) <= self._max_bytes

    def _fetch(self, piece: Piece) -> bytes:
        itemsize = self._dtype.itemsize
        return self._storage.read_bytes(piece.shard.file, start=piece.start * itemsize, end=piece.end * itemsize)

    def _size(self, piece: Piece) -> int:
        return (piece.end - piece.start) * self._dtype.itemsize

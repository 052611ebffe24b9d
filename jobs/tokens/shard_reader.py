"""Reads tokens of shards: by memory map on a disk, elsewhere by ranged reads, cached and read ahead within a bound."""

from collections import OrderedDict, deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
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


def open_shards(storage: Storage, *, dtype: np.dtype[Any], cache_bytes: int) -> "_MappedShards | _RemoteShards":
    """Returns a reader, for one thread, that opens no shard before the first read."""
    if storage.local_path("") is not None:
        return _MappedShards(storage, dtype)
    return _RemoteShards(RangeCache(storage, max_bytes=cache_bytes), dtype)


class _MappedShards:
    """Keeps the most recently used shards mapped; the page cache does the rest."""

    def __init__(self, storage: Storage, dtype: np.dtype[Any]) -> None:
        self._storage, self._dtype = storage, dtype
        self._maps: OrderedDict[str, Tokens] = OrderedDict()

    def read(self, piece: Piece, *, scattered: bool) -> Tokens:
        file = piece.shard.file
        if file not in self._maps:
            path = self._storage.local_path(file)
            assert path is not None
            self._maps[file] = np.memmap(path, dtype=self._dtype, mode="r", shape=(piece.shard.tokens,))
            if len(self._maps) > _MAX_MAPS:
                self._maps.popitem(last=False)
        self._maps.move_to_end(file)
        return self._maps[file][piece.start : piece.end]

    def read_ahead(self, pieces: Iterable[Piece]) -> None:
        """Does nothing: a page fault costs less than a thread."""


class _RemoteShards:
    def __init__(self, cache: "RangeCache", dtype: np.dtype[Any]) -> None:
        self._cache, self._dtype = cache, dtype

    def read(self, piece: Piece, *, scattered: bool) -> Tokens:
        """Returns the tokens of the piece; `scattered` means that its neighbors will not be read soon."""
        wanted = self._range(piece)
        if scattered:
            return np.frombuffer(self._cache.read(wanted), dtype=self._dtype)
        size = piece.shard.tokens * self._dtype.itemsize
        starts = range(wanted.start // BLOCK_BYTES * BLOCK_BYTES, wanted.end, BLOCK_BYTES)
        blocks = [self._cache.read(Range(wanted.file, start, min(size, start + BLOCK_BYTES))) for start in starts]
        data = b"".join(blocks)[wanted.start - starts.start : wanted.end - starts.start]
        return np.frombuffer(data, dtype=self._dtype)

    def read_ahead(self, pieces: Iterable[Piece]) -> None:
        """Names the scattered pieces that are read next, in order, replacing those named before."""
        self._cache.read_ahead(self._range(piece) for piece in pieces)

    def _range(self, piece: Piece) -> "Range":
        return Range(piece.shard.file, piece.start * self._dtype.itemsize, piece.end * self._dtype.itemsize)


class Range(NamedTuple):
    """Bytes [start, end) of a file."""

    file: str
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


class RangeCache:
    """Caches up to `max_bytes` of the ranges read lately and of those that a few threads read ahead.

    Ranges already read make room for those read ahead. A range that finds no room is read anyway, and not kept.
    """

    def __init__(self, storage: Storage, *, max_bytes: int) -> None:
        self._storage, self._max_bytes = storage, max_bytes
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="read-ahead")  # starts them when needed
        self._queue: deque[Range] = deque()
        self._ahead: dict[Range, Future[bytes]] = {}  # being read or already read, not requested yet
        self._used: OrderedDict[Range, bytes] = OrderedDict()  # the last used last
        self.held_bytes = 0

    def read(self, wanted: Range) -> bytes:
        """Raises what the storage raises, also for a range that was read ahead; another call tries again."""
        if wanted in self._used:
            self._used.move_to_end(wanted)
            return self._used[wanted]
        future = self._ahead.pop(wanted, None)
        if future is not None:
            self.held_bytes -= wanted.size
            data = future.result()
        else:
            if self._queue and self._queue[0] == wanted:
                self._queue.popleft()
            data = self._storage.read_bytes(wanted.file, start=wanted.start, end=wanted.end)
        if self._make_room(wanted.size):
            self._used[wanted] = data
            self.held_bytes += wanted.size
        self._fill()
        return data

    def read_ahead(self, ranges: Iterable[Range]) -> None:
        """Reads these next, in order, instead of those named before and not requested yet."""
        wanted = dict.fromkeys(ranges)
        for old, future in list(self._ahead.items()):
            if old not in wanted and (future.cancel() or future.done()):
                del self._ahead[old]
                self.held_bytes -= old.size
        self._queue = deque(wanted)
        self._fill()

    def _fill(self) -> None:
        while self._queue:
            first = self._queue[0]
            if first not in self._ahead and first not in self._used:
                if not self._make_room(first.size):
                    return
                self._ahead[first] = self._threads.submit(
                    self._storage.read_bytes, first.file, start=first.start, end=first.end
                )
                self.held_bytes += first.size
            self._queue.popleft()

    def _make_room(self, size: int) -> bool:
        while self._used and self.held_bytes + size > self._max_bytes:
            self.held_bytes -= self._used.popitem(last=False)[0].size
        return self.held_bytes + size <= self._max_bytes

"""Rows of tokens by number from a token store: by memory map on disk, by cached ranged reads elsewhere."""

from collections import OrderedDict
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch

from cluster.storage import Storage
from jobs.token_store import Manifest, Shard, Split, TokenStoreError, read_manifest, token_dtype

Tokens = npt.NDArray[Any]

_BLOCK_BYTES = 1 << 20


class _ShardReader(Protocol):
    def read(self, start: int, end: int) -> Tokens:
        """Tokens [start, end) of the shard."""


class BlockCache:
    """The most recently used blocks of remote shards, at most `cache_bytes` of them (one at least)."""

    def __init__(self, storage: Storage, cache_bytes: int) -> None:
        self._storage = storage
        self._max_blocks = max(1, cache_bytes // _BLOCK_BYTES)
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    def block(self, file: str, number: int, size: int) -> bytes:
        key = (file, number)
        if key not in self._blocks:
            start = number * _BLOCK_BYTES
            self._blocks[key] = self._storage.read_bytes(file, start=start, end=min(size, start + _BLOCK_BYTES))
            if len(self._blocks) > self._max_blocks:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(key)
        return self._blocks[key]

    @property
    def held_bytes(self) -> int:
        return sum(len(block) for block in self._blocks.values())


class _MappedShard:
    def __init__(self, path: Any, shard: Shard, dtype: np.dtype[Any]) -> None:
        self._tokens = np.memmap(path, dtype=dtype, mode="r", shape=(shard.tokens,))

    def read(self, start: int, end: int) -> Tokens:
        return self._tokens[start:end]


class _RemoteShard:
    def __init__(self, cache: BlockCache, shard: Shard, dtype: np.dtype[Any]) -> None:
        self._cache = cache
        self._file = shard.file
        self._dtype = dtype
        self._size = shard.tokens * dtype.itemsize

    def read(self, start: int, end: int) -> Tokens:
        first, last = start * self._dtype.itemsize, end * self._dtype.itemsize
        numbers = range(first // _BLOCK_BYTES, (last - 1) // _BLOCK_BYTES + 1)
        data = b"".join(self._cache.block(self._file, number, self._size) for number in numbers)
        skipped = numbers.start * _BLOCK_BYTES
        return np.frombuffer(data[first - skipped : last - skipped], dtype=self._dtype)


class TokenStream:
    """The split's shards end to end, cut into rows of `seq_len` tokens and the one that follows.

    Row i is tokens [i*T, i*T + T], both ends included: no token is a target twice. For one thread.
    """

    def __init__(self, manifest: Manifest, shards: list[Shard], readers: list[_ShardReader], *, seq_len: int) -> None:
        self.manifest = manifest
        self.seq_len = seq_len
        self._readers = readers
        self._ends = np.cumsum([shard.tokens for shard in shards])

    @classmethod
    def open(cls, storage: Storage, *, split: Split, seq_len: int, cache_bytes: int = 64 << 20) -> Self:
        """Raises `TokenStoreError` for a store that is unfinished or damaged, or too small for one row."""
        manifest = read_manifest(storage)
        shards = [shard for shard in manifest.shards if shard.split == split]
        tokens = manifest.total("tokens", split)
        if tokens <= seq_len:
            raise TokenStoreError(
                f"the {split} split of {storage.uri} has {tokens} tokens, a row needs {seq_len + 1} "
                f"(train.seq_len + 1); add text, "
                f"{'raise data.val_fraction, ' if split == 'val' else ''}or lower train.seq_len"
            )
        dtype = token_dtype(manifest.vocab_size)
        cache = BlockCache(storage, cache_bytes)
        readers: list[_ShardReader] = []
        for shard in shards:
            path = storage.local_path(shard.file)
            readers.append(_MappedShard(path, shard, dtype) if path else _RemoteShard(cache, shard, dtype))
        return cls(manifest, shards, readers, seq_len=seq_len)

    @property
    def num_tokens(self) -> int:
        return int(self._ends[-1])

    @property
    def num_rows(self) -> int:
        return (self.num_tokens - 1) // self.seq_len

    def rows(self, indices: npt.ArrayLike) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (B, T) and targets (B, T), int64: targets are the inputs moved on by one token."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < self.num_rows:
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} asked, the stream has {self.num_rows}")
        tokens = np.empty((len(wanted), self.seq_len + 1), dtype=np.int64)  # (B, T + 1)
        for row, index in zip(tokens, wanted.tolist(), strict=True):
            self._fill(row, index * self.seq_len)
        batch = torch.from_numpy(tokens)
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def _fill(self, row: npt.NDArray[np.int64], position: int) -> None:
        """Tokens from `position` of the stream on; a row may lie across shards."""
        filled = 0
        while filled < len(row):
            number = int(np.searchsorted(self._ends, position, side="right"))
            shard_start = int(self._ends[number - 1]) if number else 0
            count = min(len(row) - filled, int(self._ends[number]) - position)
            start = position - shard_start
            row[filled : filled + count] = self._readers[number].read(start, start + count)
            filled += count
            position += count

"""Reads rows of tokens by number from a token store."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cluster.storage.file_cache import FileCache
from cluster.storage.uris import Storage, StorageError
from jobs.tokens.batch_plan import SampleOrder
from jobs.tokens.division import BY_DOCUMENTS, Division, texts_of, whole
from jobs.tokens.holes import NO_HOLES, HoleMap, Holes
from jobs.tokens.shard_reader import Piece, ShardReader
from jobs.tokens.token_store import Shard, Split, TokenStoreError, read_list, read_manifest
from model.linear_cross_entropy import IGNORE_INDEX

# Lists of shards at once, of a source: the samples of a window are in the shards of two lists
_OPEN_LISTS = 8
# Looks for the shards that the next samples need; a window is that of the shuffle
_LOOKS_A_WINDOW = 8
_SAMPLES_A_LOOK = 4096
_LEAST_SHARE = 16  # a run that ends within this share of a window reads its rows one by one


class ShardChain:
    """Pieces of shards end to end. Row i is tokens i*T to i*T + T inclusive, so no token is a
    target twice."""

    def __init__(
        self, text: Iterable[Piece], read_list: Callable[[Shard], Sequence[Shard]] = lambda _: ()
    ) -> None:
        self.text = tuple(text)
        self._opened = lru_cache(_OPEN_LISTS)(lambda listed: ShardChain(whole(read_list(listed))))
        self._ends = np.cumsum([piece.end - piece.start for piece in self.text], dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def num_rows(self, seq_len: int) -> int:
        return max(0, (self.num_tokens - 1) // seq_len)

    def row(self, index: int, seq_len: int) -> Iterator[Piece]:
        """Yields the pieces of shards that hold the row's T + 1 tokens."""
        return self.pieces(index * seq_len, index * seq_len + seq_len + 1)

    def pieces(self, position: int, end: int) -> Iterator[Piece]:
        """Yields the pieces of shards that hold tokens [position, end)."""
        while position < end:
            number = int(np.searchsorted(self._ends, position, side="right"))
            stop = min(end, int(self._ends[number]))
            shard, _, last = self.text[number]
            # A token's place in its shard, less its place here
            offset = last - int(self._ends[number])
            if shard.is_list:
                yield from self._opened(shard).pieces(position + offset, stop + offset)
            else:
                yield Piece(shard, position + offset, stop + offset)
            position = stop

    def bytes_per_token(self, num_tokens: int) -> float:
        """Returns the bytes of text per token of the shards that hold the first `num_tokens`; later
        shards change nothing."""
        shards = [piece.shard for piece in self.pieces(0, num_tokens)]
        num_bytes = sum(shard.bytes for shard in shards)
        return num_bytes / sum(shard.tokens for shard in shards)


class TokenStream:
    """A split's rows of `seq_len` tokens and the token that follows, in the store's order or in the
    run's."""

    def __init__(
        self,
        storage: Storage,
        *,
        split: Split,
        seq_len: int,
        seed: int = 0,
        window_rows: int = 1,
        num_samples: int = 0,
        near_bytes: int = 0,
        division: Division = BY_DOCUMENTS,
        holes: Holes = NO_HOLES,
    ) -> None:
        """Opens a store, for one thread.

        `seed` and `window_rows` shape `samples`, of which the run reads the first `num_samples`:
        where that is a good part of a window, up to `near_bytes` of a remote store's shards are
        copied to this node. What is in `holes` is read as end-of-text tokens that do not count. Raises
        `TokenStoreError` for a store that is unfinished, damaged or too small for one row, and for
        holes of another store.
        """
        self.seq_len = seq_len
        self._window_rows = window_rows
        self._num_samples = num_samples
        self._turn = -1
        self._is_here = storage.local_path("") is not None
        # Which are copied, or will be as far as there is room
        self.near_shards: dict[Shard, None] = {}
        self.manifest = manifest = read_manifest(storage, opens_lists=False)
        self._holes = HoleMap(holes, manifest)
        near = FileCache(storage, Path.home() / ".cache/raymill/shards", max_bytes=near_bytes)
        self._reader = ShardReader(storage, manifest.dtype, near=near)
        read_shards = partial(read_list, storage, itemsize=manifest.dtype.itemsize)
        texts = texts_of(manifest, split, division)
        self._sources = [ShardChain(text, read_shards) for text in texts]
        self._all = (
            self._sources[0]
            if len(texts) == 1
            else ShardChain(chain.from_iterable(texts), read_shards)
        )
        num_rows = tuple(source.num_rows(seq_len) for source in self._sources)
        if 0 in num_rows:
            source = num_rows.index(0)
            place = f"source {source}" if len(texts) > 1 else storage.uri
            raise TokenStoreError(
                f"the {split} split of {place} has {self._sources[source].num_tokens} tokens, a row needs "
                f"{seq_len + 1} (train.seq_len + 1); add text, or lower train.seq_len"
            )
        weights = manifest.weights if split == "train" else ()
        self.order = SampleOrder(seed, window_rows, num_rows, weights)

    def count_rows(self, *, at_most: float = math.inf) -> int:
        """Returns the number of rows, or `at_most` where there are more."""
        return int(min(self._all.num_rows(self.seq_len), at_most))

    def bytes_per_token(self, num_rows: int) -> float:
        """Returns the bytes of text per token over the shards that hold the first `num_rows`
        rows."""
        return self._all.bytes_per_token(num_rows * self.seq_len + 1)

    def rows(self, indices: npt.ArrayLike) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns inputs (B, T) and targets (B, T), the next tokens, int64, of rows by their number
        in the store; IGNORE_INDEX where the loss does not count them, as all that is no answer in a
        conversation, and what is in a hole."""
        wanted = np.asarray(indices, dtype=np.int64)
        num_rows = self.count_rows()
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < num_rows:
            raise IndexError(
                f"rows {wanted.min()} to {wanted.max()} were asked for, the stream has {num_rows}"
            )
        return self._batch(
            [self._all.row(index, self.seq_len) for index in wanted.tolist()], scattered=False
        )

    def samples(self, indices: npt.ArrayLike) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns inputs (B, T) and targets (B, T), int64, of samples by their global index, in the
        run's order."""
        return self._batch(self._places(np.asarray(indices)), scattered=True)

    def read_ahead(self, indices: npt.ArrayLike) -> None:
        """Starts reading the next samples of a remote store, and copying the shards of those to
        come; never waits."""
        if self._is_here:
            return  # a page fault costs less than a thread
        wanted = np.asarray(indices)
        with suppress(StorageError):  # which the rows' own read meets again, where it is waited for
            if wanted.size:
                self._bring_near(int(wanted.min()))
            self._reader.read_ahead(chain.from_iterable(self._places(wanted)))

    def _bring_near(self, first: int) -> None:
        """Has the shards of the next window of samples copied. Some thousand of them tell which: a
        shard that none of these hits has few rows in the window."""
        window = min(self._window_rows, sum(self.order.num_rows))
        turn = first // max(1, window // _LOOKS_A_WINDOW)
        num_left = self._num_samples - first
        if turn == self._turn or num_left <= window // _LEAST_SHARE:
            return
        step = -(-window // _SAMPLES_A_LOOK)
        ahead = np.arange(first, first + min(window, num_left), step)
        # As sources take turns at regular places
        ahead += np.random.default_rng(0).integers(0, step, len(ahead))
        shards = dict.fromkeys(piece.shard for piece in chain.from_iterable(self._places(ahead)))
        if shards.keys() != self.near_shards.keys():
            self._reader.bring_near(shards)
        self._turn, self.near_shards = turn, shards

    def _places(self, samples: npt.NDArray[np.int64]) -> list[Iterator[Piece]]:
        sources, rows = self.order.rows(samples)
        pairs = zip(sources.tolist(), rows.tolist(), strict=True)
        return [self._sources[source].row(row, self.seq_len) for source, row in pairs]

    def _batch(
        self, places: list[Iterator[Piece]], *, scattered: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = np.empty((len(places), self.seq_len + 1), dtype=np.int64)  # (B, T + 1)
        read = partial(self._reader.read, scattered=scattered)
        for row, place in zip(tokens, places, strict=True):
            pieces = [*place]
            np.concatenate([read(piece) for piece in pieces], out=row)
            self._holes.cover(row, pieces, token=~self.manifest.eot_id)
        batch = torch.from_numpy(tokens)
        inputs = batch[:, :-1].contiguous()
        targets = batch[:, 1:].contiguous()
        if not self.manifest.chat and not self._holes:
            return inputs, targets
        # An uncounted id is stored as ~id.
        return inputs.maximum(~inputs), targets.where(targets >= 0, IGNORE_INDEX)

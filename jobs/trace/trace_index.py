"""Defines the trace index of a token store: from the hash of a chosen window to its places.

It lies under `trace/` in the store's folder, and `trace/index.json` lists its parts. A window
belongs to the part that the remainder of its hash gives. A part is three tables end to end, each in
the order of the keys: every 1,024th key, the keys (the upper 32 bits of the hash), and the places.
A reader maps them, or takes a few kilobytes of them by range. Two windows may share a key, so a place is only a
hint: who reads it compares the tokens.
"""

import mmap
import os
import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from cluster.storage.file_cache import FileCache
from cluster.storage.uris import Entry, NotFoundError, Storage
from jobs.tokens.token_store import Manifest, TokenStoreError, canonical_json
from jobs.trace.windows import GROUP_WINDOWS, WINDOW_TOKENS, Ids, Places

TRACE = "trace"
INDEX = "index.json"
MOST_PLACE_BYTES = 5
KEY = np.dtype("<u4")

_FORMAT = 1
_BLOCK_KEYS = 1024
_OPEN_PARTS, _OPEN_BLOCKS = 256, 1024
_READERS = 16  # requests at once

Keys = npt.NDArray[np.uint32]


class TraceIndexError(TokenStoreError):
    """A token store has no trace index, a damaged one, or one of another store."""


@dataclass(frozen=True)
class Part:
    """One file of the index."""

    file: str  # under `trace/`
    entries: int
    sha256: str


@dataclass(frozen=True)
class IndexList:
    """The content of `trace/index.json`. It is written last: without it there is no index."""

    manifest_hash: str  # of the store that the index belongs to
    place_bytes: int  # of a place: a token's number in the store, its shards end to end
    parts: tuple[Part, ...]
    window_tokens: int = WINDOW_TOKENS
    group_windows: int = GROUP_WINDOWS
    format_version: int = _FORMAT

    @property
    def entries(self) -> int:
        return sum(part.entries for part in self.parts)

    @property
    def num_bytes(self) -> int:
        return sum(part_bytes(part.entries, self.place_bytes) for part in self.parts)

    def to_json(self) -> bytes:
        return canonical_json(vars(self) | {"parts": [vars(part) for part in self.parts]})


_LIST = TypeAdapter(IndexList)


class Hits(NamedTuple):
    """The places of a window in the store: the first ones, and how many there are."""

    places: Places
    total: int


_NO_HITS = Hits(np.zeros(0, np.int64), 0)


def keys_of(hashes: Ids) -> Keys:
    return (hashes >> 32).astype(KEY)


def part_content(keys: Keys, places: Ids, *, place_bytes: int) -> list[bytes]:
    """Returns the tables of a part, from keys (E,) in order and their places (E,)."""
    packed = places.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :place_bytes]
    return [keys[::_BLOCK_KEYS].tobytes(), keys.tobytes(), packed.tobytes()]


def part_bytes(entries: int, place_bytes: int) -> int:
    return (_num_blocks(entries) + entries) * KEY.itemsize + entries * place_bytes


def bytes_for(num_tokens: int) -> int:
    """Returns the bytes of a place in a store of so many tokens. Raises `TraceIndexError`."""
    num_bytes = max(1, (num_tokens.bit_length() + 7) // 8)
    if num_bytes > MOST_PLACE_BYTES:
        raise TraceIndexError(
            f"the store has {num_tokens:,} tokens, and an index holds at most "
            f"{1 << 8 * MOST_PLACE_BYTES:,}; divide the corpus into several stores"
        )
    return num_bytes


def read_list(store: Storage) -> IndexList | None:
    """Returns the list of a store's index, None where there is none. Raises `TraceIndexError`."""
    content = store.find_bytes(f"{TRACE}/{INDEX}")
    if content is None:
        return None
    try:
        listed = _LIST.validate_json(content)
    except ValueError as error:
        raise _damaged(store, INDEX) from error
    kind = (listed.format_version, listed.window_tokens, listed.group_windows)
    if kind != (_FORMAT, WINDOW_TOKENS, GROUP_WINDOWS):
        raise TraceIndexError(
            f"{store.uri}/{TRACE}/{INDEX} has another format; `raymill trace index {shlex.quote(store.uri)}` "
            "makes a new one"
        )
    return listed


class TraceIndex:
    """The index of a store. It is mapped where its parts or copies of them are on a disk of this
    machine, so that the processes that search it share the pages; else it is read by ranges."""

    def __init__(
        self, store: Storage, manifest: Manifest, *, near: FileCache | None = None
    ) -> None:
        """Reads the list. `near` has copies on this node's disk of the parts of a remote index.
        Raises `TraceIndexError` where there is none, or another store's."""
        listed = read_list(store)
        if listed is None:
            raise TraceIndexError(
                f"{store.uri} has no trace index; `raymill trace index {shlex.quote(store.uri)}` makes it"
            )
        if listed.manifest_hash != manifest.hash:
            raise TraceIndexError(
                f"{store.uri}/{TRACE}/{INDEX} belongs to the store with the manifest hash "
                f"{listed.manifest_hash}, this store has {manifest.hash}; "
                f"`raymill trace index {shlex.quote(store.uri)}` makes its own"
            )
        self.listed = listed
        self._store, self._near = store, near
        self._part = lru_cache(_OPEN_PARTS)(self._map)
        self._fences = lru_cache(_OPEN_PARTS)(self._read_fences)
        self._block = lru_cache(_OPEN_BLOCKS)(self._read_block)

    def bring_near(self) -> None:
        """Begins to copy the parts to this node's disk, as many as have room there."""
        if self._near is not None:
            entries: list[Entry] = []
            for part in self.listed.parts:
                size = part_bytes(part.entries, self.listed.place_bytes)
                entries.append(Entry(f"{TRACE}/{part.file}", size, part.sha256))
            self._near.want(entries)

    def find(self, window_hashes: Sequence[int], *, most: int) -> list[Hits]:
        """Returns up to `most` places of each window, the first ones of the store."""
        find_one = partial(self._find, most=most)
        if self._store.local_path(TRACE) is not None:
            return [find_one(window) for window in window_hashes]
        with ThreadPoolExecutor(_READERS) as pool:  # a request is little but waiting
            return [*pool.map(find_one, window_hashes)]

    def _find(self, window_hash: int, *, most: int) -> Hits:
        number = window_hash % len(self.listed.parts)
        key = KEY.type(window_hash >> 32)
        fences = self._fences(number)
        end_block = int(fences.searchsorted(key, side="right"))
        if not end_block:
            return _NO_HITS
        first_block = max(0, int(fences.searchsorted(key)) - 1)
        last = self._block(number, end_block - 1)
        end = int(last.searchsorted(key, side="right")) + (end_block - 1) * _BLOCK_KEYS
        in_first = last if first_block == end_block - 1 else self._block(number, first_block)
        first = int(in_first.searchsorted(key)) + first_block * _BLOCK_KEYS
        if first == end:
            return _NO_HITS
        return Hits(self._places(number, first, min(end, first + most)), end - first)

    def _read_fences(self, number: int) -> Keys:
        num_blocks = _num_blocks(self.listed.parts[number].entries)
        return np.frombuffer(self._read(number, 0, num_blocks * KEY.itemsize), KEY)

    def _read_block(self, number: int, block: int) -> Keys:
        entries = self.listed.parts[number].entries
        first = block * _BLOCK_KEYS
        end = min(entries, first + _BLOCK_KEYS)
        start = _num_blocks(entries)
        content = self._read(number, (start + first) * KEY.itemsize, (start + end) * KEY.itemsize)
        return np.frombuffer(content, KEY)

    def _places(self, number: int, first: int, end: int) -> Places:
        entries, size = self.listed.parts[number].entries, self.listed.place_bytes
        start = (_num_blocks(entries) + entries) * KEY.itemsize
        content = self._read(number, start + first * size, start + end * size)
        wide = np.zeros((end - first, 8), np.uint8)
        wide[:, :size] = np.frombuffer(content, np.uint8).reshape(-1, size)
        return wide.view("<i8")[:, 0].astype(np.int64)

    def _read(self, number: int, start: int, end: int) -> bytes | memoryview:
        """Returns bytes [start, end) of a part. Raises `TraceIndexError` where it is not whole."""
        if start == end:
            return b""
        with suppress(FileNotFoundError):
            return self._part(number)[start:end]
        file = self.listed.parts[number].file
        content = b""
        with suppress(NotFoundError):
            content = self._store.read_bytes(f"{TRACE}/{file}", start=start, end=end)
        if len(content) != end - start:
            raise _damaged(self._store, file)
        return content

    def _map(self, number: int) -> memoryview:
        """Raises `FileNotFoundError` for a part of which nothing is on this machine, and
        `TraceIndexError` for one that was cut off."""
        part = self.listed.parts[number]
        path = self._store.local_path(f"{TRACE}/{part.file}")
        if path is None and self._near is not None:
            path = self._near.folder / part.sha256
        if path is None:
            raise FileNotFoundError(part.file)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != part_bytes(part.entries, self.listed.place_bytes):
                raise _damaged(self._store, part.file)
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _num_blocks(entries: int) -> int:
    return -(-entries // _BLOCK_KEYS)


def _damaged(store: Storage, file: str) -> TraceIndexError:
    return TraceIndexError(
        f"{store.uri}/{TRACE}/{file} is missing or damaged; `raymill trace index {shlex.quote(store.uri)}` makes "
        "it again"
    )

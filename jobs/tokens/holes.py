"""Defines the holes of a token store: the tokens of documents that a run is to be without.

A run reads an end-of-text token in place of each token of a hole, and its loss counts none of them.
All other tokens stay where they are, in their steps, and no shard is written again. A list of holes
lies under `forgotten/` in the storage, named by the SHA-256 of its own bytes, which is the value of
`data.forgotten`: so the settings of a run say what it never read.
"""

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from cluster.storage.uris import Storage
from jobs.tokens.shard_reader import Piece
from jobs.tokens.token_store import Manifest, TokenStoreError, canonical_json

Marks = npt.NDArray[np.bool_]

FORGOTTEN = "forgotten"
"""The folder of the lists, in the storage."""


@dataclass(frozen=True, order=True)
class Hole:
    """Tokens [start, end) of a shard: a whole document, with its end-of-text token."""

    shard: str  # file
    start: int
    end: int
    sha256: str  # of the document's tokens, as the shard has them

    @property
    def tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Holes:
    """The content of a list."""

    data_identity: str  # of the token store that they are in
    holes: tuple[Hole, ...]  # in the order of shards and places; none overlaps another

    @classmethod
    def of(cls, manifest: Manifest, holes: Iterable[Hole]) -> "Holes":
        """Returns the holes in order, each once."""
        return cls(manifest.identity, tuple(sorted(set(holes))))

    def __len__(self) -> int:
        return len(self.holes)

    @property
    def tokens(self) -> int:
        return sum(hole.tokens for hole in self.holes)

    def to_json(self) -> bytes:
        return canonical_json(vars(self) | {"holes": [vars(hole) for hole in self.holes]})

    @property
    def hash(self) -> str:
        """The list's name, and the value of `data.forgotten`."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def store(self, storage: Storage) -> None:
        """Writes the list where `read_holes` finds it."""
        storage.write_bytes(_file(self.hash), self.to_json())


NO_HOLES = Holes("", ())
_LIST = TypeAdapter(Holes)


def read_holes(storage: Storage, name: str | None) -> Holes:
    """Returns the holes of the list with this hash, none without a name. Raises
    `TokenStoreError`."""
    if name is None:
        return NO_HOLES
    content = storage.find_bytes(_file(name)) or b""
    if hashlib.sha256(content).hexdigest() != name:
        raise TokenStoreError(
            f"{storage.uri}/{_file(name)} is {'another one than its name says' if content else 'missing'}: it lists "
            "the documents that data.forgotten leaves out; put it back from a copy"
        )
    try:
        listed = _LIST.validate_json(content)
    except ValueError as error:
        raise TokenStoreError(
            f"{storage.uri}/{_file(name)} is no list of holes ({error})"
        ) from error
    if problem := disorder_of(listed):
        raise TokenStoreError(f"{storage.uri}/{_file(name)}: {problem}")
    return listed


def disorder_of(listed: Holes) -> str:
    """Says what is wrong with the order of a list; nothing where it is as it has to be."""
    before: Hole | None = None
    for hole in listed.holes:
        if not 0 <= hole.start < hole.end:
            return f"the hole {hole.start}..{hole.end} of {hole.shard} has no tokens"
        if before and before.shard == hole.shard and hole.start < before.end:
            return f"two holes of {hole.shard} overlap at token {hole.start}"
        if before and hole < before:
            return "its holes are in another order than that of shards and places"
        before = hole
    return ""


def _file(name: str) -> str:
    return f"{FORGOTTEN}/{name}.json"


class _Ranges(NamedTuple):
    """The holes of a shard, in order."""

    starts: list[int]
    ends: list[int]


class HoleMap:
    """The holes by their places, for who reads tokens."""

    def __init__(self, holes: Holes, manifest: Manifest) -> None:
        """Raises `TokenStoreError` for the holes of another store."""
        if holes and holes.data_identity != manifest.identity:
            raise TokenStoreError(
                f"data.forgotten lists documents of the token store {holes.data_identity[:12]}…, and the run reads "
                f"{manifest.identity[:12]}…: forget them in a run on that store"
            )
        self._by_shard: dict[str, _Ranges] = {}
        for hole in holes.holes:
            ranges = self._by_shard.setdefault(hole.shard, _Ranges([], []))
            ranges.starts.append(hole.start)
            ranges.ends.append(hole.end)

    def __bool__(self) -> bool:
        return bool(self._by_shard)

    def within(self, piece: Piece) -> Iterator[tuple[int, int]]:
        """Yields the tokens [start, end) of the piece's shard that are in a hole and in the
        piece."""
        ranges = self._by_shard.get(piece.shard.file)
        if ranges is None:
            return
        first = bisect_right(ranges.ends, piece.start)
        last = bisect_left(ranges.starts, piece.end)
        for start, end in zip(ranges.starts[first:last], ranges.ends[first:last], strict=True):
            yield max(start, piece.start), min(end, piece.end)

    def marks(self, piece: Piece) -> Marks:
        """Returns which tokens of a piece are in a hole."""
        marks = np.zeros(piece.end - piece.start, np.bool_)
        for start, end in self.within(piece):
            marks[start - piece.start : end - piece.start] = True
        return marks

    def cover(self, row: npt.NDArray[np.int64], pieces: Sequence[Piece], *, token: int) -> None:
        """Puts a token in place of each one of a row that is in a hole; `pieces` are what the row
        was read from, end to end."""
        place = 0
        for piece in pieces:
            for start, end in self.within(piece):
                row[place + start - piece.start : place + end - piece.start] = token
            place += piece.end - piece.start

    def outside(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Yields what the holes leave of the pieces."""
        for piece in pieces:
            start = piece.start
            for hole_start, hole_end in self.within(piece):
                if start < hole_start:
                    yield Piece(piece.shard, start, hole_start)
                start = hole_end
            if start < piece.end:
                yield Piece(piece.shard, start, piece.end)

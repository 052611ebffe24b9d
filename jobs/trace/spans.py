"""Finds the maximal spans of a text that stand word for word in a token store, by its trace index.

The text's own windows are chosen as the store's were. Each place of such a window in the store is
widened to both sides for as long as the tokens are equal, within a document. A span is maximal
where no longer one of the text holds it.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cluster.output.result_text import counted
from cluster.storage.file_cache import FileCache
from cluster.storage.uris import Storage
from jobs.tokens.shard_reader import Piece, ShardReader
from jobs.tokens.token_store import Manifest
from jobs.trace.trace_index import Hits, TraceIndex
from jobs.trace.windows import (
    LEAST_SPAN,
    WINDOW_TOKENS,
    Ids,
    Places,
    chosen_windows,
    plain_ids,
)
from raymill.errors import UserError

MOST_TEXT_TOKENS = 1 << 15
_MOST_PLACES = 1 << 14  # of a window, that are looked at
_MOST_HITS = 1 << 22  # of all windows of a text
_REACH = 64  # tokens to each side that are read at first
_BATCH = 256  # places whose first reads are asked for together


class Match(NamedTuple):
    """Tokens [start, end) of the text, which stand at a place of the store."""

    start: int
    end: int
    place: int  # of the first one in the store
    piece: Piece


@dataclass(frozen=True)
class Span:
    """A maximal span: tokens [start, end) of the text."""

    start: int
    end: int
    pieces: tuple[Piece, ...]  # where it stands, in the store's order
    # As many as its rarest window has in the store, where not all of those were looked at
    at_most: int | None


class SearchedStore:
    """The tokens of a store within the pieces that are searched; for one thread."""

    def __init__(self, store: Storage, manifest: Manifest, pieces: Iterable[Piece]) -> None:
        self.eot_id = manifest.eot_id
        # The copies that a training on this node has left there
        near = FileCache(store, Path.home() / ".cache/raymill/shards", max_bytes=0)
        self._reader = ShardReader(store, manifest.dtype, near=near)
        sizes = [shard.tokens for shard in manifest.shards]
        firsts = [0, *accumulate(sizes)]
        places = {shard.file: first for shard, first in zip(manifest.shards, firsts, strict=False)}
        placed = [(places[piece.shard.file] + piece.start, piece) for piece in pieces]
        placed.sort(key=lambda pair: pair[0])
        self._places = [place for place, _ in placed]
        self._pieces = [piece for _, piece in placed]

    def piece_at(self, place: int) -> tuple[Piece, int] | None:
        """Returns the piece that holds a token of the store, and the token's place in its shard;
        None for what is not searched."""
        number = bisect_right(self._places, place) - 1
        if number < 0:
            return None
        piece = self._pieces[number]
        token = piece.start + place - self._places[number]
        return (piece, token) if token < piece.end else None

    def read_ahead(self, pieces: Iterable[Piece]) -> None:
        self._reader.read_ahead(pieces)

    def ids(self, piece: Piece) -> Ids:
        return plain_ids(self._reader.read(piece, scattered=True))


def find_spans(
    ids: Ids, index: TraceIndex, searched: SearchedStore, *, min_tokens: int = LEAST_SPAN
) -> list[Span]:
    """Returns the maximal spans of a text's ids (N,) of at least `min_tokens`, in the order of the
    text. Raises `UserError` for a bound or a text that is too short or too long."""
    if min_tokens < LEAST_SPAN:
        raise UserError(
            f"--min-tokens {min_tokens}: the index finds spans of {LEAST_SPAN} tokens or more"
        )
    if len(ids) < min_tokens:
        raise UserError(
            f"the text has {counted(len(ids), 'token')}, and the shortest span {min_tokens:,}; give more of the text"
        )
    if len(ids) > MOST_TEXT_TOKENS:
        raise UserError(
            f"the text has {len(ids):,} tokens, and at most {MOST_TEXT_TOKENS:,} are traced at once; divide it"
        )
    starts, hashes = chosen_windows(ids, border=searched.eot_id)
    by_hash = _looked_up(index, hashes)
    matches: set[Match] = set()
    for match in _matches(ids, searched, _diagonals(starts, hashes, by_hash)):
        if match.end - match.start >= min_tokens:
            matches.add(match)
    return [
        Span(start, end, pieces, _at_most(start, end, starts, hashes, by_hash))
        for (start, end), pieces in _maximal(matches)
    ]


def num_covered(spans: Sequence[Span]) -> int:
    """Returns how many tokens of the text are in spans, which may overlap."""
    covered, end = 0, 0
    for span in spans:
        covered += span.end - max(span.start, end)
        end = span.end
    return covered


def _looked_up(index: TraceIndex, hashes: Ids) -> dict[int, Hits]:
    """Looks up each window that the text has, once."""
    wanted = np.unique(hashes).tolist()
    most = max(1, min(_MOST_PLACES, _MOST_HITS // max(1, len(hashes))))
    return dict(zip(wanted, index.find(wanted, most=most), strict=True))


def _diagonals(starts: Places, hashes: Ids, by_hash: dict[int, Hits]) -> Iterator[tuple[int, int]]:
    """Yields the windows (a token of the text, a token of the store) that have the same hash, so
    that those follow one another which would lie in one match."""
    places = [by_hash[window].places for window in hashes.tolist()]
    in_text = np.repeat(starts, [len(some) for some in places])
    in_store = np.concatenate([np.zeros(0, np.int64), *places])
    order = np.lexsort((in_text, in_store - in_text))
    yield from zip(in_text[order].tolist(), in_store[order].tolist(), strict=True)


def _matches(ids: Ids, searched: SearchedStore, hits: Iterator[tuple[int, int]]) -> Iterator[Match]:
    diagonal, end = None, 0  # of the last match
    while batch := list(islice(hits, _BATCH)):
        searched.read_ahead(_first_reads(batch, searched, len(ids)))
        for at, place in batch:
            if place - at == diagonal and at < end:
                continue
            match = _widened(ids, searched, at, place)
            if match is not None:
                diagonal, end = place - at, match.end
                yield match


def _first_reads(
    hits: Sequence[tuple[int, int]], searched: SearchedStore, num_tokens: int
) -> Iterator[Piece]:
    diagonals = set[int]()
    for at, place in hits:
        located = searched.piece_at(place)
        if located and place - at not in diagonals:
            diagonals.add(place - at)
            yield _around(*located, at, num_tokens, reach=_REACH)


def _around(piece: Piece, token: int, at: int, num_tokens: int, *, reach: int) -> Piece:
    """Returns what is read to widen a window: as far as the text, the searched piece and the reach
    go."""
    before = min(reach, at, token - piece.start)
    behind = min(reach, num_tokens - at, piece.end - token)
    return Piece(piece.shard, token - before, token + behind)


def _widened(ids: Ids, searched: SearchedStore, at: int, place: int) -> Match | None:
    """Returns the longest match that holds a window; None where the tokens are others."""
    located = searched.piece_at(place)
    if located is None:
        return None
    piece, token = located
    whole = _around(piece, token, at, len(ids), reach=len(ids))
    reach = _REACH
    while True:
        part = _around(piece, token, at, len(ids), reach=reach)
        first = at - (token - part.start)
        stored = searched.ids(part)
        differs = stored != ids[first : first + len(stored)]
        differs |= stored == searched.eot_id
        # The last difference before the window's first token, and the next one
        places = np.flatnonzero(differs) + part.start
        number = int(np.searchsorted(places, token))
        start = int(places[number - 1]) + 1 if number else part.start
        end = int(places[number]) if number < len(places) else part.end
        if end - token < WINDOW_TOKENS:
            return None
        goes_on_before = not number and part.start > whole.start
        goes_on_behind = number == len(places) and part.end < whole.end
        if not (goes_on_before or goes_on_behind):
            before = token - start
            matched = Piece(piece.shard, start, end)
            return Match(at - before, at + end - token, place - before, matched)
        reach *= 4


def _maximal(matches: set[Match]) -> Iterator[tuple[tuple[int, int], tuple[Piece, ...]]]:
    """Yields the matches that no longer one holds, those of the same tokens of the text
    together."""
    by_span: dict[tuple[int, int], list[Match]] = {}
    for match in matches:
        by_span.setdefault((match.start, match.end), []).append(match)
    furthest = 0
    for start, end in sorted(by_span, key=lambda span: (span[0], -span[1])):
        if end > furthest:
            furthest = end
            ordered = sorted(by_span[start, end], key=lambda match: match.place)
            yield (start, end), tuple(match.piece for match in ordered)


def _at_most(
    start: int, end: int, starts: Places, hashes: Ids, by_hash: dict[int, Hits]
) -> int | None:
    """Returns as many places as a span's rarest window has in the store, where not all of those
    were looked at."""
    is_within = (starts >= start) & (starts + WINDOW_TOKENS <= end)
    rarest = min(
        (by_hash[window] for window in hashes[is_within].tolist()), key=lambda hits: hits.total
    )
    return rarest.total if rarest.total > len(rarest.places) else None

"""Divides a token store's text into what trains and what validates: by whole documents, or else at
the text's end.

The store itself knows only the first way, which depends on nothing but each document's hash. The
second one is a view of the same shards, for a corpus of which whole documents would leave nothing
to train on or to validate on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from jobs.tokens.shard_reader import Piece
from jobs.tokens.token_store import Manifest, Shard, Split, TokenStoreError

Text = tuple[Piece, ...]  # pieces of shards end to end


class HeldOut(StrEnum):
    """The texts that a run keeps from its training to validate on, besides the sets of
    `data.validation`."""

    DOCUMENTS = "documents"  # whole ones, the store's split `val`
    END = "end"  # of all text, whatever the store's splits are
    NOTHING = "nothing"  # the texts of `data.validation` are all there is


@dataclass(frozen=True)
class Division:
    """The driver's decision, which the ledger records where it is not `DOCUMENTS`."""

    held_out: HeldOut = HeldOut.DOCUMENTS
    # That validate, with `END`: of the largest source, where sources have weights
    end_tokens: int = 0


BY_DOCUMENTS = Division()


def texts_of(manifest: Manifest, split: Split, division: Division) -> list[Text]:
    """Returns the text of a split, in the store's order: one of each source where `train` has
    weights, else one."""
    if division.held_out is not HeldOut.END:
        shards = [shard for shard in manifest.shards if shard.split == split]
        return (
            _by_source(shards, num_weights=len(manifest.weights))
            if split == "train"
            else [whole(shards)]
        )
    divided = _by_source(manifest.shards, num_weights=len(manifest.weights))
    largest = _largest(divided)
    front, end = _cut(divided[largest], token_count(divided[largest]) - division.end_tokens)
    return [end] if split == "val" else [*divided[:largest], front, *divided[largest + 1 :]]


def token_count(text: Text) -> int:
    return sum(piece.end - piece.start for piece in text)


def whole(shards: Sequence[Shard]) -> Text:
    """Returns the text of these shards, all of each."""
    return tuple(Piece(shard, 0, shard.tokens) for shard in shards)


def divide(manifest: Manifest, *, seq_len: int, val_fraction: float, has_sets: bool) -> Division:
    """Decides what validates a run whose rows are `seq_len` tokens and the one that follows.
    `has_sets` says that `data.validation` names texts. Raises `TokenStoreError` where nothing would
    train or validate."""
    row_tokens = seq_len + 1
    shortest = min(token_count(text) for text in texts_of(manifest, "train", BY_DOCUMENTS))
    held_out = token_count(*texts_of(manifest, "val", BY_DOCUMENTS))
    if min(shortest, held_out) >= row_tokens:
        return BY_DOCUMENTS
    if val_fraction > 0:
        return Division(
            HeldOut.END, _end_tokens(manifest, row_tokens, val_fraction, has_sets=has_sets)
        )
    if shortest < row_tokens:
        raise TokenStoreError(
            _too_few(manifest, texts_of(manifest, "train", BY_DOCUMENTS), row_tokens)
        )
    if not has_sets:
        raise TokenStoreError(
            "nothing would validate the run: data.val_fraction is 0 and data.validation names no text; leave "
            "data.val_fraction out, or name a text with data.validation NAME=SOURCE"
        )
    return Division(HeldOut.NOTHING)


def _end_tokens(manifest: Manifest, row_tokens: int, val_fraction: float, *, has_sets: bool) -> int:
    """Returns the tokens of as many whole rows as `val_fraction` of the largest source has; at
    least one row validates, and one trains."""
    divided = _by_source(manifest.shards, num_weights=len(manifest.weights))
    if min(token_count(text) for text in divided) < row_tokens:
        raise TokenStoreError(_too_few(manifest, divided, row_tokens))
    total, seq_len = token_count(divided[_largest(divided)]), row_tokens - 1
    if total < 2 * row_tokens:
        way_out = (
            "; or set data.val_fraction to 0, as data.validation has texts to validate on"
            if has_sets
            else ""
        )
        raise TokenStoreError(
            f"the text has {total:,} tokens, and its end has to be held out: a row to train and a row to validate "
            f"need {2 * row_tokens:,} (train.seq_len + 1 each); add text, or lower train.seq_len{way_out}"
        )
    num_rows = min(
        max(1, int(val_fraction * total) // seq_len), (total - row_tokens - 1) // seq_len
    )
    return num_rows * seq_len + 1


def _too_few(manifest: Manifest, divided: Sequence[Text], row_tokens: int) -> str:
    counts = [token_count(text) for text in divided]
    place = f"data.source[{counts.index(min(counts))}]" if manifest.weights else "the text"
    return (
        f"{place} has {min(counts):,} tokens to train on, a row needs {row_tokens:,} (train.seq_len + 1); add text, or "
        "lower train.seq_len"
    )


def _by_source(shards: Sequence[Shard], *, num_weights: int) -> list[Text]:
    if not num_weights:
        return [whole(shards)]
    return [
        whole([shard for shard in shards if shard.source == source])
        for source in range(num_weights)
    ]


def _largest(divided: Sequence[Text]) -> int:
    sizes = [token_count(text) for text in divided]
    return sizes.index(max(sizes))


def _cut(text: Text, place: int) -> tuple[Text, Text]:
    """Cuts a text before its token number `place`."""
    front, end = list[Piece](), list[Piece]()
    for piece in text:
        border = min(max(piece.start, piece.start + place), piece.end)
        if border > piece.start:
            front.append(piece._replace(end=border))
        if border < piece.end:
            end.append(piece._replace(start=border))
        place -= piece.end - piece.start
    return tuple(front), tuple(end)

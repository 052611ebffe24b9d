"""Decides which documents repeat or resemble an earlier one: among the documents of a section, and
where sections meet.

Documents that similar pairs connect, directly or through others, are a family. Its first document
is kept, and the others are its near-duplicates: how many are kept does not depend on the order of
the corpus.

Similarity is estimated from MinHash signatures by one-permutation hashing (Li, Owen, Zhang, 2012):
each n-gram's hash falls into one of 128 bins, and each bin keeps its least hash. An empty bin
borrows from a filled one, in an order of its own (Shrivastava, 2017), which keeps the estimate
unbiased. So a signature costs one pass over the n-grams, not 128.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from jobs.cleaning.disk_buckets import Records
from jobs.corpus.text_hashes import Hashes, Places, mix64, ngrams_by_text

Marks = npt.NDArray[np.bool_]
Sections = npt.NDArray[np.int32]
Signatures = npt.NDArray[np.uint16]
# For each document an earlier one of its family; the first has itself
Families = npt.NDArray[np.uint32]

NGRAM_WORDS = 3  # words in a row that make one unit of comparison
SIGNATURE_SIZE = 128
_BIN_BITS = 7
_CHANCE = 2.0**-16  # of two different hashes agreeing in the 16 bits that a signature keeps
_EMPTY = np.uint64(2**64 - 1)

_LEAST_RECALL = 0.98  # of the bands, for two documents exactly as similar as the threshold
_MARGIN_DEVIATIONS = 2.0  # the estimate of such a pair falls short by more than this in 2% of cases
_WINDOW = 64  # bounds the pairs of documents that share a page header or license
_BLOCK = 1 << 13  # pairs at once

# Records are in canonical order.
SIGNATURE = np.dtype(("<u2", SIGNATURE_SIZE))
ROW = np.dtype("<u4")  # a document's place in its section
HASHED = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", ROW)])  # halves of a document's hash
BANDED = np.dtype([("key", "<u8"), ("row", ROW)])  # hash of a band
# A document, and the first of its family in its section
JOINED = np.dtype([("row", ROW), ("first", ROW)])
ROWS = np.dtype([("section", "<u4"), ("row", ROW)])  # a decision
# Of documents to compare
PAIR = np.dtype([*ROWS.descr, ("earlier_section", "<u4"), ("earlier_row", ROW)])


def repeats(records: Records) -> Places:
    """Returns the places of the `HASHED` records that repeat an earlier one."""
    order = np.lexsort((records["low"], records["high"]))  # stable
    return np.sort(order[~_changes(records[["high", "low"]][order])])


def repeats_across(records: Records, sections: Sections) -> Iterator[Records]:
    """Yields the `ROWS` of the `HASHED` records of a partition that repeat an earlier one."""
    places = repeats(records)
    yield np.rec.fromarrays([sections[places], records["row"][places]], dtype=ROWS)


def signatures(normalized: Sequence[bytes]) -> Signatures:
    """Returns the signatures (D, 128) of the sets of n-grams of normalized texts; zeros for one
    without words."""
    return signatures_of(*ngrams_by_text(normalized, NGRAM_WORDS), num_sets=len(normalized))


def signatures_of(ngrams: Hashes, sets: Places, *, num_sets: int) -> Signatures:
    """Returns the signatures (D, 128) of sets of hashed n-grams (G,), repeats ignored; `sets` (G,)
    has their owners."""
    least = np.full((num_sets, SIGNATURE_SIZE), _EMPTY)
    bins = sets * SIGNATURE_SIZE + (ngrams >> (64 - _BIN_BITS)).astype(np.int64)
    np.minimum.at(least.reshape(-1), bins, ngrams)
    filled = least != _EMPTY
    borrowers, empty = np.nonzero(~filled)
    lenders = _lenders()[empty]
    first_filled = filled[borrowers[:, None], lenders].argmax(axis=1)
    chosen = lenders[np.arange(len(lenders)), first_filled]
    least[borrowers, empty] = least[borrowers, chosen]
    # Each bin keeps different 16 bits, or a document of one n-gram would match one in 65,536 of its
    # kind.
    mixed = mix64(least ^ np.arange(SIGNATURE_SIZE, dtype=np.uint64))
    signatures = (mixed & 0xFFFF).astype(np.uint16)
    signatures[~filled.any(axis=1)] = 0
    return signatures


@cache
def _lenders() -> npt.NDArray[np.int64]:
    """Returns (128, 128): row i is the order in which bin i, if empty, asks the other bins."""
    numbers = np.arange(SIGNATURE_SIZE**2, dtype=np.uint64)
    return np.argsort(mix64(numbers).reshape(SIGNATURE_SIZE, SIGNATURE_SIZE), axis=1)


def similarity(left: Signatures, right: Signatures) -> npt.NDArray[np.float64]:
    """Estimates the Jaccard similarity of n-gram sets from signatures (..., 128); unbiased, so it
    may be below 0.

    Its standard deviation at similarity s is at most about sqrt(s (1 - s) / 128), 0.04 in the
    middle.
    """
    agreeing = (left == right).mean(axis=-1)
    return (agreeing - _CHANCE) / (1 - _CHANCE)


def bands_for(threshold: float) -> tuple[int, int]:
    """Returns (bands, rows): the most selective cut of signatures for which 98% of pairs at the
    threshold share a band.

    A pair of similarity s agrees in all rows of one of the bands with probability 1 - (1 -
    s^rows)^bands.
    """
    for rows in range(SIGNATURE_SIZE, 1, -1):
        bands = SIGNATURE_SIZE // rows
        if 1 - (1 - threshold**rows) ** bands >= _LEAST_RECALL:
            return bands, rows
    return SIGNATURE_SIZE, 1


def band_keys(signatures: Signatures, threshold: float) -> Hashes:
    """Returns keys (D, bands); equal values in different bands have different keys."""
    bands, rows = bands_for(threshold)
    cut = signatures[:, : bands * rows].astype(np.uint64).reshape(len(signatures), bands, rows)
    keys = mix64(np.arange(bands, dtype=np.uint64))
    for row in range(rows):
        keys = mix64(keys ^ cut[:, :, row])
    return keys


def least_estimate(threshold: float) -> float:
    """Returns the estimate from which on two documents count as similar."""
    return threshold - _MARGIN_DEVIATIONS * math.sqrt(threshold * (1 - threshold) / SIGNATURE_SIZE)


# Two documents that share a band of their signatures are compared by the whole signatures. Among
# those that share a band, a document is compared with the 64 before it, so the work is linear in
# the documents, whatever they contain.


def join_section(
    records: Records, families: Families, read: Callable[[Places], Signatures], *, threshold: float
) -> Records:
    """Joins the families of the similar rows of a section, among the `BANDED` records of a
    partition.

    Returns the records that other sections must see, sorted: the first and last 64 of each key, as
    no window reaches further into the section. `read` returns rows' signatures.
    """
    records = records[np.argsort(records["key"], kind="stable")]
    first, end = _runs(_changes(records["key"]))
    twins = records[end - first > 1]
    for later, earlier in _close_pairs(twins["key"]):
        join_similar(
            twins["row"][later], twins["row"][earlier], families, read, threshold=threshold
        )
    places = np.arange(len(records))
    return records[(places - first < _WINDOW) | (end - places <= _WINDOW)]


def join_similar(
    later: Places,
    earlier: Places,
    families: Families,
    read: Callable[[Places], Signatures],
    *,
    threshold: float,
) -> None:
    """Compares the documents of pairs (P,) that are not known as one family, and joins the families
    of those alike."""
    apart = families[later] != families[earlier]
    later, earlier = later[apart], earlier[apart]
    alike = similarity(read(later), read(earlier)) >= least_estimate(threshold)
    members = families.data
    for pair in zip(later[alike].tolist(), earlier[alike].tolist(), strict=True):
        firsts = [_first(members, place) for place in pair]
        for place in (*pair, *firsts):
            members[place] = min(firsts)


def _first(families: memoryview, place: int) -> int:
    while families[place] != place:
        families[place] = place = families[families[place]]
    return place


def firsts(families: Families) -> Families:
    """Returns the first of each document's family."""
    while True:
        nearer = families[families]
        if np.array_equal(families, nearer):
            return families
        families = nearer


def pairs_across(records: Records, sections: Sections) -> Iterator[Records]:
    """Yields a `PAIR` for each `BANDED` record and each of an earlier section, 64 before it at
    most."""
    order = np.argsort(records["key"], kind="stable")
    rows, owners = records["row"][order], sections[order]
    for places, places_before in _close_pairs(records["key"][order]):
        is_across = owners[places] != owners[places_before]
        later, earlier = places[is_across], places_before[is_across]
        yield np.rec.fromarrays(
            [owners[later], rows[later], owners[earlier], rows[earlier]], dtype=PAIR
        )


def _close_pairs(keys: Hashes) -> Iterator[tuple[Places, Places]]:
    """Yields the places (later, earlier) of equal keys at most 64 apart, some at a time; the keys
    are sorted."""
    for distance in range(1, _WINDOW + 1):
        later = np.flatnonzero(keys[distance:] == keys[:-distance]) + distance
        if not later.size:
            return
        for start in range(0, len(later), _BLOCK):
            block = later[start : start + _BLOCK]
            yield block, block - distance


def distinct(values: Records) -> Records:
    """Returns them in order, each once. NumPy's `unique` hashes them, which takes ten times as
    long."""
    values = np.sort(values)
    return values[_changes(values)]


def _changes(values: Records) -> Marks:
    """Marks the first value and each that differs from the one before it."""
    changes = np.ones(len(values), dtype=np.bool_)
    changes[1:] = values[1:] != values[:-1]
    return changes


def _runs(changes: Marks) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Returns for each place where its run begins and ends."""
    borders = np.append(np.flatnonzero(changes), len(changes)).astype(np.int32)
    return np.repeat(borders[:-1], np.diff(borders)), np.repeat(borders[1:], np.diff(borders))

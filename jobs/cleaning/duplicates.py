"""Finds the documents of a corpus that repeat or resemble an earlier one, on a local disk in bounded memory.

Similarity is estimated from MinHash signatures by one-permutation hashing (Li, Owen, Zhang, 2012): each n-gram's hash
falls into one of 128 bins, and each bin keeps its least hash. An empty bin borrows from a filled one, in an order of
its own (Shrivastava, 2017), which keeps the estimate unbiased. So a signature costs one pass over the n-grams, not 128.
"""

import math
import os
import tempfile
from abc import ABC, abstractmethod
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from jobs.cleaning.disk_buckets import BucketFile, Records
from jobs.corpus.text_hashes import Hashes, mix64

Marks = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]

_RECORD = np.dtype([("high", "u8"), ("low", "u8"), ("row", "u8")])  # halves of the hash; the document's row
_NUM_BUCKETS = 256  # a bucket of 10^9 documents takes 94 MB


class DuplicateSearch(ExitStack, ABC):
    """A search for documents to drop: add all documents in their order, then call `find`.

    Memory holds a buffer and one bucket at a time. The files have no names, so nothing is left of them when the context
    or the process ends, however it ends.
    """

    def __init__(self, folder: Path, dtype: npt.DTypeLike, *, num_buckets: int) -> None:
        super().__init__()
        self._folder, self._num_buckets = folder, num_buckets
        self._records = BucketFile(self._open(), dtype, num_buckets=num_buckets)
        self._num_rows = 0

    def find(self) -> Marks:
        """Returns the documents to drop, marked in a mapped file (N,)."""
        file = self._open()
        file.truncate(max(1, self._num_rows))
        dropped = np.memmap(file, dtype=np.bool_, mode="r+")
        for bucket in range(self._num_buckets):
            self._search(self._records.bucket(bucket), dropped)
        return dropped[: self._num_rows]

    @abstractmethod
    def _search(self, records: Records, dropped: Marks) -> None:
        """Marks the documents to drop among the records of one bucket."""

    def _open(self) -> BinaryIO:
        return self.enter_context(tempfile.TemporaryFile(dir=self._folder))

    def _next_rows(self, count: int) -> Rows:
        self._num_rows += count
        return np.arange(self._num_rows - count, self._num_rows)


class Duplicates(DuplicateSearch):
    """Drops all documents of equal hash but the first."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, _RECORD, num_buckets=_NUM_BUCKETS)

    def add(self, hashes: npt.NDArray[np.uint8]) -> None:
        """Adds the next documents by their hashes (D, 16)."""
        records = np.empty(len(hashes), dtype=_RECORD)
        records["high"], records["low"] = np.ascontiguousarray(hashes).view(np.uint64).reshape(-1, 2).T
        records["row"] = self._next_rows(len(hashes))
        self._records.add(hashes[:, 0].astype(np.uint16), records)

    def _search(self, records: Records, dropped: Marks) -> None:
        records = records[np.lexsort((records["row"], records["low"], records["high"]))]
        later, former = records[1:], records[:-1]
        repeats = (later["high"] == former["high"]) & (later["low"] == former["low"])
        dropped[later["row"][repeats]] = True


Signatures = npt.NDArray[np.uint16]

NGRAM_WORDS = 3  # words in a row that make one unit of comparison
SIGNATURE_SIZE = 128
_SIGNATURE_BYTES = 2 * SIGNATURE_SIZE
_BIN_BITS = 7
_CHANCE = 2.0**-16  # of two different hashes agreeing in the 16 bits that a signature keeps
_EMPTY = np.uint64(2**64 - 1)

_LEAST_RECALL = 0.98  # of the bands, for two documents exactly as similar as the threshold
_MARGIN_DEVIATIONS = 2.0  # the estimate of such a pair falls short by more than this in 2% of cases
_WINDOW = 64  # bounds the pairs of a group that shares a page header or license

_BAND = np.dtype([("key", "u8"), ("row", "u8")])  # hash of a band; the document's row
_NUM_BAND_BUCKETS = 1024  # a bucket of 10^8 documents, 25 bands each, takes 39 MB
_BLOCK = 1 << 13  # documents or pairs at once


def signature(ngrams: Hashes) -> Signatures:
    """Returns the signature (128,) of a set of hashed n-grams (G,), repeats ignored; zeros for an empty set."""
    if not len(ngrams):
        return np.zeros(SIGNATURE_SIZE, dtype=np.uint16)
    least = np.full(SIGNATURE_SIZE, _EMPTY)
    np.minimum.at(least, (ngrams >> np.uint64(64 - _BIN_BITS)).astype(np.intp), ngrams)
    filled = least != _EMPTY
    if not filled.all():
        lenders = _lenders()[~filled]
        first = filled[lenders].argmax(axis=1)
        least[~filled] = least[lenders[np.arange(len(lenders)), first]]
    # Each bin keeps different 16 bits, or a document of one n-gram would match one in 65,536 of its kind.
    return (mix64(least ^ np.arange(SIGNATURE_SIZE, dtype=np.uint64)) & np.uint64(0xFFFF)).astype(np.uint16)


@cache
def _lenders() -> npt.NDArray[np.int64]:
    """Returns (128, 128): row i is the order in which bin i, if empty, asks the other bins."""
    numbers = np.arange(SIGNATURE_SIZE**2, dtype=np.uint64)
    return np.argsort(mix64(numbers).reshape(SIGNATURE_SIZE, SIGNATURE_SIZE), axis=1)


def similarity(left: Signatures, right: Signatures) -> npt.NDArray[np.float64]:
    """Estimates the Jaccard similarity of n-gram sets from signatures (..., 128); unbiased, so it may be below 0.

    Its standard deviation at similarity s is at most about sqrt(s (1 - s) / 128), 0.04 in the middle.
    """
    agreeing = (left == right).mean(axis=-1)
    return (agreeing - _CHANCE) / (1 - _CHANCE)


def bands_for(threshold: float) -> tuple[int, int]:
    """Returns (bands, rows): the most selective cut of signatures for which 98% of pairs at the threshold share a band.

    A pair of similarity s agrees in all rows of one of the bands with probability 1 - (1 - s^rows)^bands.
    """
    for rows in range(SIGNATURE_SIZE, 1, -1):
        bands = SIGNATURE_SIZE // rows
        if 1 - (1 - threshold**rows) ** bands >= _LEAST_RECALL:
            return bands, rows
    return SIGNATURE_SIZE, 1


class NearDuplicates(DuplicateSearch):
    """Drops each document that is similar to an earlier one, kept or not.

    Two documents that share a band of their signatures are compared by the whole signatures. In a group that shares a
    band, a document is compared with the 64 before it, so the work is linear in the documents, whatever they contain.
    The disk takes 256 bytes per document and 16 per band (about 0.7 kB in all at a threshold of 0.7).
    """

    def __init__(self, folder: Path, *, threshold: float) -> None:
        super().__init__(folder, _BAND, num_buckets=_NUM_BAND_BUCKETS)
        self._signatures = self._open()
        self._bands, self._rows_a_band = bands_for(threshold)
        deviation = math.sqrt(threshold * (1 - threshold) / SIGNATURE_SIZE)
        self._least_estimate = threshold - _MARGIN_DEVIATIONS * deviation

    def add(self, signatures: Signatures) -> None:
        """Adds the next documents by their signatures (D, 128)."""
        for start in range(0, len(signatures), _BLOCK):
            block = signatures[start : start + _BLOCK]
            keys = self._band_keys(block)
            records = np.empty(keys.shape, dtype=_BAND)
            records["key"], records["row"] = keys, self._next_rows(len(block))[:, None]
            self._records.add((keys % np.uint64(_NUM_BAND_BUCKETS)).astype(np.uint16).reshape(-1), records.reshape(-1))
        self._signatures.write(signatures.tobytes())
        self._signatures.flush()

    def _band_keys(self, signatures: Signatures) -> Hashes:
        """Returns keys (D, bands); equal values in different bands have different keys."""
        used = signatures[:, : self._bands * self._rows_a_band].astype(np.uint64)
        cut = used.reshape(len(signatures), self._bands, self._rows_a_band)
        keys = mix64(np.arange(self._bands, dtype=np.uint64))
        for row in range(self._rows_a_band):
            keys = mix64(keys ^ cut[:, :, row])
        return keys

    def _search(self, records: Records, dropped: Marks) -> None:
        records = records[np.argsort(records["key"])]
        same = records["key"][1:] == records["key"][:-1]
        has_twin = np.zeros(len(records), dtype=np.bool_)
        has_twin[1:] |= same
        has_twin[:-1] |= same
        records = records[has_twin]
        records = records[np.lexsort((records["row"], records["key"]))]
        keys, rows = records["key"], records["row"].astype(np.int64)
        for distance in range(1, _WINDOW + 1):
            later = np.flatnonzero(keys[distance:] == keys[:-distance]) + distance
            if not later.size:
                break
            later = later[~dropped[rows[later]]]
            for start in range(0, len(later), _BLOCK):
                pairs = later[start : start + _BLOCK]
                estimates = similarity(self._read(rows[pairs]), self._read(rows[pairs - distance]))
                dropped[rows[pairs[estimates >= self._least_estimate]]] = True

    def _read(self, rows: Rows) -> Signatures:
        """Returns signatures (R, 128), read one by one: a mapped file's pages would count as this process's memory."""
        file = self._signatures.fileno()
        content = b"".join(os.pread(file, _SIGNATURE_BYTES, row * _SIGNATURE_BYTES) for row in rows.tolist())
        return np.frombuffer(content, dtype=np.uint16).reshape(-1, SIGNATURE_SIZE)

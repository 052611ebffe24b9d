"""Finds training documents that share a run of words with a validation document (Brown et al.,
2020, appendix C).

The n-grams of both meet in the partitions of their hashes. First the validation documents send
theirs, and from them each partition makes its share of a filter. Then the training documents send
those n-grams that pass the filter, which takes 64 MiB at most. Up to 33 million words of validation
text, one of 16 other n-grams passes. Beyond that more and more do, at most 12 bytes for each word
of the corpus, which lie in the store until it is finished.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt

from cluster.output.progress import say
from cluster.settings.data import DataConfig
from cluster.storage.uris import Storage
from jobs.cleaning.disk_buckets import BucketFile, Records
from jobs.cleaning.document_index import read_chunk, selection_folder
from jobs.cleaning.duplicates import ROW, ROWS, Marks, Sections, distinct
from jobs.cleaning.exchange import (
    Exchange,
    Piece,
    Runner,
    Section,
    partitions_for,
    read_pieces,
    run_step,
    sections_of,
    store_pieces,
)
from jobs.cleaning.selection import HELD_OUT, store_codes, stored_codes
from jobs.cleaning.why_dropped import DROP_CODES
from jobs.corpus.chunks import Chunk
from jobs.corpus.documents import Document, Drop
from jobs.corpus.ray_data_tasks import run_tasks
from jobs.corpus.text_hashes import Hashes, normalized, word_ngrams

_NGRAM = np.dtype([("hash", "<u8"), ("row", ROW)])
_CONTAMINATED = DROP_CODES[Drop.CONTAMINATED]
_WORD_BYTES = 4  # of text, about
_BITS_PER_NGRAM, _MOST_FILTER_BYTES = 16, 64 << 20


@dataclass(frozen=True)
class ValidationNgrams:
    """The n-grams of the validation split; a filter of so many bytes for each partition knows
    them."""

    sent: Exchange
    filter_bytes: int

    def hashes(self, partition: int) -> Hashes:
        parts = self.sent.received(partition % self.sent.num_partitions, _NGRAM)
        return np.concatenate([records["hash"] for records in parts])

    def store_filter(self, partition: int) -> bytes:
        bits = np.zeros(8 * self.filter_bytes, np.bool_)
        bits[self._bits(self.hashes(partition))] = True
        content = np.packbits(bits).tobytes()
        return store_pieces(self.sent.store, self._key(partition), iter([[content]]), count=1)

    def may_hold(self, hashes: Hashes) -> Marks:
        """Marks the n-grams that pass the filter: all that are held, and a few others."""
        partitions = hashes % self.sent.num_partitions
        places = partitions * (8 * self.filter_bytes) + self._bits(hashes)
        filter_bytes = _read_filter(self)[places >> 3]
        bits = filter_bytes << (places & 7).astype(np.uint8)
        return bits & 128 != 0

    def _bits(self, hashes: Hashes) -> Hashes:
        return (hashes >> np.uint64(32)) % np.uint64(8 * self.filter_bytes)

    def _key(self, partition: int) -> str:
        return f"{self.sent.name}/filter-{partition:05d}"


@lru_cache(maxsize=1)
def _read_filter(ngrams: ValidationNgrams) -> npt.NDArray[np.uint8]:
    keys = [ngrams._key(partition) for partition in range(ngrams.sent.num_partitions)]
    return np.concatenate(list(read_pieces(ngrams.sent.store, keys, 0, np.dtype(np.uint8))))


def decontaminate(
    store: Storage, chunks: Sequence[Chunk], data: DataConfig, *, run: Runner = run_tasks
) -> int:
    """Changes the codes of contaminated documents, once all codes are stored; returns their number.
    Needs Ray."""
    sizes = [chunk.bytes for chunk in chunks]
    texts = []
    for section in sections_of(sizes, least=1):
        texts.append(Section(section.number, [chunks[number] for number in section.chunks]))
    num_bytes = sum(sizes) // _WORD_BYTES * _NGRAM.itemsize

    def partitions(share: float) -> int:
        return partitions_for(int(num_bytes * share), task_bytes=data.selection_task_bytes)

    def send(exchange: Exchange, label: str, code: int, known: ValidationNgrams | None) -> int:
        work = partial(exchange.send, pieces=partial(_ngrams, data=data, code=code, known=known))
        return run_step(label, texts, work, run=run) // _NGRAM.itemsize

    folder = selection_folder(data)
    least = partitions(data.val_fraction)
    held_out = Exchange(store, f"{folder}/held-out", len(texts), least)
    num_ngrams = send(held_out, "reading validation n-grams", HELD_OUT, None)
    if not num_ngrams:
        return 0
    filter_bytes = min(_MOST_FILTER_BYTES, num_ngrams * _BITS_PER_NGRAM // 8) // least + 1
    known = ValidationNgrams(held_out, filter_bytes)
    run_step("making the filter", range(least), known.store_filter, run=run)
    passing = -math.expm1(-num_ngrams / (8 * filter_bytes * least))
    if passing > 0.1:
        say(
            f"{passing:.0%} of n-grams are compared with those of validation; data.val_max_documents makes them fewer"
        )
    # A multiple, so that each partition's n-grams are in one partition of validation's.
    num_partitions = least * max(1, partitions(passing) // least)
    training = Exchange(store, f"{folder}/training", len(texts), num_partitions)
    send(training, "reading training n-grams", 0, known)
    work = partial(compare, known=known, training=training)
    run_step("comparing n-grams", range(num_partitions), work, run=run)
    return run_step("storing contamination", texts, partial(mark, training=training), run=run)


def _ngrams(
    texts: Section,
    exchange: Exchange,
    *,
    data: DataConfig,
    code: int,
    known: ValidationNgrams | None,
) -> Iterator[Piece]:
    """Sends the n-grams of the documents with this code; with `known`, those that pass its
    filter."""
    assert data.decontaminate_ngram is not None
    with BucketFile(_NGRAM, num_buckets=exchange.num_partitions) as buckets:
        for row, document in _documents(texts, exchange.store, data, code):
            hashes = word_ngrams(normalized(document.text), data.decontaminate_ngram)
            if known is not None:
                hashes = hashes[known.may_hold(hashes)]
            hashes = distinct(hashes)
            buckets.add(np.rec.fromarrays([hashes, np.full(len(hashes), row)], dtype=_NGRAM))
        yield from buckets.pieces()


def _documents(
    texts: Section, store: Storage, data: DataConfig, code: int
) -> Iterator[tuple[int, Document]]:
    """Yields the documents with this code, each with its place in the section."""
    row = 0
    for chunk in texts.chunks:
        _, codes = stored_codes(store, chunk.number)
        if code in codes:
            for place, (_, document) in enumerate(read_chunk(chunk, data, hashlib.sha256())):
                if codes[place : place + 1] == bytes([code]):
                    yield row + place, document
        row += len(codes)


def compare(partition: int, *, known: ValidationNgrams, training: Exchange) -> bytes:
    """Answers which training documents hold a known n-gram."""

    def decide(records: Records, sections: Sections) -> Iterator[Records]:
        places = np.flatnonzero(np.isin(records["hash"], known.hashes(partition)))
        yield np.rec.fromarrays([sections[places], records["row"][places]], dtype=ROWS)

    return training.decide(partition, by=decide, dtype=_NGRAM, answers=ROWS)


def mark(texts: Section, *, training: Exchange) -> bytes:
    """Stores the codes of a section's contaminated documents; returns their number in decimal
    digits."""
    answers = np.concatenate([np.empty(0, ROWS), *training.answers(texts.number, ROWS)])
    rows = distinct(answers["row"])
    row = count = 0
    for chunk in texts.chunks:
        digest, content = stored_codes(training.store, chunk.number)
        codes = np.frombuffer(content, np.uint8).copy()
        start, end = np.searchsorted(rows, [row, row + len(codes)])
        codes[rows[start:end] - row] = _CONTAMINATED
        count += int(np.count_nonzero(codes == _CONTAMINATED))
        if start < end:
            store_codes(training.store, chunk.number, digest, codes.tobytes())
        row += len(codes)
    return b"%d" % count

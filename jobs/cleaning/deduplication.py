"""Finds the duplicates of an indexed corpus, in tasks for its sections and for the partitions of
their records."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np

from cluster.settings.data import DataConfig
from cluster.storage.uris import Storage
from jobs.cleaning import duplicates
from jobs.cleaning.disk_buckets import BucketFile, Records
from jobs.cleaning.document_index import read_signatures, section_indexes, selection_folder
from jobs.cleaning.duplicates import (
    BANDED,
    HASHED,
    JOINED,
    PAIR,
    ROW,
    ROWS,
    SIGNATURE,
    Families,
    Places,
    Signatures,
)
from jobs.cleaning.exchange import (
    Exchange,
    Piece,
    Runner,
    Section,
    partitions_for,
    run_step,
    sections_of,
)
from jobs.cleaning.families import LINK, document, join_families, later_members, link
from jobs.corpus.documents import Drop
from jobs.corpus.text_hashes import Hashes

_BLOCK = 1 << 13  # documents at once


@dataclass(frozen=True)
class Decisions:
    reason: Drop
    rows: Callable[[Section], Records]  # those to drop, in order; one may be repeated


class Deduplication:
    def __init__(
        self, store: Storage, sizes: Sequence[int], data: DataConfig, *, run: Runner
    ) -> None:
        """`sizes` are the documents of each chunk."""
        threshold = data.near_dedup_threshold
        self._store, self._threshold = store, threshold or 1.0
        self._run = run
        self._step = partial(run_step, run=run)
        self._task_bytes = data.selection_task_bytes
        self._folder = selection_folder(data)
        self._sizes, self._num_documents = sizes, sum(sizes)
        num_bands, _ = duplicates.bands_for(self._threshold)
        self._banded_bytes = BANDED.itemsize * num_bands
        record_bytes = HASHED.itemsize + (self._banded_bytes if threshold is not None else 0)
        self.sections = sections_of([size * record_bytes for size in sizes], least=self._task_bytes)

    def exact(self) -> Decisions:
        """Sections send their hashes, partitions find the hashes that several sections have, and
        answer each section."""
        hashes = self._exchange("hashes", self._num_documents * HASHED.itemsize)
        if len(self.sections) > 1:
            send = partial(hashes.send, pieces=_send_hashes)
            self._step("finding duplicates", self.sections, send)
            decide = partial(
                hashes.decide, by=duplicates.repeats_across, dtype=HASHED, answers=ROWS
            )
            self._step("comparing sections", range(hashes.num_partitions), decide)
        return Decisions(Drop.DUPLICATE, partial(_repeated_rows, hashes=hashes))

    def near(self, exact: Decisions | None = None) -> Decisions:
        """Compares what `exact` leaves.

        Partitions name pairs of documents in different sections. The later document's section asks
        the earlier one's section for that document's signature, once for all pairs, and compares
        them. Then sections join the families that span them.
        """
        bands = self._exchange("bands", self._num_documents * self._banded_bytes)
        join = partial(_join_and_send_bands, threshold=self._threshold, exact=exact)
        send = partial(bands.send, pieces=join)
        if len(self.sections) == 1:
            rows = partial(_rows_joined_inside, send=send, bands=bands)
            return Decisions(Drop.NEAR_DUPLICATE, rows)
        self._step("finding near-duplicates", self.sections, send)

        decide = partial(bands.decide, by=duplicates.pairs_across, dtype=BANDED, answers=PAIR)
        self._step("pairing sections", range(bands.num_partitions), decide)

        num_sections = len(self.sections)
        questions = Exchange(self._store, f"{self._folder}/asked", num_sections, num_sections)
        ask = partial(questions.send, pieces=partial(_ask_for_signatures, bands=bands))
        self._step("asking for signatures", self.sections, ask)
        answer = partial(send_signatures, questions=questions)
        self._step("sending signatures", self.sections, answer)

        links = replace(questions, name=f"{self._folder}/links")
        compare = partial(
            _compare, bands=bands, questions=questions, links=links, threshold=self._threshold
        )
        self._step("comparing near-duplicates", self.sections, compare)
        stars = join_families(links, self.sections, self._sizes, run=self._run)
        return Decisions(Drop.NEAR_DUPLICATE, partial(later_members, stars=stars))

    def _exchange(self, name: str, num_bytes: int) -> Exchange:
        num_partitions = partitions_for(num_bytes, task_bytes=self._task_bytes)
        return Exchange(self._store, f"{self._folder}/{name}", len(self.sections), num_partitions)


def _send_hashes(section: Section, exchange: Exchange) -> Iterator[Piece]:
    """Sends each hash of the section once, with the first row that has it; the rows that repeat one
    stay."""
    with BucketFile(HASHED, num_buckets=exchange.num_partitions) as buckets:
        for _, first_row, index in section_indexes(exchange.store, section.chunks):
            places = np.flatnonzero(index.drops == 0)
            high, low = index.hashes[places].view("<u8").T
            buckets.add(np.rec.fromarrays([high, low, first_row + places], dtype=HASHED))
        repeated = []
        for partition in range(exchange.num_partitions):
            records = buckets.bucket(partition)
            places = duplicates.repeats(records)
            repeated.append(records["row"][places])
            yield [np.delete(records, places).tobytes()]
        yield [np.concatenate(repeated).tobytes()]


def _repeated_rows(section: Section, *, hashes: Exchange) -> Records:
    """Returns the rows that repeat one of their section, or of an earlier section."""
    # Is done already if there are several: a small corpus takes two jobs fewer.
    hashes.send(section, pieces=_send_hashes)
    rows = [hashes.kept(section.number, ROW)]
    if hashes.num_sections > 1:
        rows += [answers["row"] for answers in hashes.answers(section.number, ROWS)]
    return np.sort(np.concatenate(rows))


def _join_and_send_bands(
    section: Section, exchange: Exchange, *, threshold: float, exact: Decisions | None
) -> Iterator[Piece]:
    """Joins the families inside a section, and sends the bands that other sections must see; the
    families stay.

    The local disk takes 256 bytes per document and 12 per band (about 0.6 kB in all at a threshold
    of 0.7).
    """
    with (
        BucketFile(BANDED, num_buckets=exchange.num_partitions) as buckets,
        SignatureFile() as file,
    ):
        repeated = np.empty(0, ROW) if exact is None else exact.rows(section)
        for chunk, first_row, index in section_indexes(exchange.store, section.chunks):
            signatures = read_signatures(exchange.store, chunk)
            rows = np.setdiff1d(first_row + np.flatnonzero(index.drops == 0), repeated)
            for start in range(0, len(rows), _BLOCK):
                block = rows[start : start + _BLOCK]
                keys = duplicates.band_keys(signatures[block - first_row], threshold)
                rows_of_keys = np.repeat(block, keys.shape[1])
                buckets.add(np.rec.fromarrays([keys.reshape(-1), rows_of_keys], dtype=BANDED))
            file.write(signatures)
        families: Families = np.arange(file.num_rows, dtype=ROW)
        for partition in range(exchange.num_partitions):
            bands = buckets.bucket(partition)
            border = duplicates.join_section(bands, families, file.read, threshold=threshold)
            yield [border.tobytes()]
        families = duplicates.firsts(families)
        joined = np.flatnonzero(families != np.arange(file.num_rows))
        yield [np.rec.fromarrays([joined, families[joined]], dtype=JOINED).tobytes()]


def _rows_joined_inside(
    section: Section, *, send: Callable[[Section], bytes], bands: Exchange
) -> Records:
    """Returns the rows that are not the first of their family, of the only section."""
    send(section)
    return bands.kept(section.number, JOINED)["row"]


def _ask_for_signatures(
    section: Section, exchange: Exchange, *, bands: Exchange
) -> Iterator[Piece]:
    """Asks each section for the signatures of some rows."""
    earlier = _earlier_documents(section, bands)
    first_of_sections = np.arange(exchange.num_sections + 1, dtype=np.uint64) << 32
    borders = np.searchsorted(earlier, first_of_sections)
    for first, end in pairwise(borders.tolist()):
        yield [earlier[first:end].astype(ROW).tobytes()]


def _earlier_documents(section: Section, bands: Exchange) -> Hashes:
    """Returns the documents of other sections with which those of a section are compared, in order,
    each once."""
    in_order = np.empty(0, np.uint64)
    waiting: list[Hashes] = []
    num_waiting = 0
    for pairs in bands.answers(section.number, PAIR):
        waiting.append(document(pairs["earlier_section"], pairs["earlier_row"]))
        num_waiting += len(pairs)
        if num_waiting > len(in_order):  # so that all sorts together take a few times the last one
            in_order = duplicates.distinct(np.concatenate([in_order, *waiting]))
            waiting, num_waiting = [], 0
    return duplicates.distinct(np.concatenate([in_order, *waiting]))


def send_signatures(section: Section, *, questions: Exchange) -> bytes:
    """Answers each section with the signatures of the rows that it asked for."""

    def pieces() -> Iterator[Piece]:
        with SignatureFile() as file:
            for chunk in section.chunks:
                file.write(read_signatures(questions.store, chunk))
            for rows in questions.received(section.number, ROW):
                starts = range(0, len(rows), _BLOCK)
                yield (file.read(rows[start : start + _BLOCK]).tobytes() for start in starts)

    return questions.answer(section.number, pieces())


def _compare(
    section: Section, *, bands: Exchange, questions: Exchange, links: Exchange, threshold: float
) -> bytes:
    """Links the section's documents to those of other sections that are alike, and to those of
    their families here."""

    def pieces() -> Iterator[Piece]:
        earlier = _earlier_documents(section, bands)
        # They come first in the file, and the section's own documents after them
        num_earlier = len(earlier)
        with SignatureFile() as file, BucketFile(LINK, num_buckets=links.num_sections) as buckets:
            for signatures in questions.answers(section.number, SIGNATURE):
                file.write(signatures)
            for chunk in section.chunks:
                file.write(read_signatures(questions.store, chunk))
            families: Families = np.arange(file.num_rows, dtype=ROW)
            joined = bands.kept(section.number, JOINED)
            families[num_earlier + joined["row"]] = num_earlier + joined["first"]
            for pairs in bands.answers(section.number, PAIR):
                for start in range(0, len(pairs), _BLOCK):
                    block = pairs[start : start + _BLOCK]
                    earlier_ones = document(block["earlier_section"], block["earlier_row"])
                    others = np.searchsorted(earlier, earlier_ones)
                    later = num_earlier + block["row"]
                    duplicates.join_similar(later, others, families, file.read, threshold=threshold)
            rows = np.arange(file.num_rows - num_earlier)
            documents = np.concatenate([earlier, document(section.number, rows)])
            buckets.add(link(documents, documents[duplicates.firsts(families)]))
            yield from buckets.pieces()

    return links.answer(section.number, pieces())


class SignatureFile(ExitStack):
    """Signatures in a local file without a name. They are read one by one: a mapped file's pages
    would count as this process's memory."""

    def __init__(self) -> None:
        super().__init__()
        self._file = self.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 (as this context)
        self.num_rows = 0

    def write(self, signatures: Signatures) -> None:
        self._file.write(signatures.tobytes())
        self._file.flush()
        self.num_rows += len(signatures)

    def read(self, rows: Places) -> Signatures:
        """Returns signatures (R, 128)."""
        size, descriptor = SIGNATURE.itemsize, self._file.fileno()
        content = b"".join(os.pread(descriptor, size, row * size) for row in rows.tolist())
        return np.frombuffer(content, SIGNATURE)

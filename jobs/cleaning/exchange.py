"""Carries records from the sections of a corpus to the partitions of their keys, and answers back,
through the store.

A section is some chunks in a row; a partition is all records whose keys it owns. The task of a
section stores one object: a table of borders, then its records, partition by partition. The task of
a partition reads its piece of every section's object, and stores one of answers, section by
section. So S sections and P partitions make S + P objects, whose pieces are read by range. Both
numbers follow from the corpus and `data.selection_task_bytes`, and no decision depends on them.
What is stored outlives its task and its node, and is not made again.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cluster.storage.uris import Storage
from jobs.cleaning.disk_buckets import MAX_BUCKETS, BucketFile, Records
from jobs.cleaning.duplicates import Sections
from jobs.corpus.progress import DataProgress
from jobs.corpus.ray_data_tasks import Runner

_MOST_SECTIONS = 1024
_SLICE_BYTES = 1 << 20
_READERS = 16  # requests at once: a piece is small against the time to its first byte

Item = TypeVar("Item")
Read = TypeVar("Read")
Decide = Callable[[Records, Sections], Iterator[Records]]
Piece = Iterable[bytes]  # its parts, which are written one after the other


@dataclass(frozen=True)
class Section:
    number: int
    chunks: Sequence[Any]  # numbers of its chunks, or the chunks


def sections_of(sizes: Sequence[int], *, least: int) -> list[Section]:
    """Cuts the chunks, by their sizes, into sections of at least `least` and a 1,024th of all."""
    enough = max(least, sum(sizes) // _MOST_SECTIONS)
    borders, section_size = [0], 0
    for number, size in enumerate(sizes, start=1):
        section_size += size
        if section_size >= enough or number == len(sizes):
            borders.append(number)
            section_size = 0
    return [Section(number, range(*pair)) for number, pair in enumerate(pairwise(borders))]


def partitions_for(num_bytes: int, *, task_bytes: int) -> int:
    """Returns the number of partitions for so many bytes of records."""
    return min(MAX_BUCKETS, 1 + num_bytes // task_bytes)


@dataclass(frozen=True)
class Exchange:
    """One kind of records, and the answers to them."""

    store: Storage
    name: str  # folder in the store
    num_sections: int
    num_partitions: int

    def send(
        self, section: Section, *, pieces: Callable[[Section, "Exchange"], Iterator[Piece]]
    ) -> bytes:
        """Stores a piece for each partition and perhaps one more, which stays; returns as
        `store_pieces` does."""
        key = self._sent(section.number)
        return store_pieces(self.store, key, pieces(section, self), count=self.num_partitions + 1)

    def received(self, partition: int, dtype: np.dtype[Any]) -> Iterator[Records]:
        """Yields what each section sent to a partition."""
        keys = [self._sent(section) for section in range(self.num_sections)]
        return read_pieces(self.store, keys, partition, dtype)

    def kept(self, section: int, dtype: np.dtype[Any]) -> Records:
        """Returns the last piece of a section."""
        return next(read_pieces(self.store, [self._sent(section)], self.num_partitions, dtype))

    def answer(self, partition: int, pieces: Iterator[Piece]) -> bytes:
        """Stores a piece for each section, and returns as `store_pieces` does."""
        return store_pieces(self.store, self._answers(partition), pieces, count=self.num_sections)

    def decide(
        self, partition: int, *, by: Decide, dtype: np.dtype[Any], answers: np.dtype[Any]
    ) -> bytes:
        """Stores the answers that `by` yields for the records (R,) in canonical order, with the
        section of each. An answer's first field is the section that gets it."""
        return self.answer(partition, self._decided(partition, by, dtype, answers))

    def answers(self, section: int, dtype: np.dtype[Any]) -> Iterator[Records]:
        """Yields the answers to a section in the order of the partitions, a megabyte at a time."""
        step = _SLICE_BYTES // dtype.itemsize * dtype.itemsize
        keys = [self._answers(partition) for partition in range(self.num_partitions)]
        borders = _in_order(lambda key: _borders(self.store, key, section), keys)
        slices: list[tuple[str, int, int]] = []
        for key, (first, end) in zip(keys, borders, strict=True):
            for start in range(first, end, step):
                slices.append((key, start, min(start + step, end)))
        for content in _in_order(lambda piece: _read(self.store, *piece), slices):
            yield np.frombuffer(content, dtype)

    def _decided(
        self, partition: int, by: Decide, dtype: np.dtype[Any], answers: np.dtype[Any]
    ) -> Iterator[Piece]:
        by_section = list(self.received(partition, dtype))
        sizes = [len(records) for records in by_section]
        sections = np.repeat(np.arange(len(by_section), dtype=np.int32), sizes)
        records = np.concatenate(by_section)
        del by_section
        with BucketFile(answers, num_buckets=self.num_sections) as buckets:
            for decided in by(records, sections):
                buckets.add(decided)
            yield from buckets.pieces()

    def _sent(self, section: int) -> str:
        return f"{self.name}/section-{section:05d}"

    def _answers(self, partition: int) -> str:
        return f"{self.name}/partition-{partition:05d}"


def store_pieces(store: Storage, key: str, pieces: Iterator[Piece], *, count: int) -> bytes:
    """Stores up to `count` pieces as one object, unless it is there; returns their bytes in decimal
    digits."""
    table_bytes = 8 * (count + 1)
    size = _whole_size(store, key, table_bytes)
    if size is None:
        with tempfile.TemporaryDirectory(prefix="raymill-pieces-") as folder:
            path = Path(folder, "pieces")
            size = _write_pieces(path, pieces, count=count, table_bytes=table_bytes)
            store.upload_file(path, key)
    return b"%d" % (size - table_bytes)


def _whole_size(store: Storage, key: str, table_bytes: int) -> int | None:
    """Returns the size of a stored object, whose table ends with it; None for one that is missing
    or was cut off."""
    entry = store.stat(key)
    if entry is None or entry.size < table_bytes:
        return None
    recorded = _number(store.read_bytes(key, start=table_bytes - 8, end=table_bytes))
    return entry.size if recorded == entry.size else None


def _write_pieces(path: Path, pieces: Iterator[Piece], *, count: int, table_bytes: int) -> int:
    """Writes the table of borders and then the pieces; returns the file's size."""
    with path.open("wb") as file:
        borders = [file.seek(table_bytes)]
        for piece in pieces:
            file.writelines(piece)
            borders.append(file.tell())
        missing = count + 1 - len(borders)
        borders += [borders[-1]] * missing
        file.seek(0)
        file.write(np.array(borders, "<u8").tobytes())
    return borders[-1]


def read_pieces(
    store: Storage, keys: Sequence[str], number: int, dtype: np.dtype[Any]
) -> Iterator[Records]:
    """Yields one piece of each object."""

    def piece(key: str) -> Records:
        first, end = _borders(store, key, number)
        return np.frombuffer(_read(store, key, first, end), dtype)

    return _in_order(piece, keys)


def _in_order(read: Callable[[Item], Read], items: Sequence[Item]) -> Iterator[Read]:
    with ThreadPoolExecutor(_READERS) as pool:
        for first in range(0, len(items), _READERS):
            yield from pool.map(read, items[first : first + _READERS])


def _borders(store: Storage, key: str, number: int) -> tuple[int, int]:
    table = store.read_bytes(key, start=8 * number, end=8 * number + 16)
    return _number(table[:8]), _number(table[8:])


def _read(store: Storage, key: str, first: int, end: int) -> bytes:
    return store.read_bytes(key, start=first, end=end) if first < end else b""


def _number(content: bytes) -> int:
    return int.from_bytes(content, "little")


def run_step(
    label: str, items: Sequence[Item], work: Callable[[Item], bytes], *, run: Runner
) -> int:
    """Runs a task for each item; returns the sum of their results, which are in decimal digits."""
    return sum(map(int, step_results(label, items, work, run=run)))


def step_results(
    label: str, items: Sequence[Item], work: Callable[[Item], bytes], *, run: Runner
) -> Iterator[bytes]:
    """Yields the content of each task's result, in the order in which tasks finish, and shows
    progress."""
    with DataProgress(label, total_bytes=0, num_tasks=len(items)) as progress:
        for result in run(items, work):
            progress.advance(0, documents=0, rss_bytes=result.rss_bytes)
            yield result.content

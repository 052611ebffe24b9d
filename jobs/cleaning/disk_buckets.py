"""Searches more documents than fit into memory, with records in buckets and marks on a local disk.

The files have no names, so nothing is left of them when they are closed or the process ends, however it ends.
"""

import os
import tempfile
from abc import ABC, abstractmethod
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

Records = npt.NDArray[Any]
Places = npt.NDArray[np.uint64]  # chunk << 32 | document: sorting them puts documents in canonical order
Numbers = npt.NDArray[np.int64]
Buckets = npt.NDArray[np.uint16]  # 16 bits, because NumPy sorts them by radix

_BUFFER_BYTES = 8 << 20
_DOCUMENT_BITS = np.uint64(32)
_DOCUMENT = np.uint64((1 << 32) - 1)


class BucketFile:
    """Records of one type, added in any order and read bucket by bucket.

    The file is a series of runs, each a full buffer sorted by bucket. Memory holds the buffer and the beginning of each
    bucket in each run, 8 bytes.
    """

    def __init__(self, file: BinaryIO, dtype: npt.DTypeLike, *, num_buckets: int) -> None:
        self._file = file
        self._empty: Records = np.empty(0, dtype=dtype)
        self._num_buckets = num_buckets
        self._runs: list[Numbers] = []
        self._pending: list[tuple[Buckets, Records]] = []
        self._pending_bytes = 0

    def add(self, buckets: Buckets, records: Records) -> None:
        """Adds records (R,), with the bucket of each in [0, num_buckets)."""
        self._pending.append((buckets, records))
        self._pending_bytes += records.nbytes
        if self._pending_bytes >= _BUFFER_BYTES:
            self._flush()

    def bucket(self, number: int) -> Records:
        """Returns all records of a bucket, in the order of the runs."""
        self._flush()
        parts = [self._empty]
        for borders in self._runs:
            first, end = borders[number : number + 2].tolist()
            content = os.pread(self._file.fileno(), end - first, first)
            parts.append(np.frombuffer(content, dtype=self._empty.dtype))
        return np.concatenate(parts)

    def _flush(self) -> None:
        if not self._pending:
            return
        buckets, records = (np.concatenate(parts) for parts in zip(*self._pending, strict=True))
        self._pending, self._pending_bytes = [], 0
        order = np.argsort(buckets, kind="stable")
        borders = np.searchsorted(buckets, np.arange(self._num_buckets + 1), sorter=order)
        self._runs.append(self._file.tell() + borders * records.itemsize)
        self._file.write(records[order].tobytes())
        self._file.flush()


class DocumentSearch(ABC):
    """A search for documents to drop: add every chunk once, in any order, then call `find`, then `dropped_in`.

    The order of adding does not change the result. Memory holds a few hundred bytes per chunk, the file's buffer, and
    one bucket at a time. Leaving the context frees the disk.
    """

    def __init__(self, folder: Path, dtype: npt.DTypeLike, *, num_buckets: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._files = ExitStack()
        self._records = BucketFile(self._open(), dtype, num_buckets=num_buckets)
        self._num_buckets = num_buckets
        self._chunks: dict[int, range] = {}  # rows of each chunk's documents, in order of arrival
        self._num_rows = 0
        self._dropped: npt.NDArray[np.bool_] | None = None  # (rows,) in a mapped file; None until `find`

    def find(self) -> None:
        """Finds the documents to drop, once all chunks are added."""
        file = self._open()
        file.truncate(max(1, self._num_rows))
        self._dropped = np.memmap(file, dtype=np.bool_, mode="r+")
        numbers = sorted(self._chunks)
        self._chunk_numbers = np.array(numbers, dtype=np.uint64)
        self._first_rows = np.array([self._chunks[number].start for number in numbers], dtype=np.int64)
        for bucket in range(self._num_buckets):
            self._search(self._records.bucket(bucket), self._dropped)

    def dropped_in(self, chunk: int) -> Numbers:
        """Returns a chunk's dropped documents, ascending. Raises KeyError for a chunk that was not added."""
        assert self._dropped is not None, "call `find` first"
        rows = self._chunks[chunk]
        return np.flatnonzero(self._dropped[rows.start : rows.stop])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._dropped = None
        self._files.close()

    @abstractmethod
    def _search(self, records: Records, dropped: npt.NDArray[np.bool_]) -> None:
        """Marks the documents to drop among the records of one bucket in `dropped` (rows,)."""

    def _open(self) -> BinaryIO:
        return self._files.enter_context(tempfile.TemporaryFile(dir=self._folder))

    def _enter(self, chunk: int, documents: Numbers) -> Places:
        """Assigns rows to a chunk's documents (ascending numbers) and returns their places."""
        assert self._dropped is None and chunk not in self._chunks, f"chunk {chunk} was added too late or twice"
        num_rows = int(documents[-1]) + 1 if len(documents) else 0
        self._chunks[chunk] = range(self._num_rows, self._num_rows + num_rows)
        self._num_rows += num_rows
        return np.uint64(chunk) << _DOCUMENT_BITS | documents.astype(np.uint64)

    def _rows(self, places: Places) -> Numbers:
        chunk = np.searchsorted(self._chunk_numbers, places >> _DOCUMENT_BITS)
        return self._first_rows[chunk] + (places & _DOCUMENT).astype(np.int64)

"""Keeps more records than fit into memory on a local disk, by bucket."""

import os
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

Records = npt.NDArray[Any]
Buckets = npt.NDArray[np.uint16]  # 16 bits, because NumPy sorts them by radix

_BUFFER_BYTES = 8 << 20


class BucketFile:
    """Records of one type, added in any order and read bucket by bucket.

    The file is a series of runs, each a full buffer sorted by bucket. Memory holds the buffer and the beginning of each
    bucket in each run, 8 bytes.
    """

    def __init__(self, file: BinaryIO, dtype: npt.DTypeLike, *, num_buckets: int) -> None:
        self._file = file
        self._empty: Records = np.empty(0, dtype=dtype)
        self._num_buckets = num_buckets
        self._runs: list[npt.NDArray[np.int64]] = []
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

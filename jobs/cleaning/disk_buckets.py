"""Keeps more records than fit into memory on a local disk, by bucket."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt

Records = npt.NDArray[Any]

MAX_BUCKETS = 1 << 16  # NumPy sorts 16 bits by radix
_BUFFER_BYTES = 8 << 20


class BucketFile(ExitStack):
    """Records of one type, added in any order and read by bucket, the remainder of their first
    field.

    The file is a series of runs, each a full buffer sorted by bucket. Memory holds the buffer and
    the beginning of each bucket in each run, 8 bytes. It has no name: nothing is left of it when
    the context or the process ends.
    """

    def __init__(self, dtype: np.dtype[Any], *, num_buckets: int) -> None:
        super().__init__()
        self._file = self.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 (as this context)
        self._dtype, self._num_buckets = dtype, num_buckets
        self._runs: list[npt.NDArray[np.int64]] = []
        self._pending: list[Records] = []
        self._pending_bytes = 0

    def add(self, records: Records) -> None:
        """Adds records (R,)."""
        self._pending.append(records)
        self._pending_bytes += records.nbytes
        if self._pending_bytes >= _BUFFER_BYTES:
            self._flush()

    def bucket(self, number: int) -> Records:
        """Returns all records of a bucket, in the order of adding."""
        return np.frombuffer(b"".join(self.parts(number)), dtype=self._dtype)

    def parts(self, number: int) -> Iterator[bytes]:
        """Yields the bytes of a bucket, of one run at a time."""
        self._flush()
        for borders in self._runs:
            first, end = borders[number : number + 2].tolist()
            yield os.pread(self._file.fileno(), end - first, first)

    def pieces(self) -> Iterator[Iterator[bytes]]:
        """Yields the parts of each bucket."""
        return map(self.parts, range(self._num_buckets))

    def _flush(self) -> None:
        if not self._pending:
            return
        records = np.concatenate(self._pending)
        self._pending, self._pending_bytes = [], 0
        assert self._dtype.names, "the first field is the key"
        buckets = (records[self._dtype.names[0]] % self._num_buckets).astype(np.uint16)
        order = np.argsort(buckets, kind="stable")
        borders = np.searchsorted(buckets, np.arange(self._num_buckets + 1), sorter=order)
        self._runs.append(self._file.tell() + borders * records.itemsize)
        self._file.write(records[order].tobytes())
        self._file.flush()

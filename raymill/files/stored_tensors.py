"""Reads values of stored tensors at any place, and never a whole tensor for that, from a folder or
a distant storage.

The files are safetensors. A tensor is in one of them, whole, or its stretches (n,) are in several,
each under its name and its first value's place in the tensor:
`transformer.wte.weight@000000098304`.
"""

import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raymill.errors import CheckpointError
from raymill.files.safetensors_file import DTYPES

Read = Callable[..., bytes]
"""(file, start=…, end=…): the bytes [start, end) of a file."""

READ_BYTES, NUM_READERS = 16 << 20, 8  # at a time; a storage may be distant
_MOST_HEADER_BYTES = 100 << 20  # as safetensors' own readers allow


class Stretch(NamedTuple):
    place: range  # of its values in the tensor
    file: str
    start: int  # of its bytes in the file
    dtype: torch.dtype
    shape: tuple[int, ...] | None  # of the tensor, where that is whole


class _Extent(NamedTuple):
    """Bytes of a file, and the vector that they are for."""

    file: str
    start: int
    end: int
    dtype: torch.dtype
    target: Tensor


def stretch_name(name: str, start: int) -> str:
    """Returns the name of a tensor's stretch: stretches sort by it as they lie in the tensor."""
    return f"{name}@{start:012}"


def _stretch(key: str, entry: Mapping[str, Any], *, file: str, first: int) -> tuple[str, Stretch]:
    """Returns a tensor's name and what a header, behind which the file's values begin at the byte
    `first`, says of it."""
    name, _, place = key.partition("@")
    (start, end), dtype = entry["data_offsets"], DTYPES[entry["dtype"]]
    values = range(int(place or 0), int(place or 0) + (end - start) // dtype.itemsize)
    shape = None if place else tuple(entry["shape"])
    return name, Stretch(values, file, first + start, dtype, shape)


class StoredTensors:
    """The tensors in some safetensors files, of which only the headers are read at once."""

    def __init__(self, files: Iterable[str], read: Read, *, source: object) -> None:
        """`source` names the place of the files in errors."""
        self._read, self._source = read, source
        self._stretches: dict[str, list[Stretch]] = {}
        with ThreadPoolExecutor(NUM_READERS) as readers:
            found = [*chain.from_iterable(readers.map(self._header, files))]
        for name, stretch in sorted(found, key=lambda named: named[1].place.start):
            self._stretches.setdefault(name, []).append(stretch)

    def _header(self, file: str) -> list[tuple[str, Stretch]]:
        first = 8 + int.from_bytes(self._read(file, start=0, end=8), "little")
        if first > _MOST_HEADER_BYTES:
            raise CheckpointError(f"{file} in {self._source} has no header of safetensors")
        try:
            header = json.loads(self._read(file, start=8, end=first))
            entries = [(key, entry) for key, entry in header.items() if key != "__metadata__"]
            return [_stretch(key, entry, file=file, first=first) for key, entry in entries]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"the header of {file} in {self._source} is damaged ({error!r})"
            ) from None

    def load(self, wanted: Iterable[tuple[str, range, Tensor]]) -> None:
        """Copies the values at places of tensors, counted in row-major order, into vectors.

        What is neighbors in a file is read together, up to 16 MiB at a time, and by 8 threads.
        """
        runs: list[list[_Extent]] = []
        for extent in sorted(
            (e for each in wanted for e in self._extents(*each)), key=lambda extent: extent[:2]
        ):
            is_next = bool(runs) and (runs[-1][-1].file, runs[-1][-1].end) == extent[:2]
            if is_next and extent.end - runs[-1][0].start <= READ_BYTES:
                runs[-1].append(extent)
            else:
                runs.append([extent])
        with ThreadPoolExecutor(NUM_READERS) as readers:
            list(readers.map(self._fill, runs))

    def _piece(self, file: str, start: int, end: int) -> bytes:
        content = self._read(file, start=start, end=end)
        if len(content) != end - start:
            raise CheckpointError(
                f"{file} in {self._source} is cut short: bytes {start} to {end} are not all there"
            )
        return content

    def _lacking(self, name: str, place: int) -> CheckpointError:
        return CheckpointError(f"{self._source} has no values of tensor {name} from {place} on")

    def _of(self, name: str) -> list[Stretch]:
        if name not in self._stretches:
            raise CheckpointError(f"{self._source} has no tensor {name}")
        return self._stretches[name]

    def _extents(self, name: str, place: range, target: Tensor) -> Iterator[_Extent]:
        stretches, end = self._of(name), place.start
        first = max(
            0, bisect_right(stretches, place.start, key=lambda stretch: stretch.place.start) - 1
        )
        for values, file, offset, dtype, _ in takewhile(
            lambda s: s.place.start < place.stop, stretches[first:]
        ):
            size, stop = dtype.itemsize, min(values.stop, place.stop)
            if values.start > end:
                break
            while end < stop:
                until = min(stop, end + READ_BYTES // size)
                start = offset + (end - values.start) * size
                into = target[end - place.start : until - place.start]
                yield _Extent(file, start, start + (until - end) * size, dtype, into)
                end = until
        if end < place.stop:
            raise self._lacking(name, end)

    def _fill(self, extents: Sequence[_Extent]) -> None:
        file, first, last = extents[0].file, extents[0].start, extents[-1].end
        content = bytearray(self._piece(file, first, last))
        for _, start, end, dtype, target in extents:
            count = (end - start) // dtype.itemsize
            target.copy_(torch.frombuffer(content, dtype=dtype, count=count, offset=start - first))


def stored_in(folder: Path, files: Iterable[str]) -> StoredTensors:
    """Returns the tensors in these files of a folder."""
    return StoredTensors(files, partial(read_from, folder), source=folder)


def read_from(folder: Path, file: str, start: int, end: int) -> bytes:
    """Returns the bytes [start, end) of a file in a folder, or fewer where it ends before."""
    with (folder / file).open("rb", buffering=0) as opened:
        return os.pread(opened.fileno(), end - start, start)

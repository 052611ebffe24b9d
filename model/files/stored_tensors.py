"""Reads values of stored tensors at any place, and never a whole tensor for that, from a folder or
a distant storage.

The files are safetensors. A tensor is in one of them, whole, or its stretches (n,) are in several,
each under its name and its first value's place in the tensor:
`transformer.wte.weight@000000098304`.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, takewhile
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.files.checkpoint_folder import CheckpointError

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
"""By their name in safetensors."""

Read = Callable[..., bytes]
"""(file, start=…, end=…): the bytes [start, end) of a file."""

_READ_BYTES, _NUM_READERS = 16 << 20, 8
_HASHED_VALUES = 16 << 20


class _Stretch(NamedTuple):
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


class StoredTensors:
    """The tensors in some safetensors files, of which only the headers are read at once."""

    def __init__(self, files: Iterable[str], read: Read, *, source: object) -> None:
        """`source` names the place of the files in errors."""
        self._read, self._source = read, source
        self._stretches: dict[str, list[_Stretch]] = {}
        with ThreadPoolExecutor(_NUM_READERS) as readers:
            found = [*chain.from_iterable(readers.map(self._header, files))]
        for name, stretch in sorted(found, key=lambda named: named[1].place.start):
            self._stretches.setdefault(name, []).append(stretch)

    def _header(self, file: str) -> list[tuple[str, _Stretch]]:
        first = 8 + int.from_bytes(self._read(file, start=0, end=8), "little")
        header = json.loads(self._read(file, start=8, end=first))
        found = []
        for key, entry in header.items():
            if key != "__metadata__":
                name, _, place = key.partition("@")
                (start, end), dtype = entry["data_offsets"], DTYPES[entry["dtype"]]
                values = range(int(place or 0), int(place or 0) + (end - start) // dtype.itemsize)
                shape = None if place else tuple(entry["shape"])
                found.append((name, _Stretch(values, file, first + start, dtype, shape)))
        return found

    def holds(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Reports whether the tensors are these, and no other ones."""
        if self._stretches.keys() != shapes.keys():
            return False
        for name, shape in shapes.items():
            stretches = self._stretches[name]
            num_values = sum(len(stretch.place) for stretch in stretches)
            whole = stretches[0].shape
            if num_values != prod(shape) or whole not in (None, tuple(shape)):
                return False
        return True

    def load(self, wanted: Iterable[tuple[str, range, Tensor]]) -> None:
        """Copies the values at places of tensors, counted in row-major order, into vectors.

        What is neighbors in a file is read together, up to 16 MiB at a time, and by 8 threads.
        """
        runs: list[list[_Extent]] = []
        for extent in sorted(
            (e for each in wanted for e in self._extents(*each)), key=lambda extent: extent[:2]
        ):
            is_next = bool(runs) and (runs[-1][-1].file, runs[-1][-1].end) == extent[:2]
            if is_next and extent.end - runs[-1][0].start <= _READ_BYTES:
                runs[-1].append(extent)
            else:
                runs.append([extent])
        with ThreadPoolExecutor(_NUM_READERS) as readers:
            list(readers.map(self._fill, runs))

    def whole(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Returns new tensors of these shapes."""
        tensors = {
            name: torch.empty(tuple(shape), dtype=self._of(name)[0].dtype)
            for name, shape in shapes.items()
        }
        self.load(
            (name, range(tensor.numel()), tensor.view(-1)) for name, tensor in tensors.items()
        )
        return tensors

    def parameter_hash(self, shapes: Mapping[str, Sequence[int]]) -> str:
        """Returns the parameter hash of tensors of these shapes, of which a part is in memory at a
        time."""
        digest = hashlib.sha256()
        for name in sorted(shapes):
            dtype, num_values = self._of(name)[0].dtype, prod(shapes[name])
            digest.update(hashed_name(name, dtype, shapes[name]))
            for start in range(0, num_values, _HASHED_VALUES):
                values = torch.empty(min(num_values - start, _HASHED_VALUES), dtype=dtype)
                self.load([(name, range(start, start + len(values)), values)])
                digest.update(values.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _of(self, name: str) -> list[_Stretch]:
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
                until = min(stop, end + _READ_BYTES // size)
                start = offset + (end - values.start) * size
                into = target[end - place.start : until - place.start]
                yield _Extent(file, start, start + (until - end) * size, dtype, into)
                end = until
        if end < place.stop:
            raise CheckpointError(f"{self._source} has no values of tensor {name} from {end} on")

    def _fill(self, extents: Sequence[_Extent]) -> None:
        file, first, last = extents[0].file, extents[0].start, extents[-1].end
        content = bytearray(self._read(file, start=first, end=last))
        if len(content) != last - first:
            raise CheckpointError(
                f"{file} in {self._source} is cut short: bytes {first} to {last} are not all there"
            )
        for _, start, end, dtype, target in extents:
            count = (end - start) // dtype.itemsize
            target.copy_(torch.frombuffer(content, dtype=dtype, count=count, offset=start - first))


def hashed_name(name: str, dtype: torch.dtype, shape: Sequence[int]) -> bytes:
    """Returns what a parameter adds to the parameter hash before its elements."""
    return f"{name}\0{str(dtype).removeprefix('torch.')}\0{','.join(map(str, shape))}\0".encode()


def stored_in(folder: Path, files: Iterable[str]) -> StoredTensors:
    """Returns the tensors in these files of a folder."""

    def read(file: str, start: int, end: int) -> bytes:
        with (folder / file).open("rb") as opened:
            opened.seek(start)
            return opened.read(end - start)

    return StoredTensors(files, read, source=folder)

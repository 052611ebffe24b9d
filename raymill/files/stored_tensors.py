"""Reads values of stored tensors at any place, and never a whole tensor for that, from a folder or
a distant storage.

The files are safetensors. A tensor is in one of them, whole, or its stretches (n,) are in several,
each under its name and its first value's place in the tensor:
`transformer.wte.weight@000000098304`.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, takewhile
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raymill.errors import CheckpointError
from raymill.files.safetensors_file import DTYPES, hashed_name

Read = Callable[..., bytes]
"""(file, start=…, end=…): the bytes [start, end) of a file."""

Pieces = Callable[[str, int, int], Iterator[bytes]]
"""(file, start, stop): the bytes of a file from one place to another, a piece at a time."""

Seen = Callable[[Iterator[bytes]], Iterator[bytes]]

_READ_BYTES, _NUM_READERS = 16 << 20, 8  # of a distant storage
_MOST_HEADER_BYTES = 100 << 20  # as safetensors' own readers allow
_HASHED_BYTES = 1 << 20  # at a time of a file that is here: they stay in a processor's cache


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


def _stretch(key: str, entry: Mapping[str, Any], *, file: str, first: int) -> tuple[str, _Stretch]:
    """Returns a tensor's name and what a header, behind which the file's values begin at the byte
    `first`, says of it."""
    name, _, place = key.partition("@")
    (start, end), dtype = entry["data_offsets"], DTYPES[entry["dtype"]]
    values = range(int(place or 0), int(place or 0) + (end - start) // dtype.itemsize)
    shape = None if place else tuple(entry["shape"])
    return name, _Stretch(values, file, first + start, dtype, shape)


class StoredTensors:
    """The tensors in some safetensors files, of which only the headers are read at once."""

    def __init__(
        self, files: Iterable[str], read: Read, *, source: object, pieces: Pieces | None = None
    ) -> None:
        """`source` names the place of the files in errors. Without `pieces` each read is a request
        to a distant storage, and several are on their way at a time."""
        self._read, self._source = read, source
        self._pieces = pieces or self._pieces_ahead
        self._stretches: dict[str, list[_Stretch]] = {}
        with ThreadPoolExecutor(_NUM_READERS) as readers:
            found = [*chain.from_iterable(readers.map(self._header, files))]
        for name, stretch in sorted(found, key=lambda named: named[1].place.start):
            self._stretches.setdefault(name, []).append(stretch)

    def _header(self, file: str) -> list[tuple[str, _Stretch]]:
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

    def parameter_hash(
        self, shapes: Mapping[str, Sequence[int]], *, seen: Seen = lambda pieces: pieces
    ) -> str:
        """Returns the parameter hash of tensors of these shapes, of which a part is in memory at a
        time. The pieces of each tensor pass `seen` on their way."""
        digest = hashlib.sha256()
        for name in sorted(shapes):
            digest.update(hashed_name(name, self._of(name)[0].dtype, shapes[name]))
            for piece in seen(self.contents(name, num_values=prod(shapes[name]))):
                digest.update(piece)
        return digest.hexdigest()

    @property
    def names(self) -> list[str]:
        return sorted(self._stretches)

    def dtype(self, name: str) -> torch.dtype:
        return self._of(name)[0].dtype

    def num_values(self, name: str) -> int:
        return sum(len(stretch.place) for stretch in self._of(name))

    def contents(self, name: str, *, num_values: int) -> Iterator[bytes]:
        """Yields the bytes of a tensor of so many values, in row-major order, in pieces of whole
        words of 64 bits but for the end of a stretch. Raises `CheckpointError` where some are
        missing."""
        end = 0
        for place, file, start, dtype, _ in self._of(name):
            if place.start != end or dtype is not self.dtype(name):
                raise self._lacking(name, end)
            end = place.stop
            yield from self._pieces(file, start, start + len(place) * dtype.itemsize)
        if end != num_values:
            raise self._lacking(name, end)

    def stretches(self, name: str) -> Iterator[bytes]:
        """Yields the bytes of a tensor as far as these files have them, a stretch after the
        other."""
        for place, file, start, dtype, _ in self._of(name):
            yield from self._pieces(file, start, start + len(place) * dtype.itemsize)

    def _pieces_ahead(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        """Yields the bytes of a distant file, some pieces of which are on their way at a time."""
        places = [(at, min(stop, at + _READ_BYTES)) for at in range(start, stop, _READ_BYTES)]
        with ThreadPoolExecutor(_NUM_READERS) as readers:
            ahead = deque(
                readers.submit(self._piece, file, *place) for place in places[:_NUM_READERS]
            )
            for place in places[_NUM_READERS:]:
                yield ahead.popleft().result()
                ahead.append(readers.submit(self._piece, file, *place))
            for waiting in ahead:
                yield waiting.result()

    def _piece(self, file: str, start: int, end: int) -> bytes:
        content = self._read(file, start=start, end=end)
        if len(content) != end - start:
            raise CheckpointError(
                f"{file} in {self._source} is cut short: bytes {start} to {end} are not all there"
            )
        return content

    def _lacking(self, name: str, place: int) -> CheckpointError:
        return CheckpointError(f"{self._source} has no values of tensor {name} from {place} on")

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
            raise self._lacking(name, end)

    def _fill(self, extents: Sequence[_Extent]) -> None:
        file, first, last = extents[0].file, extents[0].start, extents[-1].end
        content = bytearray(self._piece(file, first, last))
        for _, start, end, dtype, target in extents:
            count = (end - start) // dtype.itemsize
            target.copy_(torch.frombuffer(content, dtype=dtype, count=count, offset=start - first))


def stored_in(folder: Path, files: Iterable[str]) -> StoredTensors:
    """Returns the tensors in these files of a folder."""

    def read(file: str, start: int, end: int) -> bytes:
        with (folder / file).open("rb", buffering=0) as opened:
            return os.pread(opened.fileno(), end - start, start)

    def pieces(file: str, start: int, stop: int) -> Iterator[bytes]:
        with (folder / file).open("rb", buffering=0) as opened:
            for at in range(start, stop, _HASHED_BYTES):
                size = min(_HASHED_BYTES, stop - at)
                piece = os.pread(opened.fileno(), size, at)
                if len(piece) != size:
                    raise CheckpointError(f"{file} in {folder} is cut short behind byte {at}")
                yield piece

    return StoredTensors(files, read, source=folder, pieces=pieces)

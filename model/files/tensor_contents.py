"""Reads whole stored tensors, and the bytes of tensors for a hash, of which a part is in memory at a
time."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from raymill.errors import CheckpointError
from raymill.files.safetensors_file import hashed_name
from raymill.files.stored_tensors import NUM_READERS, READ_BYTES, Read, StoredTensors, read_from

Pieces = Callable[[str, int, int], Iterator[bytes]]
"""(file, start, stop): the bytes of a file from one place to another, a piece at a time."""

Seen = Callable[[Iterator[bytes]], Iterator[bytes]]

_HASHED_BYTES = 1 << 20  # at a time of a file that is here: they stay in a processor's cache


class TensorContents(StoredTensors):
    """Stored tensors that are read from end to end too."""

    def __init__(
        self, files: Iterable[str], read: Read, *, source: object, pieces: Pieces | None = None
    ) -> None:
        """Without `pieces` each read is a request to a distant storage, and several are on their
        way at a time."""
        super().__init__(files, read, source=source)
        self._pieces = pieces or self._pieces_ahead

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
        places = [(at, min(stop, at + READ_BYTES)) for at in range(start, stop, READ_BYTES)]
        with ThreadPoolExecutor(NUM_READERS) as readers:
            ahead = deque(
                readers.submit(self._piece, file, *place) for place in places[:NUM_READERS]
            )
            for place in places[NUM_READERS:]:
                yield ahead.popleft().result()
                ahead.append(readers.submit(self._piece, file, *place))
            for waiting in ahead:
                yield waiting.result()


def contents_in(folder: Path, files: Iterable[str]) -> TensorContents:
    """Returns the tensors in these files of a folder."""

    def pieces(file: str, start: int, stop: int) -> Iterator[bytes]:
        with (folder / file).open("rb", buffering=0) as opened:
            for at in range(start, stop, _HASHED_BYTES):
                size = min(_HASHED_BYTES, stop - at)
                piece = os.pread(opened.fileno(), size, at)
                if len(piece) != size:
                    raise CheckpointError(f"{file} in {folder} is cut short behind byte {at}")
                yield piece

    return TensorContents(files, partial(read_from, folder), source=folder, pieces=pieces)

"""Stores a share of the training state in node-local memory, in two slots that are written in turn;
with a third, one of them stays while it is pinned. A kill at any moment leaves a slot whole.

    slot = magic (8) | header length (4) | header CRC-32 (4) | header, JSON … | pin (8) | data, from _DATA_OFFSET on

A write breaks the older slot's magic, copies the data, then the header, and puts the magic back
last. The header has a checksum of the data, which reveals a slot that was torn or altered. The pin
is the time until which the slot is read, and the other one written instead.
"""

import fcntl
import json
import mmap
import os
import struct
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

NUM_SLOTS = 2

_MAGIC = b"RAYMILL1"
_PREFIX = struct.Struct("<II")  # after the magic
_PIN = struct.Struct("<d")
_HEADER_OFFSET = len(_MAGIC) + _PREFIX.size
# The guards' losses make the longest header; pages that are not written take no memory
_DATA_OFFSET = 1 << 17
_PIN_OFFSET = _DATA_OFFSET - _PIN.size
_CHUNK_BYTES = 1 << 20  # copied and summed while it is in the cache


@dataclass(frozen=True)
class Header:
    """Describes the data of a slot."""

    attempt: int
    step: int
    rank: int  # the owner of this share of the state
    world_size: int  # number of shares
    num_updates: int
    names: list[str]  # of the tensors, which lie end to end
    carried: dict[str, Any]  # the rest of the state
    sequence: int = 0  # grows with each write, which sets it and the next two
    num_bytes: int = 0
    checksum: int | None = None


class Checksum:
    """A CRC of the sums, as 64-bit integers, of each chunk of the data: at the speed of memory, and
    the same for any pieces of whole integers."""

    def __init__(self) -> None:
        self.size = self._crc = self._sum = 0

    def add(self, piece: Bytes, *, into: Bytes | None = None) -> None:
        """Adds the next piece, first copied to its place in the data `into`: a chunk at a time, as
        the cache has it."""
        while piece.size:
            room = _CHUNK_BYTES - self.size % _CHUNK_BYTES
            chunk, piece = piece[:room], piece[room:]
            if into is not None:
                place = into[self.size : self.size + chunk.size]
                place[:] = chunk
                chunk = place
            self._sum += int(chunk.view(np.uint64).sum(dtype=np.uint64))
            self.size += chunk.size
            if self.size % _CHUNK_BYTES == 0:
                self._crc, self._sum = self.value, 0

    @property
    def value(self) -> int:
        return zlib.crc32((self._sum % (1 << 64)).to_bytes(8, "little"), self._crc)


class Slots:
    """Slots in a piece of memory that several processes of a node map."""

    def __init__(self, descriptor: int, num_slots: int = NUM_SLOTS) -> None:
        """Maps an open file, whose size is what `bytes_needed` returned, and which is closed with
        the slots."""
        self.file = os.fdopen(descriptor, "r+b", buffering=0)
        self._memory = mmap.mmap(descriptor, 0)
        self._bytes = np.frombuffer(self._memory, np.uint8)
        self.size = len(self._memory)
        self._slot_bytes = self.size // num_slots
        self.numbers = range(num_slots)

    @classmethod
    def at(cls, path: str, num_slots: int = NUM_SLOTS) -> Self:
        return cls(os.open(path, os.O_RDWR), num_slots)

    @staticmethod
    def bytes_needed(num_bytes: int, num_slots: int = NUM_SLOTS) -> int:
        """Returns the size of the file for shares of so many bytes."""
        return num_slots * (_DATA_OFFSET + -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)

    def is_at(self, path: str) -> bool:
        """Reports whether the path still leads to this memory: an open file's number may be used
        again."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(self.file.fileno()))  # noqa: PTH116
        except OSError:
            return False

    def header(self, slot: int) -> Header | None:
        """Returns the header of a sealed slot; None while the slot is written, or where a write was
        cut off."""
        start = slot * self._slot_bytes
        if self._memory[start : start + len(_MAGIC)] != _MAGIC:
            return None
        size, crc = _PREFIX.unpack_from(self._memory, start + len(_MAGIC))
        start += _HEADER_OFFSET
        content = self._memory[start : start + min(size, _PIN_OFFSET)]
        if zlib.crc32(content) != crc:
            return None
        return Header(**json.loads(content))

    def write(self, header: Header, pieces: Iterable[Bytes]) -> int | None:
        """Writes into the slot that is unsealed or older, and not pinned if the other is not.
        Returns its number, or None where the step is there already, from another process, or the
        data do not match a checksum that the header brings."""
        fcntl.flock(self.file, fcntl.LOCK_EX)  # which a process that is killed gives back
        try:
            return self._write(header, pieces)
        finally:
            fcntl.flock(self.file, fcntl.LOCK_UN)

    def _write(self, header: Header, pieces: Iterable[Bytes]) -> int | None:
        sequences = []  # by slot
        for slot in self.numbers:
            before = self.header(slot)
            if before and (before.attempt, before.step) == (header.attempt, header.step):
                return None
            sequences.append(before.sequence if before else -1)
        slot = min(self.numbers, key=lambda slot: (self._is_pinned(slot), sequences[slot]))
        sequence = 1 + max(0, *sequences)
        start = slot * self._slot_bytes
        self._memory[start : start + len(_MAGIC)] = bytes(len(_MAGIC))
        data = self.data(slot)
        checksum = Checksum()
        for piece in pieces:
            checksum.add(piece, into=data)
        if header.checksum not in (None, checksum.value):
            return None
        written = {"sequence": sequence, "num_bytes": checksum.size, "checksum": checksum.value}
        encoded = json.dumps(vars(header) | written).encode()
        assert len(encoded) <= _PIN_OFFSET - _HEADER_OFFSET, f"a header of {len(encoded)} bytes"
        _PREFIX.pack_into(self._memory, start + len(_MAGIC), len(encoded), zlib.crc32(encoded))
        self._memory[start + _HEADER_OFFSET : start + _HEADER_OFFSET + len(encoded)] = encoded
        self._memory[start : start + len(_MAGIC)] = _MAGIC
        return slot

    def pin(self, slot: int, seconds: float) -> None:
        """Has writers use the other slot for so long, at most."""
        until = time.monotonic() + seconds
        _PIN.pack_into(self._memory, slot * self._slot_bytes + _PIN_OFFSET, until)

    def _is_pinned(self, slot: int) -> bool:
        (until,) = _PIN.unpack_from(self._memory, slot * self._slot_bytes + _PIN_OFFSET)
        return bool(until > time.monotonic())

    def data(self, slot: int) -> Bytes:
        """Returns the slot's data, in place."""
        start = slot * self._slot_bytes
        return self._bytes[start + _DATA_OFFSET : start + self._slot_bytes]

    def holds(self, header: Header, slot: int) -> bool:
        """Reports whether the slot was not written again since it had this header."""
        stored = self.header(slot)
        return stored is not None and stored.sequence == header.sequence

    def is_whole(self, slot: int) -> bool:
        """Reports whether the slot is sealed and its data match the header's checksum."""
        header = self.header(slot)
        if header is None:
            return False
        checksum = Checksum()
        checksum.add(self.data(slot)[: header.num_bytes])
        return checksum.value == header.checksum

"""The training state in node-local memory: two slots, written in turn, of which a kill at any moment leaves one whole.

    slot = magic (8) | header length (4) | header CRC-32 (4) | header, JSON … | data, from _DATA_OFFSET on

A write breaks the older slot's magic, copies the data, then the header, and puts the magic back last. The header knows
a checksum of the data, so a slot that was torn, or altered since, is told from a whole one.
"""

import json
import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

NUM_SLOTS = 2

_MAGIC = b"RAYMILL1"
_PREFIX = struct.Struct("<II")  # behind the magic
_HEADER_OFFSET = len(_MAGIC) + _PREFIX.size
_DATA_OFFSET = 1 << 17  # the guards' losses are the longest of a header; pages that are not written take no memory
_CHUNK_BYTES = 1 << 20  # copied and summed while it is in the cache


class Checksum:
    """Of a stream of bytes in chunks of `_CHUNK_BYTES`: their sums as 64-bit integers, at the speed of memory."""

    def __init__(self) -> None:
        self._crc = 0

    def add(self, chunk: Bytes) -> None:
        self._crc = zlib.crc32(chunk.view(np.uint64).sum(dtype=np.uint64).tobytes(), self._crc)

    @property
    def value(self) -> int:
        return self._crc


@dataclass(frozen=True)
class Header:
    """What a slot says of its data."""

    identity: str  # of the run's settings, data and launch
    sequence: int  # grows with each write
    attempt: int
    step: int
    rank: int  # whose share of the state it is, of
    world_size: int  # ranks; 1 where one rank holds the whole state
    num_updates: int
    places: list[tuple[int, int]]  # of the share in the flat buffers
    names: list[str]  # of the tensors, which lie end to end and have equal lengths
    num_bytes: int
    checksum: int
    carried: dict[str, Any]  # what else belongs to the state


class Slots:
    """Two slots in a piece of memory that several processes of a node map."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._bytes = np.frombuffer(memory, np.uint8)
        self._slot_bytes = len(memory) // NUM_SLOTS

    @classmethod
    def map(cls, descriptor: int) -> Self:
        """Of an open file, whose size `bytes_needed` gave."""
        return cls(mmap.mmap(descriptor, os.fstat(descriptor).st_size))

    @staticmethod
    def bytes_needed(num_bytes: int) -> int:
        """Size of the file for states of so many bytes."""
        return NUM_SLOTS * (_DATA_OFFSET + -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)

    def header(self, slot: int) -> Header | None:
        """What a sealed slot holds; None while it is written and when that was cut off."""
        start = slot * self._slot_bytes
        if self._memory[start : start + len(_MAGIC)] != _MAGIC:
            return None
        size, crc = _PREFIX.unpack_from(self._memory, start + len(_MAGIC))
        start += _HEADER_OFFSET
        content = self._memory[start : start + min(size, _DATA_OFFSET)]
        if zlib.crc32(content) != crc:
            return None
        return header_from_json(content)

    def write(self, header: Header, arrays: Sequence[Bytes]) -> int:
        """Writes into the slot that is not whole or is older, and returns it; sequence and checksum are set here."""
        before = [self.header(slot) for slot in range(NUM_SLOTS)]
        slot = min(range(NUM_SLOTS), key=lambda index: found.sequence if (found := before[index]) else -1)
        sequence = 1 + max((found.sequence for found in before if found), default=0)
        start = slot * self._slot_bytes
        self._memory[start : start + len(_MAGIC)] = bytes(len(_MAGIC))
        data, end, checksum = self.data(slot), 0, Checksum()
        for array in arrays:
            for first in range(0, array.size, _CHUNK_BYTES):
                chunk = array[first : first + _CHUNK_BYTES]
                place = data[end : (end := end + chunk.size)]
                place[:] = chunk
                checksum.add(place)
        content = json.dumps(vars(header) | {"sequence": sequence, "num_bytes": end, "checksum": checksum.value})
        encoded = content.encode()
        assert len(encoded) <= _DATA_OFFSET - _HEADER_OFFSET, f"a header of {len(encoded)} bytes"
        _PREFIX.pack_into(self._memory, start + len(_MAGIC), len(encoded), zlib.crc32(encoded))
        self._memory[start + _HEADER_OFFSET : start + _HEADER_OFFSET + len(encoded)] = encoded
        self._memory[start : start + len(_MAGIC)] = _MAGIC
        return slot

    def data(self, slot: int) -> Bytes:
        """The slot's data, in place."""
        start = slot * self._slot_bytes
        return self._bytes[start + _DATA_OFFSET : start + self._slot_bytes]

    def is_whole(self, slot: int) -> bool:
        """Whether the slot is sealed and its data are those that the header was written for."""
        header = self.header(slot)
        return header is not None and checksum_of(self.data(slot)[: header.num_bytes], header.names) == header.checksum


def checksum_of(data: Bytes, names: Sequence[str]) -> int:
    """Of a slot's data, in which the named tensors lie end to end."""
    checksum = Checksum()
    for array in data.reshape(len(names), -1):
        for first in range(0, array.size, _CHUNK_BYTES):
            checksum.add(array[first : first + _CHUNK_BYTES])
    return checksum.value


def header_from_json(content: bytes) -> Header:
    values = json.loads(content)
    return Header(**values | {"places": [(start, stop) for start, stop in values["places"]]})

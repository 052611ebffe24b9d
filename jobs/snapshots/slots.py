"""Stores the training state in node-local memory, in two slots written in turn; a kill at any moment leaves one whole.

    slot = magic (8) | header length (4) | header CRC-32 (4) | header, JSON … | data, from _DATA_OFFSET on

A write breaks the older slot's magic, copies the data, then the header, and puts the magic back last. The header has a
checksum of the data, which reveals a slot that was torn or altered.
"""

import json
import mmap
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

NUM_SLOTS = 2

_MAGIC = b"RAYMILL1"
_PREFIX = struct.Struct("<II")  # after the magic
_HEADER_OFFSET = len(_MAGIC) + _PREFIX.size
_DATA_OFFSET = 1 << 17  # the guards' losses make the longest header; pages that are not written take no memory
_CHUNK_BYTES = 1 << 20  # copied and summed while it is in the cache


@dataclass(frozen=True)
class Header:
    """Describes the data of a slot."""

    attempt: int
    step: int
    rank: int  # the owner of this share of the state
    world_size: int  # number of shares; 1 where one rank holds the whole state
    num_updates: int
    names: list[str]  # of the tensors, which lie end to end and have equal lengths
    carried: dict[str, Any]  # the rest of the state
    sequence: int = 0  # grows with each write, which sets it and the next two
    num_bytes: int = 0
    checksum: int = 0


class Slots:
    """Two slots in a piece of memory that several processes of a node map."""

    def __init__(self, descriptor: int) -> None:
        """Maps an open file, whose size is what `bytes_needed` returned."""
        self._memory = mmap.mmap(descriptor, 0)
        self._bytes = np.frombuffer(self._memory, np.uint8)
        self._slot_bytes = len(self._memory) // NUM_SLOTS

    @classmethod
    def at(cls, path: str) -> Self:
        with Path(path).open("r+b") as file:
            return cls(file.fileno())

    @staticmethod
    def bytes_needed(num_bytes: int) -> int:
        """Returns the size of the file for states of so many bytes."""
        return NUM_SLOTS * (_DATA_OFFSET + -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)

    def header(self, slot: int) -> Header | None:
        """Returns the header of a sealed slot; None while the slot is written, or where a write was cut off."""
        start = slot * self._slot_bytes
        if self._memory[start : start + len(_MAGIC)] != _MAGIC:
            return None
        size, crc = _PREFIX.unpack_from(self._memory, start + len(_MAGIC))
        start += _HEADER_OFFSET
        content = self._memory[start : start + min(size, _DATA_OFFSET)]
        if zlib.crc32(content) != crc:
            return None
        return Header(**json.loads(content))

    def write(self, header: Header, arrays: Sequence[Bytes]) -> int:
        """Writes into the slot that is unsealed or older, and returns its number."""
        before = [self.header(slot) for slot in range(NUM_SLOTS)]
        slot = min(range(NUM_SLOTS), key=lambda index: found.sequence if (found := before[index]) else -1)
        sequence = 1 + max((found.sequence for found in before if found), default=0)
        start = slot * self._slot_bytes
        self._memory[start : start + len(_MAGIC)] = bytes(len(_MAGIC))
        data, end, checksum = self.data(slot), 0, 0
        for array in arrays:
            for first in range(0, array.size, _CHUNK_BYTES):
                chunk = array[first : first + _CHUNK_BYTES]
                place = data[end : (end := end + chunk.size)]
                place[:] = chunk
                checksum = _summed(place, checksum)
        content = json.dumps(vars(header) | {"sequence": sequence, "num_bytes": end, "checksum": checksum})
        encoded = content.encode()
        assert len(encoded) <= _DATA_OFFSET - _HEADER_OFFSET, f"a header of {len(encoded)} bytes"
        _PREFIX.pack_into(self._memory, start + len(_MAGIC), len(encoded), zlib.crc32(encoded))
        self._memory[start + _HEADER_OFFSET : start + _HEADER_OFFSET + len(encoded)] = encoded
        self._memory[start : start + len(_MAGIC)] = _MAGIC
        return slot

    def data(self, slot: int) -> Bytes:
        """Returns the slot's data, in place."""
        start = slot * self._slot_bytes
        return self._bytes[start + _DATA_OFFSET : start + self._slot_bytes]

    def holds(self, header: Header, slot: int) -> bool:
        """Reports whether the slot was not written again since it had this header."""
        found = self.header(slot)
        return found is not None and found.sequence == header.sequence

    def is_whole(self, slot: int) -> bool:
        """Reports whether the slot is sealed and its data match the header's checksum."""
        header = self.header(slot)
        return header is not None and checksum_of(self.data(slot)[: header.num_bytes], header.names) == header.checksum


def checksum_of(data: Bytes, names: Sequence[str]) -> int:
    """Returns the checksum of a slot's data, in which the named tensors lie end to end."""
    checksum = 0
    for array in data.reshape(len(names), -1):
        for first in range(0, array.size, _CHUNK_BYTES):
            checksum = _summed(array[first : first + _CHUNK_BYTES], checksum)
    return checksum


def _summed(chunk: Bytes, checksum: int) -> int:
    """Adds a chunk to a checksum: a CRC of the chunks' sums as 64-bit integers, at the speed of memory."""
    return zlib.crc32(chunk.view(np.uint64).sum(dtype=np.uint64).tobytes(), checksum)

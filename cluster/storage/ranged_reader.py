"""A seekable file over byte ranges: of an object in S3, or a file on the Hub."""

import io
from collections.abc import Callable
from typing import Any, BinaryIO, cast

_BLOCK_BYTES = 8 << 20
"""Size of a request: large against the time to the first byte, small against a worker's memory."""


def ranged_reader(size: int, fetch: Callable[[int, int], bytes]) -> BinaryIO:
    """Returns a buffered reader of `size` bytes; `fetch(start, end)` returns all bytes of [start,
    end)."""
    return cast("BinaryIO", io.BufferedReader(_RangedReader(size, fetch), buffer_size=_BLOCK_BYTES))


class _RangedReader(io.RawIOBase):
    def __init__(self, size: int, fetch: Callable[[int, int], bytes]) -> None:
        self._size = size
        self._fetch = fetch
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        data = self._fetch(self._position, end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def readall(self) -> bytes:
        # The inherited method asks for 8 KiB at a time.
        return b"".join(iter(lambda: self.read(_BLOCK_BYTES) or b"", b""))

"""Streams the text of an archive, and raises an error if the archive is truncated or a
decompression bomb."""

import io
from typing import BinaryIO

import pyarrow as pa

from jobs.corpus.listing import CorpusError, CorpusFile

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_BUFFER_BYTES = 1 << 20
_SMALL_BYTES = 64 << 20  # any archive may unpack to this much


def decompressed(file: BinaryIO, archive: CorpusFile, *, max_ratio: float) -> BinaryIO:
    """Returns the text of an archive, which raises `CorpusError` past `max_ratio` times the
    archive's size; a file that is none as it is."""
    if not archive.compression:
        return file
    # Unlike `zstandard`'s reader, Arrow's detects a truncated stream, in both formats.
    stream = pa.CompressedInputStream(
        pa.PythonFile(file, mode="r"), _COMPRESSIONS[archive.compression]
    )
    limit = max(_SMALL_BYTES, int(archive.size * max_ratio))
    return io.BufferedReader(_Bounded(stream, archive.uri, limit), _BUFFER_BYTES)


class _Bounded(io.RawIOBase):
    def __init__(self, stream: pa.NativeFile, uri: str, limit: int) -> None:
        self._stream, self._uri, self._limit = stream, uri, limit
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count: int = self._stream.readinto(buffer)
        self._position += count
        if self._position > self._limit:
            raise CorpusError(
                f"{self._uri} unpacks to more than {self._limit} bytes; take it out of data.source if it is a bomb, "
                "or raise data.max_compression_ratio"
            )
        return count

"""Divides a corpus into chunks, the units of work, as a pure function of the sizes of its files.

A chunk is about `data.shard_bytes` of source text and becomes one shard of each split. A large txt,
jsonl or parquet file is divided into byte ranges; a range owns the documents that begin in it. A
large archive or csv file cannot be entered in the middle, so it is first cut into pieces (see
file_pieces).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from cluster.settings.data import DataConfig
from jobs.corpus.listing import CorpusFile

# Bytes of text for each byte of an archive, to an order of magnitude
EXPANSION = {".gz": 3, ".zst": 3, "": 1}
_MIN_SHARD_BYTES, _MAX_SHARD_BYTES = 16 << 20, 512 << 20
# Which all but the largest corpora stay below: readers list them, and the driver counts on each
_MANY_CHUNKS = 4096
CHUNK_PARTS = 512  # tiny files are opened one by one: a larger chunk would take minutes from S3


@dataclass(frozen=True, slots=True)
class Part:
    """The documents that begin at bytes [start, end) of a file."""

    file: CorpusFile
    start: int
    end: int
    offset: int = 0  # where this file begins in the file that it was cut from
    piece_of: str = ""  # URI of the file that it was cut from


def whole_file(file: CorpusFile) -> Part:
    return Part(file, 0, file.size)


@dataclass(frozen=True)
class Chunk:
    """The parts that one task works on."""

    number: int
    source: int
    parts: list[Part]

    @property
    def bytes(self) -> int:
        return sum(part.end - part.start for part in self.parts)


def is_divisible(file: CorpusFile) -> bool:
    """Reports whether reading can begin within the file, and not at its front alone."""
    return not file.compression and file.kind != "csv"


def text_step(max_document_bytes: int) -> int:
    """Returns the bytes between nominal borders of an over-long text; the real border is the next
    line end or so."""
    return max(1, max_document_bytes - max(4, max_document_bytes // 16))


def default_shard_bytes(files: Sequence[CorpusFile]) -> int:
    """Returns the bytes of a shard where `data.shard_bytes` is 0: a power of two that depends on
    the corpus's size."""
    least = sum(file.size * EXPANSION[file.compression] for file in files) // _MANY_CHUNKS
    return min(_MAX_SHARD_BYTES, max(_MIN_SHARD_BYTES, 1 << (least - 1).bit_length()))


def plan_chunks(
    files: Sequence[CorpusFile], pieces: Mapping[int, Sequence[Part]], data: DataConfig
) -> list[Chunk]:
    """Returns the chunks, none of which spans two sources; `pieces` holds the pieces of each file
    that was cut."""
    chunks: list[Chunk] = []
    for source, own in groupby(files, key=lambda file: file.source):
        parts: list[Part] = []
        weight = 0
        for file in own:
            for part in pieces.get(file.number) or _ranges(file, data):
                added = (part.end - part.start) * EXPANSION[part.file.compression]
                if parts and (weight + added > data.shard_bytes or len(parts) == CHUNK_PARTS):
                    chunks.append(Chunk(len(chunks), source, parts))
                    parts, weight = [], 0
                parts.append(part)
                weight += added
        if parts:
            chunks.append(Chunk(len(chunks), source, parts))
    return chunks


def _ranges(file: CorpusFile, data: DataConfig) -> Iterator[Part]:
    is_whole = not is_divisible(file) or (
        file.kind == "txt" and file.size <= data.max_document_bytes
    )
    step = text_step(data.max_document_bytes) if file.kind == "txt" else data.shard_bytes
    if is_whole or file.size <= step:
        yield whole_file(file)
        return
    for start in range(0, file.size, step):
        yield Part(file, start, min(start + step, file.size))

"""How a corpus is divided into chunks, the units of work: a pure function of its files' sizes.

A chunk is about `data.shard_bytes` of source text and becomes one shard of each split, whoever works on it. A large
txt, jsonl or parquet file is divided by byte ranges; a range owns the documents that begin in it. A large archive
or csv file has no such places: it is first cut into pieces (see file_pieces).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from jobs.corpus.listing import CorpusFile

EXPANSION = {".gz": 3, ".zst": 3, "": 1}  # text in an archive; only has to be in the right order of magnitude
_CHUNK_PARTS = 512  # tiny files are opened one by one: a chunk of more would take minutes from S3


@dataclass(frozen=True)
class Part:
    """The documents that begin at bytes [start, end) of a file."""

    file: int  # place in the listing
    uri: str
    version: str
    kind: str
    compression: str
    start: int
    end: int
    size: int  # bytes of the file
    offset: int = 0  # of this file's first byte in the file that it is a piece of
    piece_of: str = ""  # that file's URI


def whole_file(number: int, file: CorpusFile) -> Part:
    return Part(number, file.uri, file.version, file.kind, file.compression, 0, file.size, file.size)


@dataclass(frozen=True)
class Chunk:
    number: int
    source: int
    parts: list[Part]

    @property
    def bytes(self) -> int:
        return sum(part.end - part.start for part in self.parts)


def needs_cutting(file: CorpusFile, *, shard_bytes: int) -> bool:
    return file.size > shard_bytes and (bool(file.compression) or file.kind == "csv")


def text_step(max_document_bytes: int) -> int:
    """Bytes from one nominal border of an over-long text to the next; the real one is the next line end or so."""
    return max(1, max_document_bytes - max(4, max_document_bytes // 16))


def plan_chunks(
    files: Sequence[CorpusFile],
    pieces: Mapping[int, Sequence[Part]],
    *,
    shard_bytes: int,
    max_document_bytes: int,
) -> list[Chunk]:
    """The chunks of the files, none across two sources; `pieces` holds those of the files that were cut."""
    chunks: list[Chunk] = []
    for source, numbered in groupby(enumerate(files), key=lambda pair: pair[1].source):
        parts: list[Part] = []
        weight = 0
        for number, file in numbered:
            divided = pieces[number] if number in pieces else _ranges(number, file, shard_bytes, max_document_bytes)
            for part in divided:
                added = (part.end - part.start) * EXPANSION[part.compression]
                if parts and (weight + added > shard_bytes or len(parts) == _CHUNK_PARTS):
                    chunks.append(Chunk(len(chunks), source, parts))
                    parts, weight = [], 0
                parts.append(part)
                weight += added
        if parts:
            chunks.append(Chunk(len(chunks), source, parts))
    return chunks


def _ranges(number: int, file: CorpusFile, shard_bytes: int, max_document_bytes: int) -> Iterator[Part]:
    whole = whole_file(number, file)
    if file.kind == "txt":
        step = text_step(max_document_bytes) if file.size > max_document_bytes else file.size
    else:
        step = shard_bytes
    if file.compression or file.kind == "csv" or file.size <= step:
        yield whole
        return
    for start in range(0, file.size, step):
        yield replace(whole, start=start, end=min(start + step, file.size))


def interleaved(chunks: Sequence[Chunk]) -> list[Chunk]:
    """In order within each source, all sources advancing alike: so that each has sealed shards early."""
    totals = {source: len(list(group)) for source, group in groupby(chunks, key=lambda chunk: chunk.source)}
    firsts = {source: next(c.number for c in chunks if c.source == source) for source in totals}
    return sorted(
        chunks, key=lambda chunk: ((chunk.number - firsts[chunk.source]) / totals[chunk.source], chunk.number)
    )

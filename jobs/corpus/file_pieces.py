"""Cuts large files that cannot be divided into byte ranges, archives and csv files, into pieces.

One task streams such a file and stores its text in pieces of about a shard each, cut where a
document ends. The pieces are then read like any corpus file, so all workers share the work on one 5
GB archive.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from cluster.output.progress import progress
from cluster.settings.data import DataConfig
from cluster.storage.uris import Entry, Storage, join_uri, split_uri
from jobs.corpus.chunks import Chunk, Part, is_divisible, whole_file
from jobs.corpus.decompression import decompressed
from jobs.corpus.documents import endless_header, longest_line, named_damage, stretches
from jobs.corpus.listing import CorpusFile
from jobs.corpus.ray_data_tasks import Runner, run_tasks
from jobs.corpus.text_borders import Record, lines, records

PIECES = "unpacked"
_ALL = "all"  # an empty file, which is written last
_MAX_PIECE_BYTES = 64 << 20  # is in memory at once


def cut_files(
    store: Storage, files: Sequence[CorpusFile], data: DataConfig, *, run: Runner = run_tasks
) -> dict[int, list[Part]]:
    """Returns the pieces of the large indivisible files, which lie in `store`'s folder `unpacked`.
    Needs Ray."""
    large = [file for file in files if file.size > data.shard_bytes and not is_divisible(file)]
    tasks = [Chunk(file.number, file.source, [whole_file(file)]) for file in large]
    pieces: dict[int, list[Part]] = {}
    if tasks:
        with progress("unpacking", total=sum(file.size for file in large) / 1e6) as advance:
            for result in run(tasks, partial(cut_file, store=store, data=data)):
                file = result.item.parts[0].file
                folder = store.child(result.content.decode())
                pieces[file.number] = [
                    _part(file, folder.uri, entry) for entry in folder.entries("0")
                ]
                advance(file.size / 1e6)
    return pieces


def cut_file(chunk: Chunk, *, store: Storage, data: DataConfig) -> bytes:
    """Stores the pieces of a file, each named by its place in the text, and returns the key of
    their folder."""
    file, key = chunk.parts[0].file, f"{PIECES}/{chunk.number:05d}"
    folder = store.child(key)
    if not folder.exists(_ALL):
        for offset, content in _pieces(file, data):
            folder.write_bytes(f"{offset:015d}.{file.kind}", content)
        folder.write_bytes(_ALL, b"")
    return key.encode()


def _part(file: CorpusFile, folder: str, entry: Entry) -> Part:
    piece = replace(
        file,
        uri=join_uri(folder, entry.key),
        size=entry.size,
        version=entry.version,
        compression="",
    )
    return Part(piece, 0, entry.size, int(entry.key.partition(".")[0]), file.uri)


def _pieces(file: CorpusFile, data: DataConfig) -> Iterator[tuple[int, bytes]]:
    """Yields (offset in the text, content) of pieces of whole documents; each piece of a csv file
    has the header."""
    storage, name = split_uri(file.uri)
    with (
        storage.open(name, listed=Entry(name, file.size, file.version)) as raw,
        named_damage(file.uri),
    ):
        text = decompressed(raw, file, max_ratio=data.max_compression_ratio)
        if file.kind == "txt":
            yield from stretches(text, data.max_document_bytes)
            return
        limit = longest_line(file.kind, data)
        if file.kind == "csv":
            units = records(text, limit=limit)
            first = next(units, None)
            if first and not first.is_whole:
                raise endless_header(file.uri)
            header = first.content if first else b""
        else:
            header = b""
            units = (Record(*line, is_fresh=True) for line in lines(text, limit=limit))
        yield from _gathered(units, header, least_bytes=min(data.shard_bytes, _MAX_PIECE_BYTES))


def _gathered(
    units: Iterator[Record], header: bytes, *, least_bytes: int
) -> Iterator[tuple[int, bytes]]:
    """Yields pieces of `least_bytes` or more, each with the header. A piece ends where what follows
    it is read in the same way without it."""
    piece, start = bytearray(header), 0
    for offset, unit, is_whole, is_fresh in units:
        if is_fresh and len(piece) >= least_bytes and len(piece) > len(header):
            yield start, bytes(piece)
            piece = bytearray(header)
        if len(piece) == len(header):
            start = offset - len(header)
        piece += unit if is_whole or unit.endswith((b"\n", b"\r")) else unit + b"\n"
    yield start, bytes(piece)

"""Readers: the documents of a corpus file, one at a time, each with its text or the reason to drop it.

txt holds one document a file, jsonl one a line (blank lines hold none), parquet one a row; txt and jsonl may
be .gz or .zst. Text is kept as it is (line ends, blanks); only a byte order mark at a file's front is no text.
A document that cannot be used is dropped and counted; a *file* that cannot be read to its end (a truncated
archive, a damaged footer) stops the job with its name, as nobody could say what was lost in it.
"""

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config import DataConfig
from cluster.storage import Entry, absolute_uri, glob_uris, split_uri
from model.errors import UserError

_ENDINGS = re.compile(r"\.(txt|jsonl)(\.gz|\.zst)?$|\.(parquet)$", re.IGNORECASE)
_EXPECTED = "expected .txt .jsonl .parquet, .gz and .zst of the first two"
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BUFFER_BYTES = 1 << 20


class CorpusError(UserError):
    """The corpus cannot be used as it is; the text names the file and what to do."""


class Drop(StrEnum):
    """Why a document is not in the token store."""

    EMPTY = "empty"  # no text, or blanks only
    BINARY = "binary"  # holds a NUL, which text does not: an image, an archive, UTF-16
    INVALID_UTF8 = "invalid_utf8"  # data.invalid_utf8 is `skip`
    INVALID_JSON = "invalid_json"  # the line is not JSON
    MISSING_TEXT = "missing_text"  # the line or row has no string under data.text_field
    TOO_LONG = "too_long"  # more than data.max_document_bytes
    DUPLICATE = "duplicate"  # the same text, byte for byte, came earlier in the corpus


@dataclass(frozen=True)
class Document:
    """`offset` finds the document again: its first byte in the uncompressed file, or its row."""

    offset: int
    text: bytes = b""  # UTF-8; empty when dropped
    drop: Drop | None = None
    replaced: bool = False  # held bytes that are not UTF-8, now U+FFFD


@dataclass(frozen=True)
class Listing:
    """A corpus's files in canonical order (order of the sources, then path), and those left out by ending."""

    files: list[Entry]
    skipped: list[str]

    def identity(self) -> list[tuple[str, int, str]]:
        """What a change of the corpus's files changes, as JSON values."""
        return [(entry.key, entry.size, entry.version) for entry in self.files]


def list_corpus(source: str | list[str]) -> Listing:
    """The files that `data.source` names, each once. Raises `CorpusError` and `StorageError`.

    A file named by itself must have a known ending; those that a folder or pattern brings along are left out.
    """
    sources = [source] if isinstance(source, str) else source
    if not sources:
        raise CorpusError("data.source is empty; name the corpus by a path or s3:// URI, globs allowed")
    files: dict[str, Entry] = {}
    skipped: list[str] = []
    for name in sources:
        for entry in glob_uris(name):
            if _ENDINGS.search(entry.key):
                files.setdefault(entry.key, entry)
            elif entry.key == absolute_uri(name):
                raise CorpusError(f"{name} has an unknown ending; {_EXPECTED}")
            else:
                skipped.append(entry.key)
    if not files:
        raise CorpusError(f"none of the {len(skipped)} files at {', '.join(sources)} has a known ending; {_EXPECTED}")
    return Listing(list(files.values()), skipped)


def empty_corpus(num_files: int, dropped: Mapping[str, int]) -> CorpusError:
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
    return CorpusError(
        f"the corpus is empty: {num_files} files, {sum(dropped.values())} documents dropped"
        f"{f' ({reasons})' if reasons else ''}; check data.source and data.text_field"
    )


def read_documents(uri: str, data: DataConfig, *, offsets: Sequence[int] | None = None) -> Iterator[Document]:
    """The documents of a file in their order, or only those at the given ascending offsets.

    Holds one document in memory, or one parquet batch. Raises `CorpusError` for a file that cannot be read to
    its end, and for text that is not UTF-8 when `data.invalid_utf8` is `fail`.
    """
    storage, name = split_uri(uri)
    ending = _ENDINGS.search(name)
    if ending is None:
        raise CorpusError(f"{uri} has an unknown ending; {_EXPECTED}")
    reader = _Reader(uri, data)
    with storage.open(name) as file, _damage_named(uri):
        if ending[3]:
            yield from reader.parquet(file, offsets)
            return
        read = reader.txt if ending[1].lower() == "txt" else reader.jsonl
        yield from read(_decompressed(file, ending[2]) if ending[2] else file, offsets)


def _decompressed(file: BinaryIO, ending: str) -> BinaryIO:
    # Unlike `zstandard`'s reader, Arrow's tells a truncated stream from a finished one, for both formats.
    stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), _COMPRESSIONS[ending.lower()])
    return io.BufferedReader(stream, _BUFFER_BYTES)


@contextmanager
def _damage_named(uri: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).rstrip(".").partition("\n")[0]
        raise CorpusError(
            f"{uri} cannot be read to its end ({reason}); replace the file or take it out of data.source"
        ) from error


@dataclass(frozen=True)
class _Reader:
    uri: str
    data: DataConfig

    def judged(self, raw: bytes, offset: int) -> Document:
        """The document that the bytes of a text make, kept or dropped."""
        if len(raw) > self.data.max_document_bytes:
            return Document(offset, drop=Drop.TOO_LONG)
        if b"\0" in raw:
            return Document(offset, drop=Drop.BINARY)
        if not raw.strip():
            return Document(offset, drop=Drop.EMPTY)
        return self.decoded(raw, offset)

    def decoded(self, raw: bytes, offset: int) -> Document:
        """The policy for bytes that are not UTF-8."""
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            if self.data.invalid_utf8 == "fail":
                raise CorpusError(
                    f"{self.uri} is not UTF-8 at byte {offset + error.start}; convert the file, "
                    "or set data.invalid_utf8 to replace or skip"
                ) from error
            if self.data.invalid_utf8 == "skip":
                return Document(offset, drop=Drop.INVALID_UTF8)
            return Document(offset, raw.decode(errors="replace").encode(), replaced=True)
        return Document(offset, raw)

    def txt(self, file: BinaryIO, offsets: Sequence[int] | None) -> Iterator[Document]:
        if offsets is None or len(offsets):
            raw = file.read(len(_BYTE_ORDER_MARK) + self.data.max_document_bytes + 1)
            yield self.judged(raw.removeprefix(_BYTE_ORDER_MARK), 0)

    def jsonl(self, file: BinaryIO, offsets: Sequence[int] | None) -> Iterator[Document]:
        # JSON writes a byte of text as six at most (\u0041).
        for offset, line in _lines(file, offsets, limit=6 * self.data.max_document_bytes + _BUFFER_BYTES):
            if line is None:
                yield Document(offset, drop=Drop.TOO_LONG)
            elif line.strip():
                yield self.json_document(line, offset)

    def json_document(self, line: bytes, offset: int) -> Document:
        if b"\0" in line:
            return Document(offset, drop=Drop.BINARY)
        decoded = self.decoded(line, offset)
        if decoded.drop:
            return decoded
        try:
            value = json.loads(decoded.text)
        except (ValueError, RecursionError):  # also thousands of digits or of nested brackets
            return Document(offset, drop=Drop.INVALID_JSON)
        text = value.get(self.data.text_field) if isinstance(value, dict) else None
        if not isinstance(text, str):
            return Document(offset, drop=Drop.MISSING_TEXT)
        # A lone surrogate ("\ud800") is valid JSON without UTF-8: the three bytes made here are invalid too.
        document = self.judged(text.encode(errors="surrogatepass"), offset)
        return replace(document, replaced=True) if decoded.replaced and not document.drop else document

    def parquet(self, file: BinaryIO, offsets: Sequence[int] | None) -> Iterator[Document]:
        parquet = pq.ParquetFile(file)
        self.check_column(parquet.schema_arrow)
        wanted = None if offsets is None else set(offsets)
        row = 0
        for group in range(parquet.num_row_groups):
            rows = range(row, row + parquet.metadata.row_group(group).num_rows)
            row = rows.stop
            if wanted is None or not wanted.isdisjoint(rows):
                for number, raw in zip(rows, self.column_values(parquet, group), strict=True):
                    if wanted is None or number in wanted:
                        missing = Document(number, drop=Drop.MISSING_TEXT)
                        yield missing if raw is None else self.judged(raw, number)

    def check_column(self, schema: pa.Schema) -> None:
        field = self.data.text_field
        if field not in schema.names:
            names = ", ".join(schema.names)
            raise CorpusError(f"{self.uri} has no column {field!r}; set data.text_field to one of {names}")
        kind = schema.field(field).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if kind not in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
            raise CorpusError(f"column {field!r} of {self.uri} holds {kind}, not strings; set data.text_field")

    def column_values(self, parquet: pq.ParquetFile, group: int) -> Iterator[bytes | None]:
        columns = [self.data.text_field]
        for batch in parquet.iter_batches(256, row_groups=[group], columns=columns, use_threads=False):
            column = batch.column(0)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            for value in column.cast(pa.large_binary()):
                yield value.as_py()


def _lines(file: BinaryIO, offsets: Sequence[int] | None, *, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """(offset, line) of all lines or of those at `offsets`; None for a line over `limit`, never held."""
    position = 0
    targets = None if offsets is None else iter(offsets)
    while True:
        if targets is not None:
            target = next(targets, None)
            if target is None:
                return
            position = _move_on(file, position, target)
        line = file.readline(limit)
        if not line:
            return
        start, position = position, position + len(line)
        complete = len(line) < limit or line.endswith(b"\n")
        yield start, (line if start else line.removeprefix(_BYTE_ORDER_MARK)) if complete else None
        while not complete:
            rest = file.readline(_BUFFER_BYTES)
            position += len(rest)
            complete = not rest or rest.endswith(b"\n")


def _move_on(file: BinaryIO, position: int, target: int) -> int:
    if file.seekable():
        return file.seek(target)
    # A compressed stream has no other way forward; what it spares is the parsing.
    while position < target and (skipped := file.read(min(_BUFFER_BYTES, target - position))):
        position += len(skipped)
    return position

"""Reads the documents of a part of a corpus file one at a time, each with its text or the reason to
drop it.

A txt file holds one document (several if it is longer than a document may be), jsonl one per
nonblank line, csv one per record, parquet one per row; a conversation is one too, of jsonl alone.
Text is kept as it is, except for a byte order mark at the front of a file or of a jsonl line. A
document that cannot be used is dropped and counted. A *file* that cannot be read to its end (a
truncated archive, a damaged footer), or that changed since it was listed, stops the job with its
name, because nobody could say what was lost.
"""

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, BinaryIO, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.settings.data import DataConfig
from cluster.storage.uris import Entry, split_uri
from jobs.corpus.chunks import Part, text_step
from jobs.corpus.conversations import messages_of
from jobs.corpus.decompression import decompressed
from jobs.corpus.listing import CorpusError
from jobs.corpus.text_borders import BYTE_ORDER_MARK, cut_stream, lines, records
from jobs.corpus.text_hashes import is_blank
from model.text.chat import ROLES, plain_text

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
# Bytes in which a byte of text may be written: \\u0041, a doubled quote
_LINE_FACTOR = {"jsonl": 6, "csv": 2}
_LINE_MARGIN_BYTES = 1 << 20  # room for the other fields of a line
_STRINGS = (
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
)
# The template re-renders the conversation for each answer, so its time is quadratic
_MAX_MESSAGES = 1000
_PREVIEW_BYTES = 200


class Drop(StrEnum):
    """The reason why a document is not in the token store; cleaning/quality_rules explains the
    quality rules."""

    EMPTY = "empty"  # no text, or only blanks and invisible characters
    BINARY = "binary"  # holds a NUL, unlike text: an image, an archive, UTF-16
    INVALID_UTF8 = "invalid_utf8"  # data.invalid_utf8 is `skip`
    INVALID_JSON = "invalid_json"  # the line is not JSON
    INVALID_CSV = "invalid_csv"  # an unclosed quote, or more fields than the header
    MISSING_TEXT = "missing_text"  # the line or row has no string under data.text_field
    TOO_LONG = "too_long"  # more than data.max_document_bytes, or than 1,000 messages
    WORD_COUNT = "word_count"
    WORD_LENGTH = "word_length"
    SYMBOL_RATIO = "symbol_ratio"
    LINE_MARKS = "line_marks"
    ALPHABETIC_WORDS = "alphabetic_words"
    STOP_WORDS = "stop_words"
    DUPLICATE = "duplicate"  # the same normalized text came earlier in the corpus
    # A later one of a family of similar texts: data.near_dedup_threshold
    NEAR_DUPLICATE = "near_duplicate"
    # Shares a run of words with a validation document: data.decontaminate_ngram
    CONTAMINATED = "contaminated"
    NO_MESSAGES = "no_messages"  # the line has none of the forms that corpus/conversations reads
    UNKNOWN_ROLE = "unknown_role"  # other than system, developer, user and assistant
    NO_ANSWER = "no_answer"  # no message of the assistant has text
    TEMPLATE_REFUSED = "template_refused"  # the chat template cannot write these messages


CHAT_DROPS = (Drop.NO_MESSAGES, Drop.UNKNOWN_ROLE, Drop.NO_ANSWER, Drop.TEMPLATE_REFUSED)
UNREADABLE = (
    Drop.BINARY,
    Drop.INVALID_UTF8,
    Drop.INVALID_JSON,
    Drop.INVALID_CSV,
    Drop.MISSING_TEXT,
    *CHAT_DROPS,
)
"""The reasons that point to a wrong setting or a damaged corpus, which data.max_unreadable_fraction
bounds."""


class Document(NamedTuple):  # a dataclass takes 1 us more to make
    offset: int  # its first byte in the uncompressed file, or its row
    text: str = ""  # empty when dropped
    messages: tuple[dict[str, str], ...] = ()  # of a conversation, whose text only shows them
    drop: Drop | None = None
    replaced: bool = False  # bytes that were not UTF-8 are now U+FFFD
    size: int = 0  # bytes of UTF-8, or of the part of a dropped document that was read
    preview: str = ""  # the front of a dropped document


def read_documents(part: Part, data: DataConfig) -> Iterator[Document]:
    """Yields the documents of a part in order, with one document or parquet batch in memory at a
    time.

    Raises `ConflictError` for a file that changed, and `CorpusError` for one that cannot be read to
    its end, and for text that is not UTF-8 when `data.invalid_utf8` is `fail`.
    """
    listed, reader = part.file, _Reader(part, data)
    storage, name = split_uri(listed.uri)
    if data.format == "chat" and listed.kind != "jsonl":
        raise CorpusError(
            f"data.format=chat reads .jsonl files, and {listed.uri} is none; take it out"
        )
    read = {"txt": reader.txt, "jsonl": reader.jsonl, "csv": reader.csv, "parquet": reader.parquet}[
        listed.kind
    ]
    with (
        storage.open(name, listed=Entry(name, listed.size, listed.version)) as file,
        named_damage(listed.uri),
    ):
        yield from read(decompressed(file, listed, max_ratio=data.max_compression_ratio))


@contextmanager
def named_damage(uri: str) -> Iterator[None]:
    """Turns the errors that a damaged file raises into a `CorpusError` with the file's name."""
    try:
        yield
    except (
        OSError,
        pa.ArrowException,
        UnicodeDecodeError,
    ) as error:  # the last one: a damaged column name
        reason = str(error).rstrip(".").partition("\n")[0]
        raise CorpusError(
            f"{uri} cannot be read to its end ({reason}); replace the file or take it out of data.source"
        ) from error


def longest_line(kind: str, data: DataConfig) -> int:
    """Returns the most bytes that a line with a document of `data.max_document_bytes` may have."""
    return _LINE_FACTOR[kind] * data.max_document_bytes + _LINE_MARGIN_BYTES


def stretches(
    file: BinaryIO, max_document_bytes: int, *, start: int = 0, end: int | None = None
) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, bytes) of the documents of a txt file: the whole of it, or the stretches of
    an over-long text."""
    front = b"" if start else file.read(max_document_bytes + 1)
    if not start and len(front) <= max_document_bytes:
        yield 0, front
        return
    step = text_step(max_document_bytes)
    yield from cut_stream(file, start, end, step=step, slack=max_document_bytes - step, front=front)


def endless_header(uri: str) -> CorpusError:
    return CorpusError(
        f"the header of {uri} does not end: a quote is not closed, or lines do not end; fix the file"
    )


@dataclass(frozen=True)
class _Reader:
    part: Part
    data: DataConfig

    @property
    def uri(self) -> str:
        return self.part.piece_of or self.part.file.uri

    @property
    def end(self) -> int | None:
        """The part's end in the text; None for an archive, whose text ends where the archive
        does."""
        return None if self.part.file.compression else self.part.end

    def dropped(self, raw: bytes, offset: int, drop: Drop) -> Document:
        preview = raw[:_PREVIEW_BYTES].decode(errors="replace").strip()
        if raw.startswith(_UTF16_MARKS):
            preview = f"UTF-16, convert it to UTF-8: {raw[:_PREVIEW_BYTES].decode('utf-16', errors='replace')}"
        return Document(self.part.offset + offset, drop=drop, size=len(raw), preview=preview)

    def judged(self, raw: bytes, offset: int) -> Document:
        """Returns the document, kept or dropped, that the bytes of a text make."""
        if len(raw) > self.data.max_document_bytes:
            return self.dropped(raw, offset, Drop.TOO_LONG)
        if b"\0" in raw or raw.startswith(_UTF16_MARKS):
            return self.dropped(raw, offset, Drop.BINARY)
        if is_blank(raw):
            return self.dropped(raw, offset, Drop.EMPTY)
        return self.decoded(raw, offset)

    def decoded(self, raw: bytes, offset: int) -> Document:
        """Applies `data.invalid_utf8` to bytes that are not UTF-8."""
        position = self.part.offset + offset
        try:
            return Document(position, raw.decode(), size=len(raw))
        except UnicodeDecodeError as error:
            if self.data.invalid_utf8 == "fail":
                raise CorpusError(
                    f"{self.uri} is not UTF-8 at byte {position + error.start}; convert the file, "
                    "or set data.invalid_utf8 to replace or skip"
                ) from error
            if self.data.invalid_utf8 == "skip":
                return self.dropped(raw, offset, Drop.INVALID_UTF8)
            text = raw.decode(errors="replace")
            return Document(position, text, replaced=True, size=len(text.encode()))

    def judged_text(self, text: str, offset: int) -> Document:
        """Does what `judged` does, for text that its container has decoded."""
        if (
            text.isascii()
            and len(text) <= self.data.max_document_bytes
            and "\0" not in text
            and text.strip()
        ):
            return Document(self.part.offset + offset, text, size=len(text))
        # A lone surrogate ("\ud800") is valid JSON but has no UTF-8: the three bytes made here are
        # invalid too.
        return self.judged(text.encode(errors="surrogatepass"), offset)

    def txt(self, file: BinaryIO) -> Iterator[Document]:
        for offset, raw in stretches(
            file, self.data.max_document_bytes, start=self.part.start, end=self.end
        ):
            is_front = self.part.offset + offset == 0  # of the file, not of a piece of it
            yield self.judged(raw.removeprefix(BYTE_ORDER_MARK) if is_front else raw, offset)

    def jsonl(self, file: BinaryIO) -> Iterator[Document]:
        limit = longest_line("jsonl", self.data)
        for offset, raw, is_whole in lines(file, self.part.start, self.end, limit=limit):
            line = raw.removeprefix(BYTE_ORDER_MARK)  # which files that were joined have within
            if not is_whole:
                yield self.dropped(raw, offset, Drop.TOO_LONG)
            elif line and not line.isspace():
                yield self.json_document(line, offset)

    def json_document(self, line: bytes, offset: int) -> Document:
        if b"\0" in line:
            return self.dropped(line, offset, Drop.BINARY)
        try:
            value, is_replaced = orjson.loads(line), False
        except orjson.JSONDecodeError:
            # NaN, a lone surrogate and bytes that are not UTF-8 may still pass below.
            decoded = self.decoded(line, offset)
            if decoded.drop:
                return decoded
            try:
                value, is_replaced = json.loads(decoded.text), decoded.replaced
            except (ValueError, RecursionError):
                # Thousands of digits or of nested brackets also raise these.
                return self.dropped(line, offset, Drop.INVALID_JSON)
        if self.data.format == "chat":
            document = self.conversation(value, line, offset)
        elif isinstance(value, dict) and isinstance(text := value.get(self.data.text_field), str):
            document = self.judged_text(text, offset)
        else:
            return self.dropped(line, offset, Drop.MISSING_TEXT)
        return document._replace(replaced=True) if is_replaced and not document.drop else document

    def conversation(self, value: Any, line: bytes, offset: int) -> Document:
        """Returns the document that the line of a conversation makes."""
        messages = messages_of(value)
        if not messages:
            return self.dropped(line, offset, Drop.NO_MESSAGES)
        if len(messages) > _MAX_MESSAGES:
            return self.dropped(line, offset, Drop.TOO_LONG)
        if any(message["role"] not in ROLES for message in messages):
            return self.dropped(line, offset, Drop.UNKNOWN_ROLE)
        if not any(
            message["role"] == "assistant" and message["content"].strip() for message in messages
        ):
            return self.dropped(line, offset, Drop.NO_ANSWER)
        document = self.judged_text(plain_text(messages), offset)
        if document.replaced:  # a lone surrogate
            for message in messages:
                message["content"] = (
                    message["content"].encode(errors="surrogatepass").decode(errors="replace")
                )
        return document if document.drop else document._replace(messages=tuple(messages))

    def csv(self, file: BinaryIO) -> Iterator[Document]:
        limit = longest_line("csv", self.data)
        # A record may cross the limit by the line that closes its quotes
        csv.field_size_limit(2 * limit)
        column: int | None = None
        num_columns = 0
        for offset, record, is_whole, _ in records(file, limit=limit):
            if not is_whole:
                if column is None:
                    raise endless_header(self.uri)
                yield self.dropped(
                    record, offset, Drop.TOO_LONG if len(record) == limit else Drop.INVALID_CSV
                )
                continue
            # Each piece has the file's header
            raw = record if offset else record.removeprefix(BYTE_ORDER_MARK)
            decoded = self.decoded(raw, offset)
            # A header is read in any case
            text = raw.decode(errors="replace") if decoded.drop else decoded.text
            values = next(csv.reader(io.StringIO(text, newline="")), [])
            if column is None:
                column, num_columns = self.column_of(values), len(values)
            elif decoded.drop or any(values[num_columns:]):
                yield self.dropped(record, offset, decoded.drop or Drop.INVALID_CSV)
            elif len(values) > column:
                document = self.judged_text(values[column], offset)
                yield document._replace(replaced=decoded.replaced and not document.drop)
            elif values:
                yield self.dropped(record, offset, Drop.MISSING_TEXT)

    def column_of(self, names: list[str]) -> int:
        field = self.data.text_field
        if "\0" in "".join(names):
            raise CorpusError(
                f"{self.uri} is binary or UTF-16, not text in UTF-8; convert it or take it out"
            )
        if field not in names:
            raise CorpusError(
                f"{self.uri} has no column {field!r}; set data.text_field to one of {', '.join(names)[:200]}"
            )
        if names.count(field) > 1:
            raise CorpusError(
                f"{self.uri} has {names.count(field)} columns {field!r}, expected one; rename the others in the file, "
                "or set data.text_field to another column"
            )
        return names.index(field)

    def parquet(self, file: BinaryIO) -> Iterator[Document]:
        parquet = pq.ParquetFile(
            file, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
        )
        self.check_column(parquet.schema_arrow)
        row = 0
        for group in range(parquet.num_row_groups):
            metadata = parquet.metadata.row_group(group)
            first = metadata.column(0)
            begins = min(
                filter(None, (first.dictionary_page_offset, first.data_page_offset)), default=0
            )
            # No part would own this row group
            if metadata.num_rows and not 0 < begins < self.part.file.size:
                raise pa.ArrowInvalid(
                    f"row group {group} begins at byte {begins} of {self.part.file.size}"
                )
            if self.part.start <= begins < self.part.end:
                number = row
                for number, raw in enumerate(self.column_values(parquet, group), start=row + 1):
                    missing = Document(number - 1, drop=Drop.MISSING_TEXT)
                    yield missing if raw is None else self.judged(raw, number - 1)
                if number - row != metadata.num_rows:  # Arrow accepts fewer rows without an error
                    raise pa.ArrowInvalid(
                        f"row group {group} has {number - row} of {metadata.num_rows} rows"
                    )
            row += metadata.num_rows
        if row != parquet.metadata.num_rows:
            raise pa.ArrowInvalid(f"the row groups have {row} of {parquet.metadata.num_rows} rows")

    def check_column(self, schema: pa.Schema) -> None:
        field = self.data.text_field
        kind = schema.field(self.column_of(schema.names)).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if kind not in (*_STRINGS, pa.null()):  # a column without a value has no other type
            raise CorpusError(
                f"column {field!r} of {self.uri} holds {kind}, not strings; set data.text_field"
            )

    def column_values(self, parquet: pq.ParquetFile, group: int) -> Iterator[bytes | None]:
        field = self.data.text_field
        for batch in parquet.iter_batches(
            256, row_groups=[group], columns=[field], use_threads=False
        ):
            column = batch.column(batch.schema.names.index(field))  # "a.b" also brings column "a"
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            for value in column.cast(pa.large_binary()):
                yield value.as_py()

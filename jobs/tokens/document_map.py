"""Defines the document map of a token store: for each document, where its tokens begin and from
where its text was read.

Beside each shard lies a table of its documents (`shard-00000.docs`), of 24 bytes each and in their
order. `documents.json` lists the tables with their hashes, and names the files of the corpus. Both
stand beside the manifest, which does not know of them: a store without a map is as good to train
on, and a map changes no store's hash. A reader takes a few blocks of a table, never all of it.
"""

import hashlib
import struct
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from cluster.storage.uris import NotFoundError, Storage
from jobs.tokens.token_store import Manifest, Shard, TokenStoreError, canonical_json

DOCUMENTS = "documents.json"
TABLE_ENDING = ".docs"
RECORD = np.dtype(
    [
        ("start", "<u8"),  # the document's first token in its shard; it ends where the next begins
        ("place", "<u8"),  # of its text in the file: the first byte, uncompressed, or the row
        ("file", "<u4"),  # index in the list of files
        ("check", "<u4"),  # CRC-32 of its tokens as the shard has them
    ]
)

Records = npt.NDArray[np.void]
FileOfCorpus = tuple[str, int, str]
"""The URI, the size and the version of a file, as the listing of the corpus had them."""

_PACKED = struct.Struct("<QQII")  # as RECORD, made in a tenth of the time
_BLOCK_RECORDS = 1024  # read at once to find one, 24 KiB
_OPEN_BLOCKS, _OPEN_TABLES = 32, 64
_SCANNED_RECORDS = 1 << 18  # read at once where all are looked at, 6 MiB


class NoDocumentMapError(TokenStoreError):
    """A token store has no document map, or one that belongs to another store."""


@dataclass(frozen=True)
class DocumentTable:
    """The table of a shard, as the list has it. A later document of a table has a later file, or a
    later place in the same one."""

    shard: str  # the shard's file
    documents: int
    first: tuple[int, int]  # file and place of the first document
    last: tuple[int, int]
    sha256: str

    @property
    def file(self) -> str:
        return table_file(self.shard)


@dataclass(frozen=True)
class DocumentList:
    """The content of `documents.json`."""

    manifest_hash: str  # of the store that the map belongs to
    files: list[FileOfCorpus]  # of all sources
    tables: list[DocumentTable]  # in the order of the manifest's shards

    def to_json(self) -> bytes:
        # `asdict` would copy a list of millions of files
        return canonical_json(vars(self) | {"tables": [vars(table) for table in self.tables]})


_LIST = TypeAdapter(DocumentList)


def table_file(shard: str) -> str:
    """Returns the name of the table of a shard's file."""
    return shard.removesuffix(".bin") + TABLE_ENDING


def check_of(tokens: bytes | memoryview) -> int:
    """Returns by what a document's tokens are told from most others without reading them."""
    return zlib.crc32(tokens)


class TableWriter:
    """Writes the table of a shard as its documents come."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._first = self._last = (0, 0)
        self._num_documents = 0

    def add(self, tokens: memoryview, *, start: int, file: int, place: int) -> None:
        self._file.write(_PACKED.pack(start, place, file, check_of(tokens)))
        self._last = (file, place)
        if not self._num_documents:
            self._first = self._last
        self._num_documents += 1

    def finished(self, shard: str) -> DocumentTable:
        """Returns the table, whose bytes are in the file then."""
        self._file.seek(0)
        sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()  # type: ignore[arg-type]
        return DocumentTable(shard, self._num_documents, self._first, self._last, sha256)


class MappedDocument(NamedTuple):
    """A document of the store."""

    shard: Shard
    start: int  # its first token in the shard
    end: int  # behind its last token
    file: int
    place: int

    @property
    def tokens(self) -> int:
        return self.end - self.start


class ShardDocuments:
    """The documents of a shard, in their order; read by blocks as they are asked for."""

    def __init__(self, store: Storage, shard: Shard, table: DocumentTable) -> None:
        self.shard, self.table = shard, table
        self._store = store
        self._block = lru_cache(_OPEN_BLOCKS)(self._read_block)

    def __len__(self) -> int:
        return self.table.documents

    def document(self, number: int) -> MappedDocument:
        """Returns a document by its number in the shard."""
        record = self._record(number)
        is_last = number + 1 == len(self)
        end = self.shard.tokens if is_last else int(self._record(number + 1)["start"])
        return MappedDocument(
            self.shard, int(record["start"]), end, int(record["file"]), int(record["place"])
        )

    def number_at(self, token: int) -> int:
        """Returns the number of the document that holds this token of the shard."""
        numbers = range(len(self))
        return bisect_right(numbers, token, key=lambda n: int(self._record(n)["start"])) - 1

    def number_from(self, file: int, place: int) -> int:
        """Returns the number of the first document that begins there in the corpus, or behind."""
        return bisect_left(range(len(self)), (file, place), key=self._origin)

    def with_check(self, check: int, *, tokens: int) -> Iterator[MappedDocument]:
        """Yields the documents of so many tokens with this check; reads the whole table, some
        megabytes at a time."""
        for first in range(0, len(self), _SCANNED_RECORDS):
            records = self._read(first, min(len(self), first + _SCANNED_RECORDS))
            for place in np.flatnonzero(records["check"] == check).tolist():
                document = self.document(first + place)
                if document.tokens == tokens:
                    yield document

    def _origin(self, number: int) -> tuple[int, int]:
        record = self._record(number)
        return int(record["file"]), int(record["place"])

    def _record(self, number: int) -> Any:
        block, place = divmod(number, _BLOCK_RECORDS)
        return self._block(block)[place]

    def _read_block(self, block: int) -> Records:
        first = block * _BLOCK_RECORDS
        return self._read(first, min(len(self), first + _BLOCK_RECORDS))

    def _read(self, first: int, end: int) -> Records:
        """Returns the records from one number to another. Raises `NoDocumentMapError`."""
        start, stop = first * RECORD.itemsize, end * RECORD.itemsize
        try:
            content = self._store.read_bytes(self.table.file, start=start, end=stop)
        except NotFoundError:
            content = b""
        if len(content) != stop - start:
            raise NoDocumentMapError(_damaged(self._store, self.table.file))
        return np.frombuffer(content, RECORD)


class DocumentMap:
    """The document map of a finished store."""

    def __init__(self, store: Storage, manifest: Manifest) -> None:
        """Reads the list. Raises `NoDocumentMapError` where there is none, or another store's."""
        content = store.find_bytes(DOCUMENTS)
        if content is None:
            raise NoDocumentMapError(f"{store.uri} has no document map ({DOCUMENTS})")
        try:
            known = _LIST.validate_json(content)
        except ValueError as error:
            raise NoDocumentMapError(_damaged(store, DOCUMENTS)) from error
        if known.manifest_hash != manifest.hash:
            raise NoDocumentMapError(f"{store.uri}/{DOCUMENTS} belongs to another manifest")
        self.store, self.manifest, self.files = store, manifest, known.files
        self._shards = {shard.file: shard for shard in manifest.shards}
        self.tables = known.tables
        self._tables = {table.shard: table for table in known.tables}
        self.documents_of = lru_cache(_OPEN_TABLES)(self._open)

    @property
    def unmapped(self) -> list[Shard]:
        """The shards without a table: copies of a store that had no map itself."""
        return [shard for shard in self.manifest.shards if shard.file not in self._tables]

    def holding(self, file: int) -> Iterator[ShardDocuments]:
        """Yields the documents of each shard that may hold some of a file."""
        for table in self.tables:
            if table.first[0] <= file <= table.last[0]:
                documents = self.documents_of(table.shard)
                assert documents is not None, "it has a table"
                yield documents

    def _open(self, shard: str) -> ShardDocuments | None:
        """Returns the documents of a shard; None for one without a table."""
        table = self._tables.get(shard)
        return ShardDocuments(self.store, self._shards[shard], table) if table else None


def read_map(store: Storage, manifest: Manifest) -> DocumentMap | None:
    """Returns the map of a store, None where there is none that belongs to it."""
    try:
        return DocumentMap(store, manifest)
    except NoDocumentMapError:
        return None


def is_whole(store: Storage, mapped: DocumentMap) -> bool:
    """Reports whether each table is there in its full size."""
    sizes = {entry.key: entry.size for entry in store.list() if entry.key.endswith(TABLE_ENDING)}
    return all(
        sizes.get(table.file) == table.documents * RECORD.itemsize for table in mapped.tables
    )


def problem_of(mapped: DocumentMap, table: DocumentTable) -> str:
    """Recomputes the hash of a table; says what is wrong with it, and nothing where it is as it
    was written."""
    content = mapped.store.find_bytes(table.file) or b""
    documents = mapped.documents_of(table.shard)
    if hashlib.sha256(content).hexdigest() != table.sha256:
        return f"{table.file} is missing or altered"
    if documents is None or documents.shard.documents != table.documents:
        return f"{table.file} has other documents than {table.shard}"
    return ""


def moved(
    content: bytes, table: DocumentTable, *, shard: str, first_file: int
) -> tuple[bytes, DocumentTable]:
    """Returns the table of a shard for its copy in another store, which lists the files behind
    `first_file` others."""
    records = np.frombuffer(content, RECORD).copy()
    records["file"] += first_file
    (first, place), (last, last_place) = table.first, table.last
    return records.tobytes(), DocumentTable(
        shard,
        table.documents,
        (first + first_file, place),
        (last + first_file, last_place),
        hashlib.sha256(records.tobytes()).hexdigest(),
    )


def _damaged(store: Storage, file: str) -> str:
    return (
        f"{store.uri}/{file} is missing or damaged; `raymill tokenize --documents` makes it again"
    )

"""Compares a token store with what its corpus makes now, and names what differs: the files of the
corpus, the manifest, and shards that were made again, with the tables of their documents."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any, BinaryIO

import numpy as np
from pydantic import TypeAdapter

from cluster.output.result_text import counted
from cluster.storage.uris import Storage
from jobs.cleaning.selection import HELD_OUT, stored_codes
from jobs.corpus.chunks import Chunk
from jobs.corpus.documents import Drop
from jobs.corpus.listing import Listing
from jobs.tokens.document_map import (
    DOCUMENTS,
    RECORD,
    DocumentMap,
    DocumentTable,
    FileOfCorpus,
    ShardDocuments,
)
from jobs.tokens.shard_writer import ChunkResult, file_sha256
from jobs.tokens.token_store import (
    SOURCES,
    Manifest,
    Shard,
    TokenStoreError,
    shard_file,
)

_SHARD = re.compile(r"(?:shard|val)-(\d{5,12})\.bin")
_COMPARED_BYTES = 1 << 20  # at once
_NAMED = 3  # files of a kind, in a message

_FIELDS = ("vocab_size", "eot_id", "bos_id", "chat", "source_hash", "weights", "revisions")
_FIELDS_OF_ALL = ("drop_samples", "replaced_utf8")
"""Fields of the manifest that are known; the second ones once each chunk was made again."""


@dataclass(frozen=True)
class Sources:
    """The corpus, by `sources.json`."""

    files: list[FileOfCorpus]
    sources: list[str]  # absolute location of each


_SOURCES = TypeAdapter(Sources)


def read_sources(store: Storage) -> Sources | None:
    """Returns what a store keeps of the listing; None where that is missing or damaged."""
    try:
        return _SOURCES.validate_json(store.find_bytes(SOURCES) or b"")
    except ValueError:
        return None


def chunk_of(shard: Shard) -> int:
    """Returns the number of the chunk that a shard was made of. Raises `TokenStoreError`."""
    match = _SHARD.fullmatch(shard.file)
    if match is None:
        raise TokenStoreError(
            f"the manifest lists {shard.file}, expected names such as shard-00000.bin: it cannot be made again"
        )
    return int(match[1])


def listing_problems(recorded: Sources | None, listing: Listing) -> list[str]:
    """Compares the names and sizes of the files that were tokenized with the corpus as it is."""
    if recorded is None:
        return [f"{SOURCES} is missing or damaged"]
    if recorded.sources != listing.sources:
        return [
            f"{SOURCES} names the corpus {', '.join(recorded.sources)}, the recorded settings name "
            f"{', '.join(listing.sources)}"
        ]
    before = {uri: size for uri, size, _ in recorded.files}
    now = {uri: size for uri, size, _ in listing.identity()}
    kinds = {
        "is missing": [uri for uri in before if uri not in now],
        "is new": [uri for uri in now if uri not in before],
        "has another size": [uri for uri in now if before.get(uri, now[uri]) != now[uri]],
    }
    problems = [_named(what, uris) for what, uris in kinds.items() if uris]
    if not problems and list(before) != list(now):
        problems.append("has its files in another order")
    return [f"the corpus is not as {SOURCES} has it: {problem}" for problem in problems]


def newer_files(recorded: Sources | None, listing: Listing) -> list[str]:
    """Names the files that were written since they were tokenized, among which is one that
    changed."""
    before = {uri: version for uri, _, version in (recorded.files if recorded else ())}
    uris = [uri for uri, _, version in listing.identity() if before.get(uri) != version]
    return [f"of the corpus {_named('has another version than before', uris)}"] if uris else []


def _named(what: str, uris: Sequence[str]) -> str:
    rest = f" and {len(uris) - _NAMED:,} more" if len(uris) > _NAMED else ""
    return f"{', '.join(uris[:_NAMED])}{rest} {what}"


def selection_problems(work: Storage, chunks: Sequence[Chunk], manifest: Manifest) -> list[str]:
    """Compares the shards of all chunks with the documents that are selected now, whose codes are
    in `work`: which shards there are, in their order, and how many documents each has."""
    made = list[tuple[str, int, int]]()
    for chunk in chunks:
        _, codes = stored_codes(work, chunk.number)
        counts = {"train": codes.count(0), "val": codes.count(HELD_OUT)}
        for split in ("train", "val"):
            if counts[split]:
                made.append((shard_file(split, chunk.number), chunk.source, counts[split]))
    listed = [
        (shard.file, shard.source, shard.documents)
        for shard in manifest.shards
        if chunk_of(shard) < len(chunks)
    ]
    differing = [pair for pair in zip_longest(made, listed) if pair[0] != pair[1]]
    if not differing:
        return []
    expected, recorded = map(_described, differing[0])
    return [
        f"{counted(len(differing), 'shard')} with other documents than the recorded settings select: first should come "
        f"{expected}, and the manifest has {recorded}"
    ]


def _described(entry: tuple[str, int, int] | None) -> str:
    if entry is None:
        return "no further shard"
    file, source, num_documents = entry
    return f"{file} of source {source} with {counted(num_documents, 'document')}"


def manifest_problems(made: Manifest, manifest: Manifest, *, is_whole: bool) -> list[str]:
    """Compares what a manifest says of the whole store. Only `made` of all chunks knows what their
    writers counted."""
    problems = []
    for name in (*_FIELDS, *(_FIELDS_OF_ALL if is_whole else ())):
        expected, recorded = getattr(made, name), getattr(manifest, name)
        if expected != recorded:
            problems.append(
                f"the manifest says {name}={_short(recorded)}, expected {_short(expected)}"
            )
    for reason in sorted({*made.dropped, *manifest.dropped}):
        is_known = is_whole or reason != Drop.TEMPLATE_REFUSED
        recorded, expected = (each.dropped.get(reason, 0) for each in (manifest, made))
        if is_known and recorded != expected:
            problems.append(
                f"the manifest counts {counted(recorded, 'document')} dropped as {reason}, the recorded settings drop "
                f"{expected:,}"
            )
    return problems


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:60]}…" if len(text) > 60 else text


@dataclass(frozen=True)
class ComparedShard:
    """A fault of a shard of the store."""

    file: str
    is_made: bool  # whether the manifest lists it, and the corpus makes it
    problems: list[str]


@dataclass(frozen=True)
class StoreComparison:
    """A store with its document map, if it has one, and another one in which its shards are made
    again, of these files."""

    store: Storage
    manifest: Manifest
    mapped: DocumentMap | None
    made: Storage
    files: list[FileOfCorpus]

    def file_problems(self) -> list[str]:
        """Compares the names and sizes of the map's files with the corpus's."""
        if self.mapped is None:
            return []
        pairs = zip_longest(self.mapped.files, self.files, fillvalue=("no file", 0, ""))
        differing = [(old, new) for old, new in pairs if old[:2] != new[:2]]
        if not differing:
            return []
        old, new = differing[0]
        return [
            f"{DOCUMENTS} names {counted(len(differing), 'file')} otherwise than the corpus: the first is {old[0]} of "
            f"{old[1]:,} bytes there, and {new[0]} of {new[1]:,} bytes here"
        ]

    def chunk(self, number: int, result: ChunkResult) -> Iterator[ComparedShard]:
        """Yields each shard of a chunk, as it was made again or as the manifest lists it."""
        listed = {shard.file: shard for shard in self._listed.get(number, ())}
        made = {shard.file: shard for shard in result.shards}
        tables = {table.shard: table for table in result.tables}
        for file in sorted({*listed, *made}):
            if file not in made:
                problems = ["the corpus makes no such shard"]
            elif file not in listed:
                problems = ["the corpus makes this shard, and the manifest does not list it"]
            else:
                problems = self._shard_problems(made[file], listed[file], tables.get(file))
                problems += self._table_problems(made[file], tables.get(file))
            is_made = file in made and file in listed
            yield ComparedShard(file, is_made, [f"{file}: {problem}" for problem in problems])

    @cached_property
    def _listed(self) -> dict[int, list[Shard]]:
        """The shards of the manifest, by chunk."""
        listed: dict[int, list[Shard]] = {}
        for shard in self.manifest.shards:
            listed.setdefault(chunk_of(shard), []).append(shard)
        return listed

    @cached_property
    def _tables(self) -> dict[str, DocumentTable]:
        """The tables of the map, by shard."""
        return {table.shard: table for table in (self.mapped.tables if self.mapped else ())}

    def _shard_problems(self, made: Shard, listed: Shard, table: DocumentTable | None) -> list[str]:
        problems = []
        stored_hash = file_sha256(self.store, listed.file)
        if stored_hash != listed.sha256:
            problems.append("has other bytes than the manifest says")
        if stored_hash != made.sha256:
            problems.append(f"has other bytes than the corpus makes, {self._parting(made, table)}")
        elif made.sha256 != listed.sha256:
            problems.append("the manifest has another hash than the corpus makes")
        for name in ("split", "source", "tokens", "documents", "bytes"):
            expected, recorded = getattr(made, name), getattr(listed, name)
            if expected != recorded:
                problems.append(f"the manifest says {name}={recorded}, expected {expected}")
        return problems

    def _parting(self, made: Shard, table: DocumentTable | None) -> str:
        """Says where the shard in the store parts from the one that was made again."""
        with self.store.open(made.file) as stored, self.made.open(made.file) as again:
            place = _first_difference(stored, again)
        token = min(place // self.manifest.dtype.itemsize, made.tokens - 1)
        where = f"from token {token:,} on"
        if table is None:
            return where
        documents = ShardDocuments(self.made, made, table)
        document = documents.document(documents.number_at(token))
        return f"{where}, in the document from {_origin(self.files, document.file, document.place)}"

    def _table_problems(self, made: Shard, table: DocumentTable | None) -> list[str]:
        """Compares the table of a shard's documents; a copied shard may have none on either
        side."""
        known = self._tables.get(made.file)
        if known is None or table is None:
            return []
        content = self.store.find_bytes(known.file) or b""
        if hashlib.sha256(content).hexdigest() != known.sha256:
            return [f"its table {known.file} is missing or altered"]
        again = self.made.read_bytes(table.file)
        if content == again:
            return [] if known == table else [f"{DOCUMENTS} lists its table with other figures"]
        if len(content) % RECORD.itemsize:
            return [f"its table {known.file} is cut off"]
        return [f"its table {known.file} {self._other(content, again)}"]

    def _other(self, content: bytes, again: bytes) -> str:
        """Says what a table has otherwise than the one that was made again."""
        stored, made = (np.frombuffer(part, RECORD) for part in (content, again))
        if len(stored) != len(made):
            return f"has {counted(len(stored), 'document')}, expected {len(made):,}"
        assert self.mapped is not None, "the table is of a map"
        number = int(np.flatnonzero(stored != made)[0])
        recorded = _origin(self.mapped.files, *_place_of(stored[number]))
        expected = _origin(self.files, *_place_of(made[number]))
        if recorded != expected:
            return f"has document {number} from {recorded}, expected {expected}"
        return f"has other tokens of document {number}, from {expected}"


def _place_of(record: Any) -> tuple[int, int]:
    return int(record["file"]), int(record["place"])


def _origin(files: Sequence[FileOfCorpus], file: int, place: int) -> str:
    name = files[file][0] if file < len(files) else f"file {file}"
    return f"{name}:{place}"


def _first_difference(left: BinaryIO, right: BinaryIO) -> int:
    """Returns the place of the first byte that differs in two files."""
    place = 0
    while True:
        one, other = left.read(_COMPARED_BYTES), right.read(_COMPARED_BYTES)
        common = min(len(one), len(other))
        differs = np.frombuffer(one[:common], np.uint8) != np.frombuffer(other[:common], np.uint8)
        if differs.any():
            return place + int(differs.argmax())
        place += common
        if len(one) != len(other) or not one:
            return place

"""Defines the token store: the manifest that lists shards of token ids, and its exact bytes.

The manifest holds no path and no time: the same text makes the same manifest wherever it lies (only
`hf://` sources leave a trace, their pinned revision). It is written last: a folder without one is
not a finished store. In place of very many shards it has lists, each of up to 1,000 shards of one
source and split in a file of its own, which a reader opens when it needs one of them.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from pydantic import TypeAdapter

from cluster.storage.uris import NotFoundError, Storage
from model.text.chat_format import ChatFormat
from raymill.errors import UserError

FORMAT_VERSION, CHAT_VERSION = 2, 3  # of text, and of conversations, whose ids may be negative
_FORMAT_WITH_LISTS = 4  # of either
MOST_SHARDS = 8192  # that the manifest itself holds, 2.5 MB; 2 TiB of text make no more
MANIFEST = "manifest.json"
SOURCES = "sources.json"
TOKENIZER = "tokenizer.json"

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
Sum = Literal["documents", "tokens", "bytes"]
_SUMS: tuple[Sum, ...] = ("documents", "tokens", "bytes")


class TokenStoreError(UserError):
    """A token store cannot be read; the message names the file."""


@dataclass(frozen=True)
class Shard:
    """One file of token ids; each document in it is followed by the end-of-text token. With
    `Manifest.chat` an id that the loss does not count is stored as ~id, which is negative, and an
    uncounted start token begins each conversation.
    """

    file: str
    split: Split
    source: int  # index in data.source
    tokens: int  # including end-of-text tokens
    documents: int
    bytes: int  # of UTF-8 text that is counted, without end-of-text tokens
    sha256: str

    @property
    def is_list(self) -> bool:
        """Says that this stands for many shards: its figures are their sums, and its file lists
        them."""
        return self.file.endswith(".json")

    @property
    def thousand(self) -> str:
        """Returns the front of the file's name that the shards with the next numbers share: a
        listing's prefix."""
        return self.file.removesuffix(".bin")[:-3]


@dataclass(frozen=True)
class DropSample:
    """A dropped document, by which a person can judge the rule that dropped it."""

    file: int  # index in the listing, which is in sources.json
    document: int  # its first byte in the file, or its row
    bytes: int
    preview: str  # the front of its text


@dataclass(frozen=True)
class Manifest:
    """Everything that a reader of the shards needs."""

    tokenizer_hash: str
    vocab_size: int
    eot_id: int
    source_hash: str  # of every document's text, in canonical order
    config_hash: str  # of the settings that shape the shards
    # Each source's share of the training rows, summing to 1; empty: by their sizes
    weights: tuple[float, ...]
    revisions: dict[str, str]  # commit of each hf:// source
    dropped: dict[str, int]  # documents by reason
    drop_samples: dict[str, list[DropSample]]  # the first few of each reason
    replaced_utf8: int  # documents kept with U+FFFD for bytes that were not UTF-8
    shards: tuple[Shard, ...]  # in canonical order: by source, then by place in it
    bos_id: int | None = None  # each document's first token, where the tokenizer has one
    chat: ChatFormat | None = None  # in which conversations were written; None for text

    def total(self, field: Sum, split: Split | None = None) -> int:
        return sum(getattr(shard, field) for shard in self.shards if split in (None, shard.split))

    @property
    def dtype(self) -> np.dtype[Any]:
        return token_dtype(self.vocab_size, signed=self.chat is not None)

    @property
    def start_id(self) -> int:
        """As `Tokenizer.start_id`."""
        return self.eot_id if self.bos_id is None else self.bos_id

    def with_lists(self) -> tuple["Manifest", dict[str, bytes]]:
        """Returns the manifest as it is stored, with lists in place of very many shards, and their
        content by file."""
        groups: dict[tuple[int, Split, str], list[Shard]] = {}
        for shard in self.shards if len(self.shards) > MOST_SHARDS else ():
            groups.setdefault((shard.source, shard.split, shard.thousand), []).append(shard)
        lists, contents = list[Shard](), dict[str, bytes]()
        for (source, split, thousand), group in groups.items():
            content = canonical_json([dataclasses.asdict(shard) for shard in group])
            sums = {
                name: dataclasses.replace(self, shards=tuple(group)).total(name) for name in _SUMS
            }
            name = f"list-{source}-{thousand}.json"
            lists.append(
                Shard(name, split, source, **sums, sha256=hashlib.sha256(content).hexdigest())
            )
            contents[name] = content
        return dataclasses.replace(self, shards=tuple(lists) or self.shards), contents

    def to_json(self) -> bytes:
        stored = self.with_lists()[0]
        known = {
            name: value for name, value in dataclasses.asdict(stored).items() if value is not None
        }
        has_lists = any(shard.is_list for shard in stored.shards)
        derived = {
            "complete": True,  # as earlier versions wrote, so that a store's hash stays
            "format_version": _FORMAT_WITH_LISTS
            if has_lists
            else CHAT_VERSION
            if self.chat
            else FORMAT_VERSION,
            "dtype": self.dtype.name,
            "totals": {name: self.total(name) for name in _SUMS}
            | {f"{split}_{name}": self.total(name, split) for split in SPLITS for name in _SUMS},
        }
        return canonical_json(known | derived)

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        values = json.loads(data)
        if values["format_version"] not in (FORMAT_VERSION, CHAT_VERSION, _FORMAT_WITH_LISTS):
            raise TokenStoreError(
                f"the token store has format {values['format_version']}, not {FORMAT_VERSION}; tokenize again"
            )
        return TypeAdapter(cls).validate_python(values)

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.to_json()).hexdigest()

    @property
    def identity(self) -> str:
        """A hash of everything that decides the shards."""
        return hashlib.sha256(
            canonical_json([self.source_hash, self.config_hash, self.tokenizer_hash])
        ).hexdigest()


def token_dtype(vocab_size: int, *, signed: bool = False) -> np.dtype[Any]:
    """Returns little-endian integers, of 16 bits if every id fits."""
    return np.dtype(
        f"<{'i' if signed else 'u'}{2 if vocab_size <= 1 << (15 if signed else 16) else 4}"
    )


def shard_file(split: Split, number: int) -> str:
    return f"{'shard' if split == 'train' else 'val'}-{number:05d}.bin"


def in_order(shards: Iterable[Shard]) -> tuple[Shard, ...]:
    """Sorts by source the shards that are in order within each source."""
    return tuple(sorted(shards, key=lambda shard: shard.source))


def canonical_json(value: Any) -> bytes:
    written = io.BytesIO()  # as what a list of a million files takes in pieces would not fit
    for piece in json.JSONEncoder(sort_keys=True, indent=1).iterencode(value):
        written.write(piece.encode())
    return written.getvalue() + b"\n"


def read_manifest(store: Storage, *, opens_lists: bool = True) -> Manifest:
    """Reads the manifest and checks that every shard is there in its full size. Raises
    `TokenStoreError`.

    Without `opens_lists`, lists stay in place of their shards, for `read_list` to open and check.
    """
    try:
        manifest = Manifest.from_json(store.read_bytes(MANIFEST))
    except NotFoundError as error:
        raise TokenStoreError(
            f"{store.uri} holds no {MANIFEST}: tokenizing was not finished; run it again"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise TokenStoreError(
            f"{store.uri}/{MANIFEST} is damaged ({error}); tokenize again"
        ) from error
    itemsize = manifest.dtype.itemsize
    if not any(shard.is_list for shard in manifest.shards):
        _check_sizes(store, manifest.shards, itemsize, prefix="")
    elif opens_lists:
        shards = tuple(
            shard for each in manifest.shards for shard in read_list(store, each, itemsize)
        )
        return dataclasses.replace(manifest, shards=shards)
    return manifest


def read_list(store: Storage, listed: Shard, itemsize: int) -> tuple[Shard, ...]:
    """Returns the shards of a list, whose tokens have `itemsize` bytes; checks its hash and that
    every shard is there in its full size. Raises `TokenStoreError`."""
    content = store.find_bytes(listed.file) or b""
    if hashlib.sha256(content).hexdigest() != listed.sha256:
        raise TokenStoreError(f"{store.uri}/{listed.file} is missing or altered; tokenize again")
    shards = TypeAdapter(tuple[Shard, ...]).validate_json(content)
    _check_sizes(store, shards, itemsize, prefix=shards[0].thousand)
    return shards


def _check_sizes(store: Storage, shards: Sequence[Shard], itemsize: int, *, prefix: str) -> None:
    sizes = {entry.key: entry.size for entry in store.list(prefix)}
    for shard in shards:
        expected = shard.tokens * itemsize
        if sizes.get(shard.file) != expected:
            found = f"has {sizes[shard.file]} bytes" if shard.file in sizes else "is missing"
            raise TokenStoreError(
                f"{store.uri}/{shard.file} {found}, the manifest says {expected} bytes; tokenize again"
            )

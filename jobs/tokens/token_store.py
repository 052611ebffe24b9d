"""Defines the token store: the manifest that lists shards of token ids, and its exact bytes.

The manifest holds no path and no time: the same text makes the same manifest wherever it lies (only `hf://` sources
leave a trace, their pinned revision). It is written last: a folder without one is not a finished store.

While a store grows, `sealed.json` lists the sealed shards: for each source those before the first missing one, of both
splits. A sealed shard never changes, so a reader of this prefix reads what the finished store will hold.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from pydantic import TypeAdapter

from cluster.storage.uris import NotFoundError, Storage
from model.checkpoint_folder import ChatFormat
from model.errors import UserError

FORMAT_VERSION, CHAT_VERSION = 2, 3  # of text, and of conversations, whose ids may be negative
MANIFEST = "manifest.json"
SEALED = "sealed.json"
SOURCES = "sources.json"
TOKENIZER = "tokenizer.json"

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")


class TokenStoreError(UserError):
    """A token store cannot be read; the message names the file."""


@dataclass(frozen=True)
class Shard:
    """One file of token ids; each document in it is followed by the end-of-text token. With `Manifest.chat` an id that
    the loss does not count is stored as ~id, which is negative, and an uncounted start token begins each conversation.
    """

    file: str
    split: Split
    source: int  # index in data.source
    tokens: int  # including end-of-text tokens
    documents: int
    bytes: int  # of UTF-8 text that is counted, without end-of-text tokens
    sha256: str


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
    weights: tuple[float, ...]  # each source's share of the training rows, summing to 1; empty: by their sizes
    revisions: dict[str, str]  # commit of each hf:// source
    dropped: dict[str, int]  # documents by reason
    drop_samples: dict[str, list[DropSample]]  # the first few of each reason
    replaced_utf8: int  # documents kept with U+FFFD for bytes that were not UTF-8
    shards: tuple[Shard, ...]  # in canonical order: by source, then by place in it
    complete: bool = True  # False in sealed.json
    bos_id: int | None = None  # each document's first token, where the tokenizer has one
    chat: ChatFormat | None = None  # in which conversations were written; None for text

    def total(self, field: Literal["tokens", "documents", "bytes"], split: Split | None = None) -> int:
        return sum(getattr(shard, field) for shard in self.shards if split in (None, shard.split))

    @property
    def dtype(self) -> np.dtype[Any]:
        return token_dtype(self.vocab_size, signed=self.chat is not None)

    @property
    def start_id(self) -> int:
        """As `Tokenizer.start_id`."""
        return self.eot_id if self.bos_id is None else self.bos_id

    def to_json(self) -> bytes:
        fields = ("documents", "tokens", "bytes")
        known = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        derived = {
            "format_version": CHAT_VERSION if self.chat else FORMAT_VERSION,
            "dtype": self.dtype.name,
            "totals": {name: self.total(name) for name in fields}  # type: ignore[arg-type]
            | {f"{split}_{name}": self.total(name, split) for split in SPLITS for name in fields},  # type: ignore[arg-type]
        }
        return canonical_json(known | derived)

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        values = json.loads(data)
        if values["format_version"] not in (FORMAT_VERSION, CHAT_VERSION):
            raise TokenStoreError(
                f"the token store has format {values['format_version']}, not {FORMAT_VERSION}; tokenize again"
            )
        return TypeAdapter(cls).validate_python(values)

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.to_json()).hexdigest()

    @property
    def identity(self) -> str:
        """A hash of everything that decides the shards: the same while the store grows as when it is finished."""
        return hashlib.sha256(canonical_json([self.source_hash, self.config_hash, self.tokenizer_hash])).hexdigest()


def token_dtype(vocab_size: int, *, signed: bool = False) -> np.dtype[Any]:
    """Returns little-endian integers, of 16 bits if every id fits."""
    return np.dtype(f"<{'i' if signed else 'u'}{2 if vocab_size <= 1 << (15 if signed else 16) else 4}")


def shard_file(split: Split, number: int) -> str:
    return f"{'shard' if split == 'train' else 'val'}-{number:05d}.bin"


def in_order(shards: Iterable[Shard]) -> tuple[Shard, ...]:
    """Sorts by source the shards that are in order within each source."""
    return tuple(sorted(shards, key=lambda shard: shard.source))


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode() + b"\n"


def read_manifest(store: Storage, *, name: str = MANIFEST) -> Manifest:
    """Reads the manifest and checks that every shard is there in its full size. Raises `TokenStoreError`."""
    try:
        manifest = Manifest.from_json(store.read_bytes(name))
    except NotFoundError as error:
        raise TokenStoreError(f"{store.uri} holds no {name}: tokenizing was not finished; run it again") from error
    except (ValueError, KeyError, TypeError) as error:
        raise TokenStoreError(f"{store.uri}/{name} is damaged ({error}); delete it and tokenize again") from error
    sizes = {entry.key: entry.size for entry in store.list()}
    for shard in manifest.shards:
        expected = shard.tokens * manifest.dtype.itemsize
        if sizes.get(shard.file) != expected:
            found = f"has {sizes[shard.file]} bytes" if shard.file in sizes else "is missing"
            raise TokenStoreError(
                f"{store.uri}/{shard.file} {found}, the manifest says {expected} bytes; tokenize again"
            )
    return manifest

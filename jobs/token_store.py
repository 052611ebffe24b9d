"""The token store's contract: the manifest that lists shards of token ids, and its exact bytes.

The manifest holds no URI, name of a source or time: the same text makes the same manifest wherever it lies.
It is written last: a folder without one is not a store.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

from cluster.storage import NotFoundError, Storage
from model.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SOURCES = "sources.json"

Split = Literal["train", "val"]


class TokenStoreError(UserError):
    """A token store that cannot be read; the text names the file."""


@dataclass(frozen=True)
class Shard:
    """One file of token ids; each document in it is followed by the end-of-text token."""

    file: str
    split: Split
    tokens: int  # end-of-text tokens among them
    documents: int
    bytes: int  # of UTF-8 text, end-of-text tokens not counted
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything that a reader of the shards must know."""

    tokenizer_hash: str
    vocab_size: int
    eot_id: int
    source_hash: str  # of every document's hash or reason to be dropped, in canonical order
    config_hash: str  # of the settings that shape the shards
    dropped: dict[str, int]  # documents by reason
    replaced_utf8: int  # documents kept with U+FFFD in place of bytes that were not UTF-8
    shards: tuple[Shard, ...]

    def total(self, field: Literal["tokens", "documents", "bytes"], split: Split | None = None) -> int:
        return sum(getattr(shard, field) for shard in self.shards if split in (None, shard.split))

    def to_json(self) -> bytes:
        fields = ("documents", "tokens", "bytes")
        derived = {
            "format_version": FORMAT_VERSION,
            "dtype": token_dtype(self.vocab_size).name,
            "totals": {name: self.total(name) for name in fields}  # type: ignore[arg-type]
            | {f"{split}_{name}": self.total(name, split) for split in ("train", "val") for name in fields},  # type: ignore[arg-type]
        }
        return canonical_json(dataclasses.asdict(self) | derived)

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        values = json.loads(data)
        if values["format_version"] != FORMAT_VERSION:
            raise TokenStoreError(
                f"the token store has format {values['format_version']}, not {FORMAT_VERSION}; tokenize again"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        shards = tuple(Shard(**shard) for shard in values["shards"])
        return cls(**{name: value for name, value in values.items() if name in known} | {"shards": shards})

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.to_json()).hexdigest()


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Little-endian, 16 bits wide while every id fits."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode() + b"\n"


def read_manifest(store: Storage) -> Manifest:
    """The manifest, after checking that every shard is there in its full size. Raises `TokenStoreError`."""
    try:
        manifest = Manifest.from_json(store.read_bytes(MANIFEST))
    except NotFoundError as error:
        raise TokenStoreError(f"{store.uri} holds no {MANIFEST}: tokenizing was not finished; run it again") from error
    except (ValueError, KeyError, TypeError) as error:
        raise TokenStoreError(f"{store.uri}/{MANIFEST} is damaged ({error}); delete it and tokenize again") from error
    sizes = {entry.key: entry.size for entry in store.list()}
    for shard in manifest.shards:
        expected = shard.tokens * token_dtype(manifest.vocab_size).itemsize
        if sizes.get(shard.file) != expected:
            found = f"has {sizes[shard.file]} bytes" if shard.file in sizes else "is missing"
            raise TokenStoreError(
                f"{store.uri}/{shard.file} {found}, the manifest says {expected} bytes; tokenize again"
            )
    return manifest

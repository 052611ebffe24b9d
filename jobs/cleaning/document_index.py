"""Indexes a chunk: the hash and the reason to drop of each document, found by a task and stored for restarts."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from cluster.settings.run import DataConfig
from cluster.storage.uris import NotFoundError, Storage
from jobs.cleaning.duplicates import NGRAM_WORDS, signature
from jobs.cleaning.quality_rules import failed_rule
from jobs.corpus.chunks import Chunk, Part
from jobs.corpus.documents import Document, Drop, read_documents
from jobs.corpus.progress import DataProgress
from jobs.corpus.ray_data_tasks import run_tasks
from jobs.corpus.text_hashes import HASH_BYTES, document_hash, normalized, word_ngrams

INDEX = "index"
DROP_CODES = [None, *Drop]  # the reason of each drop code, which is an index into this list; code 0 is kept


@dataclass(frozen=True)
class ChunkIndex:
    """The N documents of a chunk, in their order."""

    hashes: npt.NDArray[np.uint8]  # (N, 16) of the normalized text; zeros when dropped
    drops: npt.NDArray[np.uint8]  # (N,) drop codes
    signatures: npt.NDArray[Any]  # (N, K) for near-duplicates; (N, 0) without data.near_dedup_threshold
    digest: npt.NDArray[np.uint8]  # (32,) SHA-256 of all texts, by which a second reader proves that it saw the same

    def to_bytes(self) -> bytes:
        return save(vars(self))

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        return cls(**load(content))


def index_corpus(store: Storage, chunks: Sequence[Chunk], data: DataConfig) -> Iterator[tuple[int, bytes]]:
    """Yields (chunk number, bytes of its `ChunkIndex`) in the order in which they are ready. Needs Ray."""
    total_bytes = sum(chunk.bytes for chunk in chunks)
    with DataProgress("indexing documents", total_bytes=total_bytes, num_tasks=len(chunks)) as progress:
        for result in run_tasks(chunks, partial(index_chunk, store=store, data=data)):
            index = ChunkIndex.from_bytes(result.content)
            progress.advance(result.chunk.bytes, documents=len(index.drops), rss_bytes=result.rss_bytes)
            yield result.chunk.number, result.content


def index_chunk(chunk: Chunk, *, store: Storage, data: DataConfig) -> bytes:
    """Returns the index of a chunk once it is stored; an index that is already stored is used as it is."""
    key = f"{INDEX}/{chunk.number:05d}.safetensors"
    try:
        content = store.read_bytes(key)
        ChunkIndex.from_bytes(content)
    except (NotFoundError, SafetensorError, TypeError):  # or it was cut off on a disk that lost power
        content = _indexed(chunk, data).to_bytes()
        store.write_bytes(key, content)
    return content


def _indexed(chunk: Chunk, data: DataConfig) -> ChunkIndex:
    digest = hashlib.sha256()
    hashes, drops, signatures = bytearray(), bytearray(), []
    for _, document in read_chunk(chunk, data, digest):
        drop = document.drop or failed_rule(document.text, data.quality_rules)
        text = normalized(document.text) if drop is None else b""
        drops.append(DROP_CODES.index(drop))
        hashes += document_hash(text) if drop is None else bytes(HASH_BYTES)
        if data.near_dedup_threshold is not None:
            signatures.append(signature(word_ngrams(text, NGRAM_WORDS)))
    return ChunkIndex(
        hashes=np.frombuffer(hashes, np.uint8).reshape(-1, HASH_BYTES),
        drops=np.frombuffer(drops, np.uint8),
        signatures=np.array(signatures) if signatures else np.empty((len(drops), 0), np.uint8),
        digest=np.frombuffer(digest.digest(), np.uint8),
    )


def read_chunk(chunk: Chunk, data: DataConfig, digest: "hashlib._Hash") -> Iterator[tuple[Part, Document]]:
    """Yields the documents of a chunk in canonical order, and adds their texts to `digest`."""
    for part in chunk.parts:
        for document in read_documents(part, data):
            digest.update(document.text.encode() + b"\0")
            yield part, document

"""Indexes a chunk: the hash and the reason to drop of each document, found by a task and stored for
restarts."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from cluster.settings.data import DataConfig
from cluster.storage.uris import NotFoundError, Storage
from jobs.cleaning.duplicates import SIGNATURE_SIZE, Signatures, signatures
from jobs.cleaning.why_dropped import DROP_CODES, why_dropped
from jobs.corpus.chunks import Chunk, Part
from jobs.corpus.documents import Document, read_documents
from jobs.corpus.progress import DataProgress
from jobs.corpus.ray_data_tasks import Runner, run_tasks
from jobs.corpus.text_hashes import HASH_BYTES, document_hash, normalized

INDEX = "index"
_SIGNED_BYTES = 1 << 18  # of text at once, whose arrays stay in the cache


@dataclass(frozen=True)
class ChunkIndex:
    """The N documents of a chunk, in their order; their signatures are stored by themselves."""

    hashes: npt.NDArray[np.uint8]  # (N, 16) of the normalized text; zeros when dropped
    drops: npt.NDArray[np.uint8]  # (N,) drop codes
    # (32,) SHA-256 of all texts, by which a second reader proves that it saw the same
    digest: npt.NDArray[np.uint8]


def selection_folder(data: DataConfig) -> str:
    """Returns the folder of the tasks' exchange, which depends on their size."""
    return f"{INDEX}/selection-{data.selection_task_bytes}"


def index_corpus(
    store: Storage, chunks: Sequence[Chunk], data: DataConfig, *, run: Runner = run_tasks
) -> list[tuple[bytes, int]]:
    """Indexes each chunk, and returns the digest of its texts and the number of its documents.
    Needs Ray."""
    total_bytes = sum(chunk.bytes for chunk in chunks)
    indexed = [(b"", 0)] * len(chunks)
    label = "indexing documents"
    with DataProgress(label, total_bytes=total_bytes, num_tasks=len(chunks)) as progress:
        for result in run(chunks, partial(index_chunk, store=store, data=data)):
            digest = result.content[:32]
            num_documents = int.from_bytes(result.content[32:], "little")
            progress.advance(result.item.bytes, documents=num_documents, rss_bytes=result.rss_bytes)
            indexed[result.item.number] = digest, num_documents
    return indexed


def index_chunk(chunk: Chunk, *, store: Storage, data: DataConfig) -> bytes:
    """Stores the index of a chunk, unless it is stored; returns the digest and the number of
    documents, 8 bytes."""
    index = None
    # Or it was cut off on a disk that lost power
    with suppress(NotFoundError, SafetensorError, TypeError):
        index = read_index(store, chunk.number)
    if index is None:
        index, signatures = _indexed(chunk, data)
        if data.near_dedup_threshold is not None:
            store.write_bytes(_signatures_key(chunk.number), signatures)
        store.write_bytes(_index_key(chunk.number), save(vars(index)))
    return index.digest.tobytes() + len(index.drops).to_bytes(8, "little")


def section_indexes(store: Storage, chunks: Sequence[int]) -> Iterator[tuple[int, int, ChunkIndex]]:
    """Yields chunks with the row of each one's first document, counted from the first chunk, and
    its index."""
    row = 0
    for chunk in chunks:
        index = read_index(store, chunk)
        yield chunk, row, index
        row += len(index.drops)


def read_index(store: Storage, chunk: int) -> ChunkIndex:
    return ChunkIndex(**load(store.read_bytes(_index_key(chunk))))


def read_signatures(store: Storage, chunk: int) -> Signatures:
    """Returns the signatures (N, 128) of a chunk's documents."""
    content = store.read_bytes(_signatures_key(chunk))
    return np.frombuffer(content, "<u2").reshape(-1, SIGNATURE_SIZE)


def _index_key(chunk: int) -> str:
    return f"{INDEX}/{chunk:05d}.safetensors"


def _signatures_key(chunk: int) -> str:
    return f"{INDEX}/{chunk:05d}.signatures"


def _indexed(chunk: Chunk, data: DataConfig) -> tuple[ChunkIndex, bytes]:
    """Returns the index and the bytes of the signatures, if `data.near_dedup_threshold` asks for
    them."""
    digest = hashlib.sha256()
    hashes, drops, signed = bytearray(), bytearray(), bytearray()
    waiting: list[bytes] = []
    num_waiting = 0
    for _, document in read_chunk(chunk, data, digest):
        drop = why_dropped(document, data)
        text = normalized(document.text) if drop is None else b""
        drops.append(DROP_CODES[drop])
        hashes += document_hash(text) if drop is None else bytes(HASH_BYTES)
        if data.near_dedup_threshold is not None:
            waiting.append(text)
            num_waiting += len(text)
            if num_waiting >= _SIGNED_BYTES:
                signed += signatures(waiting).tobytes()
                waiting, num_waiting = [], 0
    index = ChunkIndex(
        hashes=np.frombuffer(hashes, np.uint8).reshape(-1, HASH_BYTES),
        drops=np.frombuffer(drops, np.uint8),
        digest=np.frombuffer(digest.digest(), np.uint8),
    )
    return index, bytes(signed + signatures(waiting).tobytes())


def read_chunk(
    chunk: Chunk, data: DataConfig, digest: "hashlib._Hash"
) -> Iterator[tuple[Part, Document]]:
    """Yields the documents of a chunk in canonical order, and adds their texts to `digest`."""
    for part in chunk.parts:
        for document in read_documents(part, data):
            digest.update(document.text.encode() + b"\0")
            yield part, document

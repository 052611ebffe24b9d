"""Training documents that share a run of words with a validation document (Brown et al., 2020, appendix C) go.

The validation split's n-grams are gathered once, after the duplicates are known, and stored beside the shards; each
writer maps them into memory.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.config import DataConfig
from cluster.storage import Storage
from jobs.corpus_chunks import Chunk, Part
from jobs.corpus_index import INDEX, read_chunk
from jobs.data_tasks import Task, run_tasks
from jobs.normal_text import normalized, word_ngrams
from jobs.selection import HELD_OUT

_FILE = f"{INDEX}/validation-ngrams.bin"

Ngrams = npt.NDArray[np.uint64]


def store_validation_ngrams(store: Storage, chunks: Sequence[Chunk], codes_of: Sequence[str], data: DataConfig) -> str:
    """Gathers and stores the n-grams of all held-out documents; returns their hash. Needs Ray.

    Held in the driver's memory: 8 bytes a word of the validation split.
    """
    tasks = [
        {"codes": key, "parts": [asdict(part) for part in chunk.parts]}
        for chunk, key in zip(chunks, codes_of, strict=True)
    ]
    found = np.empty(0, np.uint64)
    for result in run_tasks(tasks, partial(held_out_ngrams, store=store, data=data)):
        found = np.union1d(found, np.frombuffer(result.content, "<u8"))
    content = found.astype("<u8").tobytes()
    store.write_bytes(_FILE, content)
    return hashlib.sha256(content).hexdigest()


def held_out_ngrams(task: Task, *, store: Storage, data: DataConfig) -> Iterator[bytes]:
    """Yields the n-grams, little-endian and sorted, of a chunk's held-out documents."""
    codes = store.read_bytes(task["codes"])
    found: list[Ngrams] = [np.empty(0, np.uint64)]
    if HELD_OUT in codes:
        documents = read_chunk([Part(**part) for part in task["parts"]], data, hashlib.sha256())
        for code, (_, document) in zip(codes, documents, strict=False):
            if code == HELD_OUT:
                found.append(_ngrams(document.text, data))
    yield np.unique(np.concatenate(found)).astype("<u8").tobytes()


def shares_ngram(text: str, validation: Ngrams, data: DataConfig) -> bool:
    ngrams = _ngrams(text, data)
    if not len(validation) or not len(ngrams):
        return False
    places = np.searchsorted(validation, ngrams)
    return bool((validation[np.minimum(places, len(validation) - 1)] == ngrams).any())


def _ngrams(text: str, data: DataConfig) -> Ngrams:
    assert data.decontaminate_ngram is not None
    return word_ngrams(normalized(text), data.decontaminate_ngram)


@cache
def validation_ngrams(store: Storage, content_hash: str) -> Ngrams:
    """The stored n-grams; `content_hash` tells one content of the file from another."""
    path = store.local_path(_FILE)
    content: Any = np.memmap(path, dtype="<u8", mode="r") if path and path.stat().st_size else store.read_bytes(_FILE)
    ngrams = content if isinstance(content, np.ndarray) else np.frombuffer(content, "<u8")
    assert hashlib.sha256(ngrams.tobytes()).hexdigest() == content_hash, "the n-grams changed while they were in use"
    return ngrams

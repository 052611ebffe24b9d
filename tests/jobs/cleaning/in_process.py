"""The steps of the cleaning without a cluster: tasks in this process, in a random order, on a store
in a folder."""

import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from cluster.settings.data import DataConfig
from cluster.storage.uris import Storage, open_storage
from jobs.cleaning.deduplication import Decisions, Deduplication
from jobs.cleaning.document_index import ChunkIndex
from jobs.cleaning.duplicates import signatures_of
from jobs.cleaning.exchange import Item, sections_of
from jobs.corpus.ray_data_tasks import Result
from jobs.tokens.build_store import store_builder
from jobs.tokens.train_tokenizer import ensure_tokenizer

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""A folder in which a durable write takes no time, for the many small stores of a test."""


def signature(ngrams: np.ndarray) -> np.ndarray:
    """Returns the signature (128,) of one set of n-grams."""
    return signatures_of(ngrams, np.zeros(len(ngrams), np.int64), num_sets=1)[0]


class InProcess:
    """Does what `run_tasks` does on a cluster, and counts the tasks."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self.num_tasks = 0

    def __call__(
        self, items: Sequence[Item], work: Callable[[Item], bytes], /
    ) -> Iterator[Result[Item]]:
        for item in self._random.sample(items, len(items)):
            self.num_tasks += 1
            yield Result(item, work(pickle.loads(pickle.dumps(item))), rss_bytes=0)


def tokenize_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the stage do all its tasks in this process, without a cluster."""
    run = InProcess()
    for function in (ensure_tokenizer, store_builder):
        monkeypatch.setitem(function.__kwdefaults__, "run", run)


def store_index(
    store: Storage,
    number: int,
    *,
    hashes: np.ndarray | None = None,
    signatures: np.ndarray | None = None,
    drops: Sequence[int] | None = None,
    digest: bytes = bytes(32),
) -> tuple[bytes, int]:
    """Stores the index of a chunk by its documents' hashes (N, 16) or signatures (N, 128); returns
    what `index_corpus` does."""
    values = hashes if hashes is not None else signatures
    assert values is not None
    index = ChunkIndex(
        hashes=np.zeros((len(values), 16), np.uint8) if hashes is None else hashes,
        drops=np.zeros(len(values), np.uint8) if drops is None else np.array(drops, np.uint8),
        digest=np.frombuffer(digest, np.uint8),
    )
    store.write_bytes(f"index/{number:05d}.safetensors", save(vars(index)))
    if signatures is not None:
        store.write_bytes(f"index/{number:05d}.signatures", signatures.tobytes())
    return digest, len(values)


WHOLE = 1 << 30
"""Bytes of a task that is given all records of a test."""


def exact_duplicates(
    folder: Path,
    chunks: Sequence[np.ndarray],
    *,
    run: InProcess,
    least: int = 1,
    task_bytes: int = WHOLE,
) -> list[int]:
    """Returns the numbers of the documents to drop, by the hashes (N, 16) of each chunk. A section
    has at least so many documents."""
    store = open_storage(str(folder))
    sizes = [store_index(store, number, hashes=hashes)[1] for number, hashes in enumerate(chunks)]
    search = Deduplication(store, sizes, DataConfig(selection_task_bytes=task_bytes), run=run)
    search.sections = sections_of(sizes, least=least)
    return _numbers(search.exact(), search, sizes)


def near_duplicates(
    folder: Path,
    chunks: Sequence[np.ndarray],
    *,
    threshold: float,
    run: InProcess | None = None,
    least: int = 1,
    task_bytes: int = WHOLE,
) -> list[int]:
    """Returns the numbers of the documents to drop, by the signatures (N, 128) of each chunk."""
    store = open_storage(str(folder))
    sizes = [store_index(store, number, signatures=own)[1] for number, own in enumerate(chunks)]
    data = DataConfig(near_dedup_threshold=threshold, selection_task_bytes=task_bytes)
    search = Deduplication(store, sizes, data, run=run or InProcess())
    search.sections = sections_of(sizes, least=least)
    return _numbers(search.near(), search, sizes)


def _numbers(decisions: Decisions, search: Deduplication, sizes: Sequence[int]) -> list[int]:
    firsts = [0, *accumulate(sizes)]
    rows = [decisions.rows(section) + firsts[section.chunks[0]] for section in search.sections]
    return np.unique(np.concatenate(rows)).tolist()

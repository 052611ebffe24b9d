"""Finds training documents that share a run of words with a validation document (Brown et al., 2020, appendix C).

The validation split's n-grams are gathered once, after the duplicates are known, and stored beside the shards. Each
writer maps them from a file on its own disk: 8 bytes per word of the validation split.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cluster.settings.run import DataConfig
from cluster.storage.uris import Storage
from jobs.cleaning.disk_buckets import BucketFile
from jobs.cleaning.document_index import INDEX, read_chunk
from jobs.cleaning.selection import HELD_OUT, stored_codes
from jobs.corpus.chunks import Chunk
from jobs.corpus.ray_data_tasks import run_tasks
from jobs.corpus.text_hashes import normalized, word_ngrams

_FILE = f"{INDEX}/validation-ngrams.bin"
_BUCKET_BITS = 8

Ngrams = npt.NDArray[np.uint64]


def store_validation_ngrams(store: Storage, chunks: Sequence[Chunk], data: DataConfig) -> str:
    """Gathers and stores the n-grams of all held-out documents; returns their hash. Needs Ray, and 16 bytes of the
    driver's disk per word of the validation split."""
    results = run_tasks(chunks, partial(held_out_ngrams, store=store, data=data))
    with tempfile.TemporaryDirectory(prefix="raymill-ngrams-") as folder:
        path = Path(folder, "merged")
        content_hash = merge_runs((np.frombuffer(result.content, "<u8") for result in results), path)
        store.upload_file(path, _FILE)
    return content_hash


def merge_runs(runs: Iterable[Ngrams], path: Path) -> str:
    """Writes the n-grams of all runs to a file, little-endian, ascending and each once; returns its SHA-256.

    The time is linear in the size of the runs. Memory holds the file's buffer and one of 256 buckets at a time: 31 MB
    for 10^9 n-grams.
    """
    digest = hashlib.sha256()
    with tempfile.TemporaryFile(dir=path.parent) as unnamed, path.open("wb") as file:
        records = BucketFile(unnamed, "<u8", num_buckets=1 << _BUCKET_BITS)
        for run in runs:
            records.add((run >> np.uint64(64 - _BUCKET_BITS)).astype(np.uint16), run)
        for bucket in range(1 << _BUCKET_BITS):
            content = np.unique(records.bucket(bucket)).tobytes()
            digest.update(content)
            file.write(content)
    return digest.hexdigest()


def held_out_ngrams(chunk: Chunk, *, store: Storage, data: DataConfig) -> bytes:
    """Returns the n-grams, little-endian and sorted, of a chunk's held-out documents."""
    _, codes = stored_codes(store, chunk.number)
    found: list[Ngrams] = [np.empty(0, np.uint64)]
    if HELD_OUT in codes:
        for code, (_, document) in zip(codes, read_chunk(chunk, data, hashlib.sha256()), strict=False):
            if code == HELD_OUT:
                found.append(_ngrams(document.text, data))
    return np.unique(np.concatenate(found)).astype("<u8").tobytes()


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
    """Returns the stored n-grams; `content_hash` keys the cache and proves the content."""
    path = store.local_path(_FILE)
    with tempfile.TemporaryDirectory(prefix="raymill-ngrams-") as folder:  # a map outlives the name of its file
        if path is None:
            path = Path(folder, "ngrams")
            store.download_file(_FILE, path)
        ngrams = np.memmap(path, dtype="<u8", mode="r") if path.stat().st_size else np.empty(0, "<u8")
    assert hashlib.sha256(ngrams.data).hexdigest() == content_hash, "the n-grams changed while they were in use"
    return ngrams

"""The n-grams of the validation split: merged in linear time and bounded memory, read from any storage."""

import hashlib
import time
import tracemalloc
from functools import reduce
from pathlib import Path

import numpy as np
import pytest

from cluster.settings.run import DataConfig
from cluster.storage.uris import open_storage
from jobs.cleaning.decontamination import merge_runs, shares_ngram, validation_ngrams
from jobs.corpus.text_hashes import normalized, word_ngrams

Runs = list[np.ndarray]


def made_runs(num_runs: int, *, size: int = 10_000) -> Runs:
    """Sorted runs that share a part of their values, as chunks of one corpus do."""
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 2**64, size, dtype=np.uint64)
    fresh = [rng.integers(0, 2**64, size, dtype=np.uint64) for _ in range(num_runs)]
    return [np.unique(np.concatenate([shared[::10], values])) for values in fresh]


@pytest.mark.parametrize("runs", [made_runs(30, size=1000), [np.empty(0, np.uint64)], []])
def test_runs_merge_into_their_union(runs: Runs, tmp_path: Path) -> None:
    """The bytes are those of one sort of everything, whatever the order of the runs."""
    union = reduce(np.union1d, runs, np.empty(0, np.uint64)).astype("<u8").tobytes()
    for order in (runs, runs[::-1]):
        assert merge_runs(order, tmp_path / "merged") == hashlib.sha256(union).hexdigest()
        assert (tmp_path / "merged").read_bytes() == union


def test_four_times_the_chunks_take_four_times_the_work(tmp_path: Path) -> None:
    """Merging each chunk with everything found before would take 20 times as long for 100 chunks as for 25."""

    def cpu_s(runs: Runs) -> float:
        started = time.process_time()
        merge_runs(runs, tmp_path / "merged")
        return time.process_time() - started

    few, many = (min(cpu_s(made_runs(num_runs)) for _ in range(3)) for num_runs in (25, 100))
    assert many < 8 * few


def test_merging_holds_no_more_of_more_chunks(tmp_path: Path) -> None:
    def peak_bytes(runs: Runs) -> int:
        tracemalloc.start()
        merge_runs(iter(runs), tmp_path / "merged")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak_bytes(made_runs(20, size=100_000)) < 1.1 * peak_bytes(made_runs(10, size=100_000))  # 18 and 9 MB


def test_the_stored_ngrams_are_read_from_any_storage(tmp_path: Path, s3_bucket: str) -> None:
    data = DataConfig(decontaminate_ngram=4)
    for name, held_out in (("some", "one two three four five"), ("none", "")):
        content_hash = merge_runs([np.sort(word_ngrams(normalized(held_out), 4))], tmp_path / "merged")
        for store in (open_storage(f"{tmp_path}/{name}"), open_storage(f"s3://{s3_bucket}/{name}")):
            store.upload_file(tmp_path / "merged", "index/validation-ngrams.bin")
            found = validation_ngrams(store, content_hash)
            assert shares_ngram("Zero two THREE four five six", found, data) == bool(held_out)
            assert not shares_ngram("one two three five", found, data)

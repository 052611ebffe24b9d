"""Size, build and query time of a trace index, beside a scan of the store.

    python -m tests.benchmarks.bench_trace [--tokens 1000000 10000000]

A store holds documents of random tokens of a vocabulary of 50,000, drawn as words are, by Zipf's
law. A query is a text of 1,000 tokens, half of them quoted in pieces of 50 from anywhere in the
store. Its answer is compared with what was quoted. Each query is asked twice in turn: of the index
as it lies on the disk, which is mapped, and of the same index by ranges, as it is read from a
bucket. The scan looks for one quoted piece, as a search without an index would. Prints a table.
"""

import argparse
import hashlib
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from cluster.output.result_text import table
from cluster.storage.folder import LocalStorage
from cluster.storage.uris import Storage, open_storage
from jobs.tokens.division import whole
from jobs.tokens.token_store import MANIFEST, Shard, read_manifest, token_dtype
from jobs.trace.build_index import index_store
from jobs.trace.spans import SearchedStore, find_spans
from jobs.trace.trace_index import TraceIndex
from tests.jobs.cleaning.in_process import InProcess
from tests.jobs.stores import manifest_of

_VOCAB_SIZE = 50_000
_SHARD_TOKENS = 10_000_000
_DOCUMENT_TOKENS = 600
_QUOTED, _TEXT_TOKENS = 50, 1000
_NUM_QUERIES = 10


def make_store(storage: Storage, num_tokens: int) -> np.ndarray:
    """Makes a store of so many tokens, and returns them."""
    rng = np.random.default_rng(0)
    drawn = rng.zipf(1.1, num_tokens) % (_VOCAB_SIZE - 1)
    drawn[_DOCUMENT_TOKENS - 1 :: _DOCUMENT_TOKENS] = _VOCAB_SIZE - 1
    tokens = drawn.astype(token_dtype(_VOCAB_SIZE))
    shards: list[Shard] = []
    for start in range(0, num_tokens, _SHARD_TOKENS):
        part = tokens[start : start + _SHARD_TOKENS]
        name, digest = f"shard-{len(shards):05d}.bin", hashlib.sha256(part.tobytes()).hexdigest()
        storage.write_bytes(name, part.tobytes())
        shards.append(Shard(name, "train", 0, len(part), 1, part.nbytes, digest))
    manifest = manifest_of(shards, vocab_size=_VOCAB_SIZE)
    storage.write_bytes(MANIFEST, manifest.to_json())
    return tokens


def text_of(tokens: np.ndarray, *, seed: int) -> tuple[np.ndarray, int]:
    """Returns a text that quotes the store, and in how many pieces."""
    rng = np.random.default_rng(seed)
    parts: list[np.ndarray] = []
    for _ in range(_TEXT_TOKENS // (2 * _QUOTED)):
        document = int(rng.integers(len(tokens) // _DOCUMENT_TOKENS)) * _DOCUMENT_TOKENS
        first = document + int(rng.integers(_DOCUMENT_TOKENS - 1 - _QUOTED))
        parts += [tokens[first : first + _QUOTED], rng.integers(0, _VOCAB_SIZE - 1, _QUOTED)]
    return np.concatenate(parts).astype(np.uint64), len(parts) // 2


def scan_s(tokens: np.ndarray) -> float:
    """Returns the seconds of a search for one quoted piece in all tokens, which are in memory."""
    wanted = tokens[-_QUOTED - 1 : -1]
    start = time.perf_counter()
    places = np.flatnonzero(tokens[: len(tokens) - _QUOTED + 1] == wanted[0])
    for offset in range(1, _QUOTED):
        places = places[tokens[places + offset] == wanted[offset]]
    assert len(places)
    return time.perf_counter() - start


class ByRanges(LocalStorage):
    """A folder whose files are read as those of a bucket are, though without its delays."""

    def local_path(self, key: str) -> Path | None:  # type: ignore[override]
        return None

    def read_bytes(self, key: str, *, start: int = 0, end: int | None = None) -> bytes:
        return LocalStorage(self.root).read_bytes(key, start=start, end=end)


def query_s(storage: Storage, ids: np.ndarray, *, num_quoted: int) -> float:
    """Returns the seconds of a query, with the opening of the index."""
    manifest = read_manifest(storage)
    start = time.perf_counter()
    searched = SearchedStore(storage, manifest, whole(manifest.shards))
    spans = find_spans(ids, TraceIndex(storage, manifest), searched)
    seconds = time.perf_counter() - start
    assert len(spans) >= num_quoted - 1, "two quotes may overlap"
    assert all(span.end - span.start >= 12 for span in spans)
    return seconds


def measure(num_tokens: int) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(folder)
        tokens = make_store(storage, num_tokens)
        start = time.perf_counter()
        built = index_store(storage, run=InProcess())
        build_s = time.perf_counter() - start
        seconds, by_ranges = list[float](), list[float]()
        for seed in range(_NUM_QUERIES):
            ids, num_quoted = text_of(tokens, seed=seed)
            seconds.append(query_s(storage, ids, num_quoted=num_quoted))
            by_ranges.append(query_s(ByRanges(Path(folder)), ids, num_quoted=num_quoted))
    return {
        "tokens": f"{num_tokens:,}",
        "MB": f"{built['bytes'] / 1e6:.1f}",
        "bytes a token": f"{built['bytes_per_token']:.2f}",
        "build, s": f"{build_s:.1f}",
        "query, ms": f"{1e3 * statistics.median(seconds):.1f}",
        "by ranges, ms": f"{1e3 * statistics.median(by_ranges):.1f}",
        "slowest, ms": f"{1e3 * max(seconds):.1f}",
        "scan, ms": f"{1e3 * scan_s(tokens):.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000_000, 10_000_000])
    arguments = parser.parse_args()
    rows = [measure(tokens) for tokens in arguments.tokens]
    print(table(list(rows[0]), rows), end="")


if __name__ == "__main__":
    main()

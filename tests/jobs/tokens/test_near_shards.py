"""A training worker on S3: its window's shards come to the node's disk, so that rows take no requests of their own."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster.storage.uris import Storage, open_storage
from jobs.tokens.batch_plan import SampleOrder
from jobs.tokens.token_store import MANIFEST, SEALED, TokenStoreError
from jobs.tokens.token_stream import TokenStream
from tests.cluster.fault_proxy import FaultProxy, running_proxy
from tests.jobs.stores import make_store, manifest_of, write_shard
from tests.waiting import wait_until

SIZES = [40_000, 70_001, 3, 50_000, 40_000, 60_000, 40_000, 40_000]
SEQ_LEN, WINDOW, BATCH = 16, 5000, 50  # 21,000 rows in five windows


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with running_proxy(s3_server) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


@pytest.fixture
def storage(proxy: FaultProxy, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return open_storage(f"s3://{s3_bucket}/store")


def copies() -> set[str]:
    folder = Path.home() / ".cache" / "raymill" / "shards"
    return {path.name for path in folder.iterdir() if path.name != "partial"} if folder.exists() else set()


def wanted(stream: TokenStream, step: int, num_samples: int) -> set[str]:
    """Returns the hashes of the shards that the windows ahead of a step need."""
    chain = stream._all
    windows = stream.order.windows_ahead(step * BATCH, end=num_samples)
    return {
        piece.shard.sha256 for _, start, end in windows for piece in chain.pieces(start * SEQ_LEN, end * SEQ_LEN + 1)
    }


def num_bytes(ranges: list[str | None]) -> int:
    bounds = [str(each).removeprefix("bytes=").split("-") for each in ranges]
    return sum(int(end) - int(start) + 1 for start, end in bounds)


def test_an_epoch_takes_few_requests_and_its_own_bytes_and_the_same_rows(
    storage: Storage, proxy: FaultProxy, tmp_path: Path
) -> None:
    tokens = make_store(storage, sizes=SIZES)
    make_store(open_storage(str(tmp_path)), sizes=SIZES)
    options = {"split": "train", "seq_len": SEQ_LEN, "seed": 4, "window_rows": WINDOW, "near_bytes": 1 << 30}
    expected = TokenStream(open_storage(str(tmp_path)), **options)  # type: ignore[arg-type]
    num_samples = expected.count_rows() // BATCH * BATCH
    stream = TokenStream(storage, num_samples=num_samples, **options)  # type: ignore[arg-type]
    proxy.ranges.clear()
    cold = 0
    for step in range(num_samples // BATCH):
        samples = np.arange(step * BATCH, step * BATCH + BATCH)
        stream.read_ahead(np.arange(step * BATCH, min(num_samples, step * BATCH + 2 * BATCH)))
        assert stream.samples(samples)[0].tolist() == expected.samples(samples)[0].tolist()
        wait_until(lambda: wanted(stream, step, num_samples) <= copies())  # noqa: B023
        cold = cold or len(proxy.ranges)
    shards = [shard for shard in stream.manifest.shards if shard.split == "train"]
    assert cold <= 2 * BATCH + 12  # rows of the first steps, while the copies are made
    assert len(proxy.ranges) - cold < num_samples / 100
    assert num_bytes(proxy.ranges) < 1.03 * 2 * len(tokens)
    assert copies() == {shard.sha256 for shard in shards}
    again = TokenStream(storage, num_samples=num_samples, **options)  # type: ignore[arg-type]
    before = len(proxy.ranges)
    again.read_ahead(np.arange(BATCH))
    assert again.samples(np.arange(BATCH))[0].tolist() == expected.samples(np.arange(BATCH))[0].tolist()
    assert len(proxy.ranges) == before  # another worker of the node finds all of it


def test_a_run_too_short_for_its_window_copies_nothing(storage: Storage, proxy: FaultProxy) -> None:
    make_store(storage, sizes=SIZES)
    stream = TokenStream(
        storage, split="train", seq_len=SEQ_LEN, window_rows=WINDOW, num_samples=WINDOW // 16 - 1, near_bytes=1 << 30
    )
    proxy.ranges.clear()
    stream.read_ahead(np.arange(BATCH))
    stream.samples(np.arange(BATCH))
    assert len(proxy.ranges) >= BATCH
    assert num_bytes(proxy.ranges) == BATCH * 2 * (SEQ_LEN + 1)
    assert not copies()


def test_altered_bytes_end_the_run_by_name(storage: Storage) -> None:
    make_store(storage, sizes=SIZES)
    storage.write_bytes("shard-00001.bin", bytes(2 * SIZES[1]))
    stream = TokenStream(
        storage, split="train", seq_len=SEQ_LEN, window_rows=WINDOW, num_samples=20_000, near_bytes=1 << 30
    )

    def read() -> bool:
        stream.read_ahead(np.arange(BATCH))
        return False

    with pytest.raises(TokenStoreError, match=r"shard-00001\.bin has SHA-256 .*, the manifest says .*tokenize again"):
        wait_until(read)


@pytest.mark.parametrize("weights", [(), (0.7, 0.3)])
def test_the_shards_of_a_growing_store_come_near_as_they_are_sealed(
    weights: tuple[float, ...], storage: Storage
) -> None:
    shards = [write_shard(storage, number, 40_000, source=number // 4)[0] for number in range(8)]
    sealed = manifest_of([*shards[:3], *shards[4:6]], weights=weights, complete=False)
    storage.write_bytes(SEALED, sealed.to_json())
    options = {
        "split": "train",
        "seq_len": SEQ_LEN,
        "window_rows": 2000,
        "num_samples": 10_000,
        "near_bytes": 1 << 30,
        "growing": True,
    }
    stream = TokenStream(storage, **options)  # type: ignore[arg-type]
    stream.read_ahead(np.arange(BATCH))
    first = {shards[0].sha256, shards[1].sha256} | ({shards[4].sha256} if weights else set())
    wait_until(lambda: first <= copies())
    assert copies() <= {shard.sha256 for shard in sealed.shards}
    storage.write_bytes(MANIFEST, manifest_of(shards, weights=weights).to_json())
    stream.wait_for(np.arange(8000, 8000 + BATCH))
    stream.read_ahead(np.arange(8000, 8000 + BATCH))
    places = [piece.shard.sha256 for place in stream._places(np.arange(8000, 8000 + BATCH)) for piece in place]
    wait_until(lambda: set(places) <= copies())


@pytest.mark.parametrize("weights", [(), (0.9, 0.1)])
def test_the_windows_ahead_hold_every_row_that_is_taken_next(weights: tuple[float, ...]) -> None:
    order = SampleOrder(1, 500, (1800, 700)[: len(weights) or 1], weights)
    end = 30_000
    for first in range(0, 25_000, 333):
        windows = order.windows_ahead(first, end=end)
        sources, rows = order.rows(np.arange(first, min(end, first + 200)))
        for source, row in zip(sources.tolist(), rows.tolist(), strict=True):
            assert any(source == s and start <= row < stop for s, start, stop in windows)
    assert order.windows_ahead(end - 1, end=end)[1:] == []

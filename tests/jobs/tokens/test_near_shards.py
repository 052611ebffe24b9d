"""A training worker on S3: its window's shards come to the node's disk, so that rows take no
requests of their own."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.storage.file_cache import FileCache
from cluster.storage.uris import Storage, open_storage
from jobs.tokens import token_store, token_stream
from jobs.tokens.token_store import MANIFEST, Shard, TokenStoreError
from jobs.tokens.token_stream import TokenStream
from model.linear_cross_entropy import IGNORE_INDEX
from model.text.chat_format import ChatFormat
from tests.cluster.fault_proxy import FaultProxy
from tests.jobs.stores import make_store, manifest_of, write_shard
from tests.waiting import wait_until

pytestmark = pytest.mark.more

SIZES = [40_000, 70_001, 3, 50_000, 40_000, 60_000, 40_000, 40_000]
SEQ_LEN, WINDOW, BATCH = 16, 5000, 50  # 21,000 rows in five windows


@pytest.fixture
def storage(
    proxy: FaultProxy, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Storage:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return open_storage(f"s3://{s3_bucket}/store")


def copies() -> set[str]:
    folder = Path.home() / ".cache" / "raymill" / "shards"
    return (
        {path.name for path in folder.iterdir() if path.name != "partial"}
        if folder.exists()
        else set()
    )


def num_bytes(ranges: list[str | None]) -> int:
    bounds = [str(each).removeprefix("bytes=").split("-") for each in ranges]
    return sum(int(end) - int(start) + 1 for start, end in bounds)


def test_an_epoch_takes_few_requests_and_its_own_bytes_and_the_same_rows(
    storage: Storage, proxy: FaultProxy, tmp_path: Path
) -> None:
    tokens = make_store(storage, sizes=SIZES)
    make_store(open_storage(str(tmp_path)), sizes=SIZES)
    options = {
        "split": "train",
        "seq_len": SEQ_LEN,
        "seed": 4,
        "window_rows": WINDOW,
        "near_bytes": 1 << 30,
    }
    expected = TokenStream(open_storage(str(tmp_path)), **options)  # type: ignore[arg-type]
    num_samples = expected.count_rows() // BATCH * BATCH
    stream = TokenStream(storage, num_samples=num_samples, **options)  # type: ignore[arg-type]
    proxy.ranges.clear()
    cold = 0
    for step in range(num_samples // BATCH):
        samples = np.arange(step * BATCH, step * BATCH + BATCH)
        stream.read_ahead(np.arange(step * BATCH, min(num_samples, step * BATCH + 2 * BATCH)))
        assert stream.samples(samples)[0].tolist() == expected.samples(samples)[0].tolist()
        wait_until(lambda: {shard.sha256 for shard in stream.near_shards} <= copies())
        cold = cold or len(proxy.ranges)
    shards = [shard for shard in stream.manifest.shards if shard.split == "train"]
    assert cold <= 2 * BATCH + 12  # rows of the first steps, while the copies are made
    assert len(proxy.ranges) - cold < num_samples / 100
    assert num_bytes(proxy.ranges) < 1.03 * 2 * len(tokens)
    # In which one row of 5,000 lies
    assert {shard.tokens for shard in shards if shard.sha256 not in copies()} <= {3}
    again = TokenStream(storage, num_samples=num_samples, **options)  # type: ignore[arg-type]
    before = len(proxy.ranges)
    again.read_ahead(np.arange(BATCH))
    assert (
        again.samples(np.arange(BATCH))[0].tolist()
        == expected.samples(np.arange(BATCH))[0].tolist()
    )
    assert len(proxy.ranges) == before  # another worker of the node finds all of it


def test_a_run_too_short_for_its_window_copies_nothing(storage: Storage, proxy: FaultProxy) -> None:
    make_store(storage, sizes=SIZES)
    stream = TokenStream(
        storage,
        split="train",
        seq_len=SEQ_LEN,
        window_rows=WINDOW,
        num_samples=WINDOW // 16 - 1,
        near_bytes=1 << 30,
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
        storage,
        split="train",
        seq_len=SEQ_LEN,
        window_rows=WINDOW,
        num_samples=20_000,
        near_bytes=1 << 30,
    )

    def read() -> bool:
        stream.read_ahead(np.arange(BATCH))
        return False

    with pytest.raises(
        TokenStoreError,
        match=r"shard-00001\.bin has SHA-256 .*, the manifest says .*tokenize again",
    ):
        wait_until(read)


def test_copies_are_asked_for_only_when_other_shards_come(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(storage, sizes=SIZES)
    wishes: list[list[str]] = []
    monkeypatch.setattr(
        FileCache, "want", lambda self, files: wishes.append([file.key for file in files])
    )
    stream = TokenStream(
        storage,
        split="train",
        seq_len=SEQ_LEN,
        seed=4,
        window_rows=WINDOW,
        num_samples=21_000,
        near_bytes=1 << 30,
    )
    apart = 0
    for first in range(0, 20_000, BATCH):
        wished = len(wishes)
        stream.read_ahead(np.arange(first, first + BATCH))
        places = stream._places(np.arange(first, first + BATCH))
        apart += sum(any(piece.shard.file not in wishes[-1] for piece in place) for place in places)
        assert len(wishes) == wished or len(wishes) == 1 or set(wishes[-1]) != set(wishes[-2])
    assert apart <= 10  # rows that alone of their window have tokens of a shard
    assert 5 <= len(wishes) <= 16  # five windows: each comes, and each goes
    assert max(map(len, wishes)) < len(SIZES) - 1


@pytest.mark.parametrize("weights", [(), (0.9, 0.1)])
def test_shards_far_ahead_are_told_by_a_part_of_the_samples(
    weights: tuple[float, ...], storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [write_shard(storage, number, 20_000, source=number // 8)[0] for number in range(16)]
    storage.write_bytes(MANIFEST, manifest_of(shards, weights=weights).to_json())
    monkeypatch.setattr(token_stream, "_SAMPLES_A_LOOK", 300)
    stream = TokenStream(
        storage, split="train", seq_len=SEQ_LEN, window_rows=4000, num_samples=9000, near_bytes=0
    )
    stream.read_ahead(np.arange(BATCH))
    here, beyond = (
        {p.shard for place in stream._places(np.arange(end)) for p in place} for end in (4000, 4014)
    )
    assert here <= stream.near_shards.keys() <= beyond


def test_a_store_of_conversations_with_lists_is_the_same_on_disk_row_by_row_and_near(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids that the loss does not count are stored as their complements."""
    monkeypatch.setattr(token_store, "MOST_SHARDS", 4)
    disk, shards = open_storage(str(tmp_path)), []
    for number in range(5):
        random = np.random.default_rng(number)
        ids = random.integers(0, 1000, 30_000)
        content = np.where(random.random(len(ids)) < 0.5, ids, ~ids).astype("<i2").tobytes()
        for place in (disk, storage):
            place.write_bytes(f"shard-{number:05d}.bin", content)
        digest = hashlib.sha256(content).hexdigest()
        shards.append(Shard(f"shard-{number:05d}.bin", "train", 0, len(ids), 1, len(ids), digest))
    manifest = dataclasses.replace(
        manifest_of(shards), chat=ChatFormat("{{ messages }}", "", "<end>")
    )
    lists = manifest.with_lists()[1]
    for place in (disk, storage):
        for name, content in (lists | {MANIFEST: manifest.to_json()}).items():
            place.write_bytes(name, content)
    options = {"split": "train", "seq_len": SEQ_LEN, "window_rows": 2000}
    expected = TokenStream(disk, **options).samples(np.arange(200))  # type: ignore[arg-type]
    assert (
        lists
        and expected[0].min() >= 0
        and 0.4 < (expected[1] == IGNORE_INDEX).float().mean() < 0.6
    )
    apart = TokenStream(storage, **options)  # type: ignore[arg-type]
    near = TokenStream(storage, num_samples=9000, near_bytes=1 << 30, **options)  # type: ignore[arg-type]
    near.read_ahead(np.arange(200))
    wait_until(
        lambda: near.near_shards and {shard.sha256 for shard in near.near_shards} <= copies()
    )
    for stream in (apart, near):
        assert all(map(torch.equal, stream.samples(np.arange(200)), expected))

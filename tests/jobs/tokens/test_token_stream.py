"""The token stream: rows are the concatenated shards, on disk and in S3, and a damaged store is
named."""

import hashlib
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.storage.s3 import S3Storage
from cluster.storage.uris import Storage, open_storage
from jobs.tokens.division import whole
from jobs.tokens.token_store import MANIFEST, Manifest, Shard, TokenStoreError, read_manifest
from jobs.tokens.token_stream import ShardChain, TokenStream
from raymill.sums.exact_reduce import subtrees_of_ranks
from tests.jobs.stores import make_store, manifest_of, write_shard
from tests.time_limits import limit_s


def make_mixture(
    storage: Storage, *, weights: tuple[float, ...] = (0.75, 0.25)
) -> list[np.ndarray]:
    """Makes a store of two sources in three and two shards; returns the train tokens of each."""
    sizes = [(0, 50), (0, 7), (0, 100), (1, 90), (1, 34)]
    written = [
        write_shard(storage, number, size, source=source)
        for number, (source, size) in enumerate(sizes)
    ]
    storage.write_bytes(
        MANIFEST, manifest_of([shard for shard, _ in written], weights=weights).to_json()
    )
    return [
        np.concatenate([ids for shard, ids in written if shard.source == source])
        for source in (0, 1)
    ]


def test_manifest_reads_back_equal(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    make_store(storage, sizes=[50, 20], val_size=30)
    manifest = read_manifest(storage)
    assert manifest.hash == hashlib.sha256((tmp_path / MANIFEST).read_bytes()).hexdigest()
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.total("tokens") == 100
    assert manifest.total("bytes", "val") == 120


@pytest.mark.parametrize("place", ["local", "s3"])
@pytest.mark.parametrize("vocab_size", [1000, 65536, 65537])
def test_rows_are_the_shards_end_to_end(
    place: str, vocab_size: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = (
        str(tmp_path) if place == "local" else f"s3://{request.getfixturevalue('s3_bucket')}/store"
    )
    storage = open_storage(root)
    tokens = make_store(storage, sizes=[5, 40, 1, 3, 52], vocab_size=vocab_size)
    stream = TokenStream(storage, split="train", seq_len=10)
    assert stream.count_rows() == 10
    inputs, targets = stream.rows(range(10))
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (10, 10)
    assert inputs.reshape(-1).tolist() == tokens[:100].tolist()
    assert targets.reshape(-1).tolist() == tokens[1:101].tolist()
    inputs, targets = stream.rows([7, 2, 7])
    assert inputs.tolist() == [
        tokens[70:80].tolist(),
        tokens[20:30].tolist(),
        tokens[70:80].tolist(),
    ]
    with pytest.raises(IndexError, match="rows 3 to 10 were asked for, the stream has 10"):
        stream.rows([3, 10])


def test_each_source_is_a_stream_of_its_own(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    tokens = make_mixture(storage)
    stream = TokenStream(storage, split="train", seq_len=10, seed=3, window_rows=4)
    assert stream.order.num_rows == (15, 12)
    samples = np.arange(200)
    sources, rows = stream.order.rows(samples)
    inputs, targets = stream.samples(samples)
    for source, row, ids, next_ids in zip(sources, rows, inputs, targets, strict=True):
        assert ids.tolist() == tokens[source][row * 10 : row * 10 + 10].tolist()
        assert next_ids.tolist() == tokens[source][row * 10 + 1 : row * 10 + 11].tolist()
    assert np.bincount(sources).tolist() == [150, 50]
    # In the store's own order a row may lie across sources, as evaluation reads them.
    assert stream.rows([15])[0][0].tolist() == [*tokens[0][150:], *tokens[1][:3]]


def test_a_source_without_a_row_is_named(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    make_mixture(storage, weights=(0.5, 0.25, 0.25))
    with pytest.raises(
        TokenStoreError, match=r"the train split of source 2 has 0 tokens, a row needs 11"
    ):
        TokenStream(storage, split="train", seq_len=10)


def test_read_ahead_fetches_what_is_used_and_little_else(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On S3, rows in shuffled order: the bytes fetched are the bytes used, each once, before they
    are asked for."""
    storage = open_storage(f"s3://{s3_bucket}/store")
    tokens = make_store(storage, sizes=[300_000, 200_001, 150_000])
    stream = TokenStream(storage, split="train", seq_len=256, window_rows=1 << 20)
    fetched: list[int] = []
    read_bytes = S3Storage.read_bytes

    def counted(self: S3Storage, key: str, *, start: int = 0, end: int | None = None) -> bytes:
        data = read_bytes(self, key, start=start, end=end)
        fetched.append(len(data))
        return data

    monkeypatch.setattr(S3Storage, "read_bytes", counted)
    steps = np.arange(20 * 16).reshape(20, 16)
    for step, samples in enumerate(steps):
        stream.read_ahead(steps[step : step + 2].reshape(-1))
        inputs, _ = stream.samples(samples)
        for row, ids in zip(stream.order.rows(samples)[1], inputs, strict=True):
            assert ids.tolist() == tokens[row * 256 : row * 256 + 256].tolist()
    used = steps.size * 257 * 2
    assert sum(fetched) / used < 1.01
    assert len(fetched) <= steps.size + 3  # rows across two shards take two


def test_splits_are_apart(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    make_store(storage, sizes=[100], val_size=31)
    assert TokenStream(storage, split="val", seq_len=10).count_rows() == 3
    with pytest.raises(
        TokenStoreError,
        match=r"the val split .* has 31 tokens, a row needs 33 .*lower train.seq_len",
    ):
        TokenStream(storage, split="val", seq_len=32)


def test_bytes_per_token_do_not_depend_on_what_follows() -> None:
    shards = [Shard(str(number), "val", 0, 10, 1, 10 * number, "") for number in range(1, 4)]
    of = [ShardChain(whole(shards[:count])).bytes_per_token for count in (1, 2, 3)]
    assert [chain(10) for chain in of] == [1.0] * 3
    assert [chain(11) for chain in of[1:]] == [1.5] * 2
    assert of[2](30) == 2.0


def test_a_damaged_store_is_named(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    make_store(storage, sizes=[100, 50])
    shard = tmp_path / "shard-00001.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    with pytest.raises(
        TokenStoreError, match=r"shard-00001\.bin has 98 bytes, the manifest says 100 bytes"
    ):
        TokenStream(storage, split="train", seq_len=8)
    shard.unlink()
    with pytest.raises(TokenStoreError, match=r"shard-00001\.bin is missing"):
        TokenStream(storage, split="train", seq_len=8)
    shard.write_bytes(content)
    (tmp_path / MANIFEST).write_bytes(b'{"format_version": 2}')
    with pytest.raises(TokenStoreError, match=r"manifest\.json is damaged"):
        TokenStream(storage, split="train", seq_len=8)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(
        TokenStoreError, match=r"holds no manifest.json: tokenizing was not finished"
    ):
        TokenStream(storage, split="train", seq_len=8)


@pytest.mark.parametrize("weights", [(), (0.6, 0.4)])
def test_an_epoch_of_a_resized_run_reads_each_token_once(
    weights: tuple[float, ...], tmp_path: Path
) -> None:
    """Worlds of 1 to 5 workers, each with its own stream that is opened again at a random step."""
    storage = open_storage(str(tmp_path))
    sources = make_mixture(storage, weights=weights)
    expected = sources if weights else [np.concatenate(sources)]
    random = np.random.default_rng(0)
    taken: dict[int, list[int]] = {}
    step = 0
    while step < 12:
        world_size, until = int(random.integers(1, 6)), step + int(random.integers(1, 4))
        streams = [
            TokenStream(storage, split="train", seq_len=10, seed=1, window_rows=5)
            for _ in range(world_size)
        ]
        for step in range(step, until):  # noqa: B020
            for rank, stream in enumerate(streams):
                for lane in itertools.chain(*subtrees_of_ranks(5, world_size)[rank]):
                    samples = range(10 * step + 2 * lane, 10 * step + 2 * lane + 2)
                    for sample, ids in zip(
                        samples, stream.samples(samples)[0].tolist(), strict=True
                    ):
                        assert taken.setdefault(sample, ids) == ids
        step = max(0, until - int(random.integers(0, 2)))  # some restarts lose a step
    assert sorted(taken) == list(range(len(taken)))
    order = TokenStream(storage, split="train", seq_len=10, seed=1, window_rows=5).order
    of_samples = order.rows(range(len(taken)))[0]
    for source, tokens in enumerate(expected):
        num_rows = (len(tokens) - 1) // 10
        first_epoch = np.flatnonzero(of_samples == source)[:num_rows]
        assert len(first_epoch) == num_rows
        rows = sorted(taken[sample] for sample in first_epoch.tolist())
        assert rows == sorted(tokens[: num_rows * 10].reshape(-1, 10).tolist())


@pytest.mark.more
def test_a_fresh_process_is_at_any_step_at_once(tmp_path: Path) -> None:
    """The store has 10^7 rows in 100 shards (of zeros, which take no space on disk)."""
    shards = []
    for number in range(100):
        with (tmp_path / f"shard-{number:05d}.bin").open("wb") as file:
            file.truncate(2 * 800_000)
        shards.append(Shard(f"shard-{number:05d}.bin", "train", 0, 800_000, 1, 1, ""))
    (tmp_path / MANIFEST).write_bytes(manifest_of(shards).to_json())
    program = (
        "import sys, time\n"
        "from cluster.storage.uris import open_storage; from jobs.tokens.token_stream import TokenStream\n"
        "stream = TokenStream(open_storage(sys.argv[1]), split='train', seq_len=8, window_rows=1 << 20)\n"
        "first = 512 * 987_654; inputs, _ = stream.samples(range(first, first + 512))\n"
        "print(stream.count_rows(), tuple(inputs.shape), time.process_time())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=limit_s(60),
    )
    result, seconds = done.stdout.rsplit(maxsplit=1)
    assert result == "9999999 (512, 8)"
    assert float(seconds) < 5

"""The token stream: rows are the concatenated shards, on disk and in S3, and a damaged store is named."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.storage import Storage, open_storage
from jobs.token_store import MANIFEST, Manifest, Shard, TokenStoreError, read_manifest, token_dtype
from jobs.token_stream import BlockCache, TokenStream


def make_store(storage: Storage, *, sizes: list[int], vocab_size: int = 1000, val_size: int = 0) -> np.ndarray:
    """A store of random tokens in shards of the given sizes; returns the train tokens."""
    random = np.random.default_rng(0)
    shards, train = [], []
    for number, size in enumerate([*sizes, val_size]):
        split = "train" if number < len(sizes) else "val"
        tokens = random.integers(0, vocab_size, size).astype(token_dtype(vocab_size))
        name = f"{'shard' if split == 'train' else 'val'}-{number:05d}.bin"
        storage.write_bytes(name, tokens.tobytes())
        digest = hashlib.sha256(tokens.tobytes()).hexdigest()
        shards.append(Shard(name, split, size, 1, 4 * size, digest))  # type: ignore[arg-type]
        if split == "train":
            train.append(tokens.astype(np.int64))
    manifest = Manifest("t", vocab_size, vocab_size - 1, "s", "c", {}, 0, tuple(shards))
    storage.write_bytes(MANIFEST, manifest.to_json())
    return np.concatenate(train)


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
    root = str(tmp_path) if place == "local" else f"s3://{request.getfixturevalue('s3_bucket')}/store"
    storage = open_storage(root)
    tokens = make_store(storage, sizes=[5, 40, 1, 3, 52], vocab_size=vocab_size)
    stream = TokenStream.open(storage, split="train", seq_len=10)
    assert stream.num_tokens == 101
    assert stream.num_rows == 10
    inputs, targets = stream.rows(range(10))
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (10, 10)
    assert inputs.reshape(-1).tolist() == tokens[:100].tolist()
    assert targets.reshape(-1).tolist() == tokens[1:101].tolist()
    inputs, targets = stream.rows([7, 2, 7])
    assert inputs.tolist() == [tokens[70:80].tolist(), tokens[20:30].tolist(), tokens[70:80].tolist()]
    with pytest.raises(IndexError, match="rows 3 to 10 asked, the stream has 10"):
        stream.rows([3, 10])


def test_remote_rows_are_right_with_a_cache_smaller_than_the_store(s3_bucket: str) -> None:
    storage = open_storage(f"s3://{s3_bucket}/store")
    tokens = make_store(storage, sizes=[1_500_000, 1_100_001, 700_000])  # 6.6 MB, eight blocks
    stream = TokenStream.open(storage, split="train", seq_len=1024, cache_bytes=2 << 20)
    for row in np.random.default_rng(1).integers(0, stream.num_rows, 40).tolist():
        inputs, _ = stream.rows([row])
        assert inputs[0].tolist() == tokens[row * 1024 : row * 1024 + 1024].tolist()


def test_block_cache_keeps_the_last_used_within_its_bound(tmp_path: Path) -> None:
    size = 5 << 20
    (tmp_path / "shard").write_bytes(bytes(size))
    cache = BlockCache(open_storage(str(tmp_path)), cache_bytes=3 << 20)
    for number in (0, 1, 2, 0, 3):
        cache.block("shard", number, size)
        assert cache.held_bytes <= 3 << 20
    (tmp_path / "shard").write_bytes(b"\1" * size)  # shows which blocks are read again
    assert [cache.block("shard", number, size)[0] for number in (0, 2, 3, 1)] == [0, 0, 0, 1]


def test_splits_are_apart(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    make_store(storage, sizes=[100], val_size=31)
    assert TokenStream.open(storage, split="val", seq_len=10).num_rows == 3
    with pytest.raises(TokenStoreError, match=r"the val split .* has 31 tokens, a row needs 33 .*lower train.seq_len"):
        TokenStream.open(storage, split="val", seq_len=32)


def test_a_damaged_store_is_named(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    make_store(storage, sizes=[100, 50])
    shard = tmp_path / "shard-00001.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    with pytest.raises(TokenStoreError, match=r"shard-00001\.bin has 98 bytes, the manifest says 100 bytes"):
        TokenStream.open(storage, split="train", seq_len=8)
    shard.unlink()
    with pytest.raises(TokenStoreError, match=r"shard-00001\.bin is missing"):
        TokenStream.open(storage, split="train", seq_len=8)
    shard.write_bytes(content)
    (tmp_path / MANIFEST).write_bytes(b'{"format_version": 1}')
    with pytest.raises(TokenStoreError, match=r"manifest\.json is damaged"):
        TokenStream.open(storage, split="train", seq_len=8)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(TokenStoreError, match=r"holds no manifest.json: tokenizing was not finished"):
        TokenStream.open(storage, split="train", seq_len=8)

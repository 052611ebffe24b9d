"""A store of very many shards: its manifest has lists in their place, and is read, checked and
repaired as any other."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from cluster.storage.uris import Storage, open_storage
from jobs.corpus.chunks import default_shard_bytes
from jobs.corpus.listing import CorpusFile
from jobs.tokens import token_store
from jobs.tokens.build_store import tokenize
from jobs.tokens.document_map import DOCUMENTS
from jobs.tokens.token_store import (
    MANIFEST,
    SPLITS,
    Manifest,
    Shard,
    TokenStoreError,
    read_manifest,
)
from jobs.tokens.token_stream import TokenStream
from tests.jobs.corpora import data_config, make_corpus
from tests.jobs.stores import manifest_of, write_shard

SIZES = {0: 40, 1: 30, 2: 1, 999: 70, 1000: 25, 1001: 60, 2500: 90, 100_000: 33, 100_001: 50}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes more than eight shards very many."""
    return lambda: monkeypatch.setattr(token_store, "MOST_SHARDS", 8)


def write_store(storage: Storage, *, weights: tuple[float, ...] = ()) -> Manifest:
    """Writes shards with numbers that are far apart, of two sources, with validation among them."""
    shards = []
    for number, size in SIZES.items():
        split: Any = "val" if number in (1, 1001, 100_001) else "train"
        shards.append(
            write_shard(storage, number, size, split=split, source=int(number >= 1000))[0]
        )
    manifest = manifest_of(shards, weights=weights)
    for name, content in manifest.with_lists()[1].items():
        storage.write_bytes(name, content)
    storage.write_bytes(MANIFEST, manifest.to_json())
    return manifest


@pytest.mark.more
@pytest.mark.parametrize("weights", [(), (0.5, 0.5)])
@pytest.mark.parametrize("place", ["local", "s3"])
def test_rows_and_figures_are_those_of_a_store_without_lists(
    weights: tuple[float, ...],
    place: str,
    few: Callable[[], None],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    plain = open_storage(str(tmp_path / "plain"))
    write_store(plain, weights=weights)
    expected = {
        split: TokenStream(plain, split=split, seq_len=5, seed=3, window_rows=7) for split in SPLITS
    }
    few()
    root = (
        str(tmp_path / "lists")
        if place == "local"
        else f"s3://{request.getfixturevalue('s3_bucket')}/store"
    )
    storage = open_storage(root)
    manifest = write_store(storage, weights=weights)
    names = {entry.key for entry in storage.list("list-")}
    assert names == {
        *(
            "list-0-shard-00.json",
            "list-0-val-00.json",
            "list-1-shard-01.json",
            "list-1-shard-02.json",
        ),
        *("list-1-val-01.json", "list-1-shard-100.json", "list-1-val-100.json"),
    }
    for split, stream in expected.items():
        found = TokenStream(storage, split=split, seq_len=5, seed=3, window_rows=7)
        assert found.count_rows() == stream.count_rows()
        assert found.rows(range(found.count_rows()))[1].equal(
            stream.rows(range(found.count_rows()))[1]
        )
        assert found.bytes_per_token(3) == stream.bytes_per_token(3)
        if split == "train":
            assert found.samples(range(90))[0].equal(stream.samples(range(90))[0])
    stored = storage.read_bytes(MANIFEST)
    opened = read_manifest(storage)
    assert set(opened.shards) == set(manifest.shards) == set(read_manifest(plain).shards)
    assert opened.hash == manifest.hash == hashlib.sha256(stored).hexdigest()
    assert Manifest.from_json(stored).hash == manifest.hash  # also with its lists unopened
    assert json.loads(stored)["totals"] == json.loads(plain.read_bytes(MANIFEST))["totals"]
    assert json.loads(stored)["format_version"] == 4
    assert json.loads(plain.read_bytes(MANIFEST))["format_version"] == 2


def test_a_reader_opens_the_lists_that_it_needs(few: Callable[[], None], tmp_path: Path) -> None:
    few()
    storage = open_storage(str(tmp_path))
    write_store(storage)
    val = TokenStream(storage, split="val", seq_len=5)
    train = TokenStream(storage, split="train", seq_len=5)
    for path in (*tmp_path.glob("list-1-shard*"), tmp_path / "list-1-val-100.json"):
        path.unlink()
    assert val.rows(range(17))[0].shape == (17, 5)
    assert train.rows(range(20))[0].shape == (20, 5)
    with pytest.raises(
        TokenStoreError, match=r"list-1-shard-01\.json is missing or altered; tokenize again"
    ):
        train.rows(range(30))
    with pytest.raises(TokenStoreError, match=r"list-1-shard-01\.json is missing or altered"):
        read_manifest(storage)


def test_a_lost_shard_of_a_list_is_named_when_it_is_opened(
    few: Callable[[], None], tmp_path: Path
) -> None:
    few()
    storage = open_storage(str(tmp_path))
    write_store(storage)
    (tmp_path / "shard-00999.bin").unlink()
    with pytest.raises(
        TokenStoreError, match=r"shard-00999\.bin is missing, the manifest says 140 bytes"
    ):
        TokenStream(storage, split="train", seq_len=5).rows([0])
    with pytest.raises(TokenStoreError, match=r"shard-00999\.bin is missing"):
        read_manifest(storage)


def test_a_store_with_lists_is_made_looked_at_and_repaired(
    ray_workers: int, few: Callable[[], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus = make_corpus(tmp_path / "texts", num_documents=200)
    plain = tokenize(data_config(str(corpus), tmp_path / "plain"))
    few()
    config = data_config(str(corpus), tmp_path / "storage")
    made = tokenize(config)
    folder = Path(made["manifest"]).parent
    assert tokenize(config) == made  # found, not made again
    assert made["manifest_hash"] == hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    for name in ("documents", "tokens", "bytes", "dropped", "train_tokens", "val_bytes"):
        assert made[name] == plain[name]
    assert all(name.startswith("list-0-") for name in made["shards"])
    for command in ("stats", "verify", "report"):
        assert main(["data", command, "--storage.uri", str(tmp_path / "storage"), "--json"]) == 0
        capfd.readouterr()

    names = {
        path.name
        for path in folder.rglob("*")
        if path.is_file() and ".partial-lock" not in path.name
    }
    shards = {shard.file for shard in read_manifest(open_storage(str(folder))).shards}
    tables = {name.replace(".bin", ".docs") for name in shards}
    listed = {MANIFEST, DOCUMENTS, "sources.json", "tokenizer.json"}
    assert names == {*shards, *tables, *made["shards"], *listed}
    content = (folder / "shard-00002.bin").read_bytes()
    (folder / "shard-00002.bin").unlink()
    assert tokenize(config) == made
    assert (folder / "shard-00002.bin").read_bytes() == content
    assert names == {
        path.name
        for path in folder.rglob("*")
        if path.is_file() and ".partial-lock" not in path.name
    }


def of_size(num_bytes: int, compression: str = "") -> list[CorpusFile]:
    return [CorpusFile(0, "/f", 0, num_bytes, "v", "txt", compression)]


@pytest.mark.parametrize(
    ("corpus_gib", "shard_mib"),
    [
        (0.001, 16),
        (64, 16),
        (65, 32),
        (128, 32),
        (1000, 256),
        (1024, 256),
        (1025, 512),
        (10**4, 512),
    ],
)
def test_shards_grow_with_the_corpus(corpus_gib: float, shard_mib: int) -> None:
    assert default_shard_bytes(of_size(int(corpus_gib * 2**30))) == shard_mib << 20
    # Of text
    assert default_shard_bytes(of_size(int(corpus_gib * 2**30 / 3), ".zst")) == shard_mib << 20


def test_a_small_corpus_makes_the_store_that_it_always_made(
    ray_workers: int, tmp_path: Path
) -> None:
    corpus = make_corpus(tmp_path / "texts", num_documents=40)
    sized = tokenize(data_config(str(corpus), tmp_path / "storage", shard_bytes=16 << 20))
    by_default = tokenize(data_config(str(corpus), tmp_path / "storage", shard_bytes=0))
    assert by_default == sized  # the very same place
    assert isinstance(
        read_manifest(open_storage(str(Path(sized["manifest"]).parent))).shards[0], Shard
    )

"""The whole stage in this process: what it trusts of the store that it finds, and when it makes
another."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.storage.folder import LocalStorage
from jobs.corpus import file_pieces
from jobs.tokens import build_store
from jobs.tokens.build_store import tokenize
from model.text.tokenizer import train_bpe
from tests.jobs.cleaning.in_process import tokenize_in_process
from tests.jobs.corpora import data_config, texts_of
from tests.killed_upload import killed_upload

NUM_PIECES_DELETED = 2  # before the kill


class KilledError(BaseException):
    pass


@pytest.fixture(autouse=True)
def run_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize_in_process(monkeypatch)


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(train_bpe(["text number 0123456789"] * 9, vocab_size=270).to_json())
    return str(path)


def write(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(lines, 0) if path.suffix == ".gz" else lines)
    return path


def test_a_store_whose_cleanup_was_killed_is_repaired_whole(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive's pieces are evidence only as long as all of them are there."""
    texts = [f"text number {number}" for number in range(400)]
    archive = write(tmp_path / "texts" / "a.jsonl.gz", texts)
    config = data_config(
        str(archive), tmp_path / "storage", tokenizer=tokenizer, shard_bytes=2000, val_fraction=0.0
    )
    delete, deleted = LocalStorage.delete, list[str]()

    def delete_some(storage: LocalStorage, key: str, **conditions: Any) -> None:
        if key.startswith(file_pieces.PIECES):
            deleted.append(key)
            if len(deleted) > NUM_PIECES_DELETED:
                raise KilledError
        delete(storage, key, **conditions)

    with monkeypatch.context() as killing, pytest.raises(KilledError):
        killing.setattr(build_store, "_DELETING_THREADS", 1)
        killing.setattr(LocalStorage, "delete", delete_some)
        tokenize(config)
    (store,) = (tmp_path / "storage" / "tokens").iterdir()
    assert list(store.glob("unpacked/*/all"))
    finished = tokenize(config)
    assert texts_of(finished) == texts
    (store / next(iter(finished["shards"]))).unlink()
    left = killed_upload(store, "unpacked/piece")
    assert tokenize(config) == finished
    assert texts_of(finished) == texts
    assert not list(store.glob("unpacked/*/*")) and not left.exists()


def test_a_store_of_shards_that_are_others_now_is_made_again(
    tokenizer: str, tmp_path: Path
) -> None:
    texts = {name: [f"text {name} {number}" for number in range(10)] for name in ("a", "b")}
    made = {
        name: tokenize(
            data_config(
                str(write(tmp_path / f"{name}.jsonl", own)), tmp_path / name, tokenizer=tokenizer
            )
        )
        for name, own in texts.items()
    }
    latest = tmp_path / "latest"
    for name, own in texts.items():
        shutil.rmtree(latest, ignore_errors=True)
        shutil.copytree(Path(made[name]["manifest"]).parent, latest)
        copied = tokenize(
            data_config(f"tokens://{latest}", tmp_path / "storage", tokenizer=tokenizer)
        )
        assert sorted(texts_of(copied)) == sorted(own)

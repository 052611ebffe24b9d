"""Sources that change, hide, repeat or lie far away: the stage stops by name, or keeps everything
once."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest

from cluster.storage.uris import NotFoundError, open_storage
from jobs.corpus.listing import Listing, list_corpus
from jobs.tokens import build_store
from jobs.tokens.build_store import tokenize
from jobs.tokens.train_tokenizer import ensure_tokenizer
from raymill.errors import UserError
from tests.cluster.hub_stub import running_hub
from tests.jobs.corpora import data_config, make_corpus, manifest_of, texts_of
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

TEXTS = [f"document number {n} of a small corpus" for n in range(200)]
LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)


@pytest.fixture(scope="module")
def tokenizer(ray_workers: int, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.jsonl").write_bytes(LINES)
    return ensure_tokenizer(data_config(f"{folder}/a.jsonl", folder))[1]


@pytest.fixture
def after_listing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Makes something happen between the listing of the corpus and its reading."""

    def set_up(happen: Callable[[], Any]) -> None:
        def listed(source: str | list[str], **settings: Any) -> Listing:
            listing = list_corpus(source, **settings)
            happen()
            return listing

        monkeypatch.setattr(build_store, "list_corpus", listed)

    return set_up


def truncate_unnoticed(path: Path) -> None:
    times = path.stat()
    os.truncate(path, 40)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated, its date kept": (
        truncate_unnoticed,
        r"b\.jsonl was changed after it was listed; run again",
    ),
    "replaced": (
        lambda path: path.write_bytes(LINES[::-1]),
        r"b\.jsonl was changed after it was listed; run again",
    ),
    "removed": (Path.unlink, r"b\.jsonl does not exist"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_after_its_listing_stops_the_job(
    tokenizer: str, after_listing: Callable[[Any], None], change: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl").write_bytes(LINES.upper().replace(b"TEXT", b"text"))
    happen, expected = CHANGES[change]
    after_listing(lambda: happen(tmp_path / "b.jsonl"))
    with pytest.raises(UserError, match=expected):
        tokenize(data_config(f"{tmp_path}/*.jsonl", tmp_path / "storage", tokenizer=tokenizer))
    assert not list((tmp_path / "storage").glob("tokens/*/manifest.json"))


def test_an_object_replaced_during_the_run_stops_it(
    tokenizer: str, after_listing: Callable[[Any], None], s3_bucket: str, tmp_path: Path
) -> None:
    storage = open_storage(f"s3://{s3_bucket}/texts")
    storage.write_bytes("a.jsonl", LINES)
    after_listing(lambda: storage.write_bytes("a.jsonl", LINES[::-1]))
    with pytest.raises(
        UserError,
        match=f"s3://{s3_bucket}/texts/a.jsonl was changed or removed by another process; run again",
    ):
        tokenize(data_config(f"s3://{s3_bucket}/texts", tmp_path, tokenizer=tokenizer))


def test_missing_objects_and_odd_keys(
    tokenizer: str, s3_server: str, s3_bucket: str, tmp_path: Path
) -> None:
    uri = f"s3://{s3_bucket}/texts"
    with pytest.raises(NotFoundError, match=f"nothing is at '{uri}/none.jsonl'"):
        tokenize(data_config(f"{uri}/none.jsonl", tmp_path, tokenizer=tokenizer))
    keys = [
        "a#b",
        "100%25 a",
        "名前 😀",
        "a..b",
        "[x]*?",
        " lead",
        "+plus&=",
        "x" * 200,
        "a/../b",
        "empty",
    ]
    client = boto3.client("s3", endpoint_url=s3_server)
    for key in keys:
        client.put_object(
            Bucket=s3_bucket, Key=f"texts/{key}.txt", Body=b"" if key == "empty" else key.encode()
        )
    client.put_object(Bucket=s3_bucket, Key="texts/folder/")
    result = tokenize(data_config(uri, tmp_path, tokenizer=tokenizer))
    assert sorted(texts_of(result)) == sorted(keys[:-1])
    assert result["dropped"]["empty"] == 1


@pytest.mark.more
def test_the_hub_gives_the_shards_of_the_same_files_on_disk(
    ray_workers: int, tmp_path: Path
) -> None:
    folder = make_corpus(tmp_path / "texts", num_documents=60)
    local = tokenize(data_config(str(folder), tmp_path / "local", shard_bytes=60_000))
    config = data_config(
        "hf://datasets/owner/texts@main/data", tmp_path / "remote", shard_bytes=60_000
    )
    (tmp_path / "config.json").write_text(config.model_dump_json())
    with running_hub() as hub:
        commit = hub.commit(
            {f"data/{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}
        )
        done = subprocess.run(
            [
                sys.executable,
                REPOSITORY / "tests/jobs/tokenize_once.py",
                tmp_path / "config.json",
                "2",
            ],
            env=os.environ
            | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
            | {"PYTHONPATH": str(REPOSITORY), "RAY_AUTH_MODE": "disabled"},
            capture_output=True,
            text=True,
            timeout=limit_s(80),
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    remote = json.loads(done.stdout)
    assert remote["shards"] == local["shards"]
    assert remote["dropped"] == local["dropped"]
    assert manifest_of(remote).revisions == {"hf://datasets/owner/texts@main/data": commit}
    assert any(path.endswith("c.parquet") and wanted for _, path, wanted, _ in hub.asked)


@pytest.mark.more
def test_thousands_of_tiny_files_make_few_shards(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(5000):
        (tmp_path / "texts" / f"{number:04d}.txt").write_text(f"tiny {number}")
    config = data_config(
        f"{tmp_path}/texts", tmp_path / "storage", tokenizer=tokenizer, shard_bytes=1 << 20
    )
    result = tokenize(config)
    assert result["documents"] == 5000
    assert len(result["shards"]) == 20


def test_a_source_named_twice_is_read_once(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    sources = [f"{tmp_path}/a.jsonl", f"file://{tmp_path}/*.jsonl", f"{tmp_path}/none/../a.jsonl"]
    result = tokenize(data_config(sources, tmp_path / "storage", tokenizer=tokenizer, dedup=False))
    assert sorted(texts_of(result)) == sorted(TEXTS)


def test_a_fault_in_a_piece_names_the_file_and_its_byte(tokenizer: str, tmp_path: Path) -> None:
    lines = LINES + b'{"text": "caf\xe9"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines, 0))
    settings = {"tokenizer": tokenizer, "shard_bytes": 2000, "invalid_utf8": "fail"}
    with pytest.raises(
        UserError, match=f"{tmp_path}/a.jsonl.gz is not UTF-8 at byte {lines.index(0xE9)}; convert"
    ):
        tokenize(data_config(str(tmp_path), tmp_path / "storage", **settings))

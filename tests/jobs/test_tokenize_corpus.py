"""Corpus to token store: the same bytes for any workers, kills and places; everything kept or
counted; clear errors."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from cluster.storage.uris import StorageError, open_storage, split_uri
from jobs.corpus.chunks import whole_file
from jobs.corpus.documents import CHAT_DROPS, Drop, read_documents
from jobs.corpus.listing import CorpusError, list_corpus
from jobs.corpus.text_hashes import document_hash, normalized
from jobs.tokens.build_store import tokenize
from jobs.tokens.document_map import DocumentMap
from jobs.tokens.token_store import Manifest, read_manifest, token_dtype
from jobs.tokens.train_tokenizer import ensure_tokenizer
from raymill.errors import UserError
from tests.jobs.corpora import data_config, make_corpus
from tests.repository import REPOSITORY
from tests.time_limits import limit_s


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="module")
def result(corpus: Path, ray_workers: int, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What three workers make of the corpus."""
    return tokenize(data_config(str(corpus), tmp_path_factory.mktemp("storage")))


def manifest_of(result: dict) -> Manifest:
    return read_manifest(split_uri(result["manifest"])[0])


def shard_ids(result: dict, file: str) -> list[int]:
    manifest = manifest_of(result)
    content = split_uri(result["manifest"])[0].read_bytes(file)
    return np.frombuffer(content, dtype=token_dtype(manifest.vocab_size)).tolist()


def test_result_manifest_and_files_agree(result: dict) -> None:
    manifest, folder = manifest_of(result), Path(result["manifest"]).parent
    assert (
        result["manifest_hash"]
        == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    )
    assert result["shards"] == {shard.file: shard.sha256 for shard in manifest.shards}
    assert {shard.split for shard in manifest.shards} == {"train", "val"}
    assert len(manifest.shards) > 20
    for shard in manifest.shards:
        content = (folder / shard.file).read_bytes()
        ids = shard_ids(result, shard.file)
        assert hashlib.sha256(content).hexdigest() == shard.sha256
        assert len(ids) == shard.tokens
        assert ids.count(manifest.eot_id) == shard.documents
        assert ids[-1] == manifest.eot_id
    assert (
        result["tokens"]
        == result["train_tokens"] + result["val_tokens"]
        == sum(s.tokens for s in manifest.shards)
    )
    names = {
        path.name
        for path in folder.rglob("*")
        if path.is_file() and ".partial-lock" not in path.name
    }
    tables = {name.replace(".bin", ".docs") for name in result["shards"]}
    listed = {"manifest.json", "documents.json", "sources.json", "tokenizer.json"}
    assert names == {*result["shards"], *tables, *listed}


def test_every_document_is_kept_once_or_counted(result: dict, corpus: Path) -> None:
    config = data_config(str(corpus), "unused")
    all_documents = [
        document
        for number, file in enumerate(list_corpus(str(corpus)).files)
        for document in read_documents(whole_file(file), config.data)
    ]
    unusable = [document.drop for document in all_documents if document.drop]
    texts = list(dict.fromkeys(document.text for document in all_documents if not document.drop))
    assert result["documents"] == len(texts) == 601
    assert result["bytes"] == sum(len(text.encode()) for text in texts)
    assert result["dropped"] == dict.fromkeys(
        [str(reason) for reason in Drop if reason not in CHAT_DROPS], 0
    ) | {
        "empty": 1,
        "binary": 1,
        "invalid_json": 1,
        "missing_text": 1,
        "duplicate": 2,
    }
    assert len(unusable) + 2 + len(texts) == len(all_documents)
    manifest = manifest_of(result)
    assert manifest.replaced_utf8 == 1

    tokenizer, _ = ensure_tokenizer(data_config(str(corpus), Path(result["manifest"]).parents[2]))
    stored: dict[str, list[str]] = {"train": [], "val": []}
    for shard in manifest.shards:
        document: list[int] = []
        for token in shard_ids(result, shard.file):
            if token == tokenizer.eot_id:
                stored[shard.split].append(tokenizer.decode(document))
                document = []
            else:
                document.append(token)

    def held_out(text: str) -> bool:
        return int.from_bytes(document_hash(normalized(text))[:8]) / 2**64 < 0.2

    # Order included: canonical within each split.
    assert stored["train"] == [text for text in texts if not held_out(text)]
    assert stored["val"] == [text for text in texts if held_out(text)]
    reasons = {"empty", "binary", "invalid_json", "missing_text", "duplicate"}
    assert {
        reason: len(samples) for reason, samples in manifest.drop_samples.items()
    } == dict.fromkeys(reasons, 1) | {"duplicate": 2}
    assert manifest.drop_samples["invalid_json"][0].preview.startswith("{broken")


def map_bytes(result: dict) -> dict[str, bytes]:
    """Returns the files of the store's document map, by name."""
    folder = Path(result["manifest"]).parent
    files = [*folder.glob("*.docs"), folder / "documents.json"]
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [2, 4])
def test_any_number_of_workers_makes_the_same_bytes(
    result: dict, corpus: Path, num_workers: int, tmp_path: Path
) -> None:
    config_file = tmp_path / "config.json"
    config_file.write_text(data_config(str(corpus), tmp_path / "storage").model_dump_json())
    program = str(REPOSITORY / "tests/jobs/tokenize_once.py")
    output = subprocess.run(
        [sys.executable, program, str(config_file), str(num_workers)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=limit_s(120),
        check=True,
    ).stdout
    made = json.loads(output)
    assert made["manifest_hash"] == result["manifest_hash"]
    assert map_bytes(made) == map_bytes(result)


@pytest.mark.slow
def test_one_worker_killed_half_way_and_started_again_makes_the_same_bytes(
    result: dict, corpus: Path, tmp_path: Path
) -> None:
    config_file = tmp_path / "config.json"
    config_file.write_text(data_config(str(corpus), tmp_path / "storage").model_dump_json())
    command = [
        sys.executable,
        str(REPOSITORY / "tests/jobs/tokenize_once.py"),
        str(config_file),
        "1",
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "RAY_AUTH_MODE": "disabled"}

    job = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    written: list[Path] = []
    deadline_s = time.monotonic() + limit_s(60)
    while len(written) < 4 and time.monotonic() < deadline_s and job.poll() is None:
        written = sorted((tmp_path / "storage").glob("tokens/*/shard-0*.json"))
        time.sleep(0.002)
    processes = [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]
    for process in processes:
        if process.is_running():
            process.kill()
    psutil.wait_procs(processes, timeout=limit_s(30))
    job.wait()
    folder = written[0].parent
    survivors = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.bin")}
    assert 4 <= len(survivors) < len(result["shards"]), (
        "the job was to be killed between two shards"
    )
    assert not (folder / "manifest.json").exists()
    vouched = {
        shard["file"]
        for path in folder.glob("shard-0*.json")
        for shard in json.loads(path.read_bytes())["result"]["shards"]
    }

    # A chunk whose bytes no longer are what its sidecar says is written again, the others are not.
    spoiled = sorted(vouched)[0]
    content = bytearray((folder / spoiled).read_bytes())
    content[7] ^= 1
    (folder / spoiled).write_bytes(content)
    output = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=limit_s(120), check=True
    ).stdout
    resumed = json.loads(output)
    assert resumed["shards"] == result["shards"]
    assert resumed["manifest_hash"] == result["manifest_hash"]
    assert {key: resumed[key] for key in resumed if key != "manifest"} == {
        key: result[key] for key in result if key != "manifest"
    }
    assert map_bytes(resumed) == map_bytes(result)
    untouched = {name for name in vouched if not name.endswith(spoiled.removeprefix("shard"))}
    assert {name: (folder / name).stat().st_mtime_ns for name in untouched} == {
        n: survivors[n] for n in untouched
    }


@pytest.mark.more
def test_s3_sources_and_storage_give_the_same_manifest(
    result: dict, corpus: Path, s3_bucket: str
) -> None:
    open_storage(f"s3://{s3_bucket}").upload_folder(corpus, "data/texts")
    remote = tokenize(data_config(f"s3://{s3_bucket}/data/texts", f"s3://{s3_bucket}/raymill"))
    assert remote["manifest"].startswith(f"s3://{s3_bucket}/raymill/tokens/")
    assert remote["manifest_hash"] == result["manifest_hash"]
    assert remote["shards"] == result["shards"]
    store = split_uri(remote["manifest"])[0]
    expected = map_bytes(result)
    del expected["documents.json"]  # which names the files
    assert {name: store.read_bytes(name) for name in expected} == expected
    mapped = DocumentMap(store, read_manifest(store))
    documents = mapped.documents_of("shard-00001.bin")
    assert documents is not None
    last = documents.document(len(documents) - 1)
    assert documents.number_at(last.end - 1) == len(documents) - 1
    assert mapped.files[last.file][0].startswith(f"s3://{s3_bucket}/data/texts/")
    manifest = split_uri(remote["manifest"])[0].read_bytes("manifest.json").decode()
    assert s3_bucket not in manifest
    sources = json.loads(split_uri(remote["manifest"])[0].read_bytes("sources.json"))
    assert sources["files"][0][0] == f"s3://{s3_bucket}/data/texts/a.jsonl"
    assert sources["skipped"] == [f"s3://{s3_bucket}/data/texts/readme.md"]


@pytest.mark.more
def test_renamed_files_give_the_same_manifest(result: dict, corpus: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for path in corpus.iterdir():
        os.link(path, renamed / f"new-{path.name}")
    again = tokenize(data_config(str(renamed), tmp_path / "storage"))
    assert again["shards"] == result["shards"]
    assert again["manifest_hash"] == result["manifest_hash"]
    before, now = map_bytes(result), map_bytes(again)
    assert before.pop("documents.json") != now.pop("documents.json"), "it names the files"
    assert now == before


@pytest.mark.more
def test_a_finished_store_is_reused_a_damaged_one_mended_a_changed_corpus_made_anew(
    ray_workers: int, tmp_path: Path
) -> None:
    corpus = make_corpus(tmp_path / "texts", num_documents=60)
    config = data_config(str(corpus), tmp_path / "storage")
    first = tokenize(config)
    folder = Path(first["manifest"]).parent
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert tokenize(config) == first
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before

    shard = folder / "shard-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    assert tokenize(config) == first
    assert hashlib.sha256(shard.read_bytes()).hexdigest() == first["shards"]["shard-00000.bin"]

    with (corpus / "a.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more document"}) + "\n")
    changed = tokenize(config)
    assert changed["manifest"] != first["manifest"]
    assert changed["documents"] == first["documents"] + 1


@pytest.mark.parametrize(("policy", "documents", "dropped"), [("replace", 3, 0), ("skip", 2, 1)])
def test_invalid_utf8_is_counted(
    policy: str, documents: int, dropped: int, ray_workers: int, tmp_path: Path
) -> None:
    for name, content in {"a": b"good text", "b": b"caf\xe9", "c": "café".encode()}.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    result = tokenize(data_config(str(tmp_path), tmp_path / "storage", invalid_utf8=policy))
    assert result["documents"] == documents
    assert result["dropped"]["invalid_utf8"] == dropped
    assert manifest_of(result).replaced_utf8 == documents - 2


def test_invalid_utf8_can_stop_the_job(ray_workers: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    # The tokenizer's sample ends before the bad file
    settings = {"invalid_utf8": "fail", "tokenizer_sample_bytes": 4}
    with pytest.raises(
        UserError, match=r"b\.txt is not UTF-8 at byte 3; convert the file"
    ) as caught:
        tokenize(data_config(str(tmp_path), tmp_path / "storage", **settings))
    assert "\n" not in str(caught.value)
    # The tokenizer meets it first
    with pytest.raises(UserError, match=r"b\.txt is not UTF-8 at byte 3"):
        tokenize(data_config(str(tmp_path), tmp_path / "storage", invalid_utf8="fail"))


def test_an_empty_corpus_says_what_was_dropped(ray_workers: int, tmp_path: Path) -> None:
    for name, content in {"a": b"", "b": b"\x00\x01", "c": b" \n"}.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    expected = r"the corpus is empty: 3 files, 3 documents dropped \(2 empty, 1 binary\); check data.source"
    with pytest.raises(UserError, match=expected):
        tokenize(data_config(str(tmp_path), tmp_path / "storage"))
    (tmp_path / "good.txt").write_text("a tokenizer needs text")
    _, tokenizer_uri = ensure_tokenizer(data_config(f"{tmp_path}/good.txt", tmp_path / "storage"))
    with pytest.raises(CorpusError, match=expected):
        tokenize(data_config(f"{tmp_path}/?.txt", tmp_path / "storage", tokenizer=tokenizer_uri))


def test_a_missing_bucket_is_named(ray_workers: int, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no bucket 'nowhere'"):
        tokenize(data_config("s3://nowhere/texts", tmp_path))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(StorageError, match="there is no bucket 'nowhere'"):
        tokenize(data_config(str(tmp_path), "s3://nowhere/raymill"))


@pytest.mark.parametrize(
    ("num_documents", "val_fraction", "splits"), [(1, 0.5, "T"), (2, 0.001, "TV"), (2, 0.999, "TV")]
)
def test_small_corpora_still_train_and_validate(
    num_documents: int, val_fraction: float, splits: str, ray_workers: int, tmp_path: Path
) -> None:
    for number in range(num_documents):
        (tmp_path / f"{number}.txt").write_text(f"document number {number} " * 20)
    result = tokenize(data_config(str(tmp_path), tmp_path / "storage", val_fraction=val_fraction))
    assert {"T": result["train_tokens"] > 0, "V": result["val_tokens"] > 0} == {
        "T": True,
        "V": "V" in splits,
    }

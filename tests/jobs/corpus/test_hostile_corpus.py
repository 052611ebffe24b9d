"""A corpus of hostile files through the stage: each costs its own documents only. Exit codes,
tokenizers, stores."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster.settings.run import write_config
from cluster.stages.stage_module import HOPELESS
from cluster.storage.uris import split_uri
from jobs.corpus import ray_data_tasks as data_tasks
from jobs.corpus.chunks import Chunk, whole_file
from jobs.corpus.listing import CorpusError, CorpusFile
from jobs.corpus.ray_data_tasks import run_tasks
from jobs.pretrain import pretrain
from jobs.tokens.build_store import tokenize
from jobs.tokens.preview_data import preview
from jobs.tokens.token_store import TokenStoreError, token_dtype
from model.text.tokenizer import Tokenizer
from raymill.errors import UserError
from tests.jobs.corpora import data_config, manifest_of, texts_of
from tests.jobs.hostile_corpus import MAX_DOCUMENT_BYTES, HostileCorpus, make_hostile_corpus
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

pytestmark = pytest.mark.more

SETTINGS: dict[str, Any] = {"max_document_bytes": MAX_DOCUMENT_BYTES, "shard_bytes": 200_000}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> HostileCorpus:
    return make_hostile_corpus(tmp_path_factory.mktemp("hostile") / "texts")


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def result(ray_workers: int, corpus: HostileCorpus, storage: Path) -> dict[str, Any]:
    return tokenize(data_config(str(corpus.folder), storage, **SETTINGS))


def test_every_text_is_kept_and_every_other_is_counted(
    result: dict[str, Any], corpus: HostileCorpus
) -> None:
    assert Counter(texts_of(result)) == Counter(corpus.kept)
    assert {reason: count for reason, count in result["dropped"].items() if count} == dict(
        corpus.drops
    )
    assert manifest_of(result).replaced_utf8 == 1
    assert len(result["shards"]) > 8


def test_the_end_of_text_id_stands_after_documents_only(result: dict[str, Any]) -> None:
    store, manifest = split_uri(result["manifest"])[0], manifest_of(result)
    ids = [
        np.frombuffer(store.read_bytes(s.file), token_dtype(manifest.vocab_size))
        for s in manifest.shards
    ]
    assert sum(int((part == manifest.eot_id).sum()) for part in ids) == result["documents"]


def test_a_dropped_utf_16_file_says_so(result: dict[str, Any]) -> None:
    previews = [sample.preview for sample in manifest_of(result).drop_samples["binary"]]
    assert "UTF-16, convert it to UTF-8: in UTF-16" in previews
    assert "UTF-16, convert it to UTF-8: 你好世界" in previews


def test_names_of_files_forge_no_line(
    corpus: HostileCorpus, result: dict[str, Any], storage: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert tokenize(data_config(str(corpus.folder), storage, **SETTINGS)) == result
    lines = capfd.readouterr().err.splitlines()
    linked = f"{corpus.folder}/folder/up/"
    assert any(
        line.startswith("skipped 1 file of unknown ending, such as")
        and f"1 linked folder, such as {linked!r}" in line
        and f"3 special files, such as '{corpus.folder}/loop.txt'" in line
        for line in lines
    )
    sources = json.loads(Path(result["manifest"]).with_name("sources.json").read_bytes())
    names = ["forged\nraymill-result: {}.md", "loop.txt", "nowhere.txt", "pipe.txt"]
    assert sources["skipped"] == [linked, *(f"{corpus.folder}/{name}" for name in names)]
    assert not any(line.startswith("raymill-result") for line in lines)


def test_the_preview_counts_the_same(corpus: HostileCorpus) -> None:
    figures = preview(data_config(str(corpus.folder), "unused", **SETTINGS))
    assert figures["dropped"] == dict(corpus.drops)
    assert figures["documents"] == len(corpus.kept)
    assert figures["linked_folders"] == [f"{corpus.folder}/folder/up/"]
    assert figures["skipped_files"] == {".md": 1}
    names = ("loop.txt", "nowhere.txt", "pipe.txt")
    assert figures["special_files"] == [f"{corpus.folder}/{name}" for name in names]


@pytest.mark.parametrize("is_finished", [True, False])
def test_too_many_unreadable_documents_stop_the_job(
    result: dict[str, Any], corpus: HostileCorpus, storage: Path, is_finished: bool, tmp_path: Path
) -> None:
    tokenizer = str(Path(result["manifest"]).with_name("tokenizer.json"))
    settings = SETTINGS | {"tokenizer": tokenizer, "max_unreadable_fraction": 0.01}
    counts = r"17 of 677 documents cannot be read \(7 binary, 2 invalid_json, 2 invalid_csv, 6 missing_text\)"
    expected = (
        counts
        + r", more than the share of data\.max_unreadable_fraction=0\.01; `raymill data preview` shows some"
    )
    with pytest.raises(CorpusError, match=expected):
        tokenize(data_config(str(corpus.folder), storage if is_finished else tmp_path, **settings))
    assert not list(tmp_path.glob("tokens/*/manifest.json"))


def as_a_stage(config: Any, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs `raymill tokenize` as a job of the running cluster."""
    write_config(config, folder / "run.yaml")
    address = ray.get_runtime_context().gcs_address
    return subprocess.run(
        [sys.executable, "-m", "jobs.tokenize_corpus", str(folder / "run.yaml")],
        env=os.environ
        | {"RAY_ADDRESS": address, "PYTHONPATH": str(REPOSITORY), "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=limit_s(60),
        check=False,
    )


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"a.txt": b"", "b.txt": b" \n"},
            "the corpus is empty: 2 files, 2 documents dropped (2 empty); check data.source",
        ),
        pytest.param(
            {"good.txt": b"a good text", "b\n\xff.txt.gz": gzip.compress(b"text" * 999)[:-5]},
            "b\\n\\udcff.txt.gz cannot be read to its end (Truncated compressed stream); replace the file",
            marks=pytest.mark.more,
        ),
    ],
    ids=["all-blank", "truncated"],
)
def test_a_stage_ends_with_one_line_and_says_that_another_attempt_is_hopeless(
    ray_workers: int, files: dict[str, bytes], expected: str, tmp_path: Path
) -> None:
    corpus = HostileCorpus(tmp_path / "texts")
    corpus.folder.mkdir()
    for name, content in files.items():
        corpus.add(name.encode("latin-1"), content)
    done = as_a_stage(data_config(str(corpus.folder), tmp_path / "storage"), tmp_path)
    assert (done.returncode, done.stdout) == (HOPELESS, "")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and expected in errors[0], done.stderr
    assert "Traceback" not in done.stderr


def test_an_empty_corpus_is_named_before_a_gpu_is_asked_for(
    ray_workers: int, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    config = data_config(f"{tmp_path}/a.txt", tmp_path / "storage")
    # There is none: to wait for it would take forever
    scaling = config.scaling.model_copy(update={"use_gpu": True})
    with pytest.raises(
        UserError, match=r"the corpus is empty: 1 file, 1 document dropped \(1 empty\)"
    ):
        pretrain(config.model_copy(update={"scaling": scaling}))


def kill_worker(chunk: Chunk) -> bytes:
    if chunk.parts[0].file.uri == "poison.parquet":
        os.abort()  # as Arrow does for some damaged footers
    return b"done"


def test_a_file_that_kills_its_reader_stops_the_job_by_name(
    ray_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_tasks, "_MAX_RETRIES", 1)
    files = [
        CorpusFile(n, name, 0, 1, "v", "parquet")
        for n, name in enumerate(("a.txt", "poison.parquet", "b.txt"))
    ]
    with pytest.raises(
        UserError, match=r"a worker died each time at one of \d files, .*poison\.parquet.* first; "
    ):
        for result in run_tasks(
            [Chunk(file.number, 0, [whole_file(file)]) for file in files], kill_worker
        ):
            assert result.content == b"done"


def changed_tokenizer(
    result: dict[str, Any], folder: Path, change: Callable[[dict[str, Any]], Any]
) -> str:
    content = json.loads(Path(result["manifest"]).with_name("tokenizer.json").read_bytes())
    change(content)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder / "tokenizer.json")


def spread_ids(content: dict[str, Any]) -> None:
    """Makes the ids of merged tokens and of the end of text larger than 16 bits."""
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {
        token: number if number < 256 else number + 70_000 for token, number in vocab.items()
    }
    content["added_tokens"][0]["id"] += 70_000
    content["model"]["vocab"]["<|endoftext|>"] = content["added_tokens"][0]["id"]


@pytest.mark.more
def test_ids_beyond_16_bits_are_stored_in_32(
    result: dict[str, Any], corpus: HostileCorpus, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    uri = changed_tokenizer(result, tmp_path / "tokenizer", spread_ids)
    wide = tokenize(data_config(str(corpus.folder), tmp_path, tokenizer=uri, **SETTINGS))
    assert manifest_of(wide).vocab_size > 1 << 16
    assert wide["tokens"] == result["tokens"]
    assert texts_of(wide) == texts_of(result)
    for shard in manifest_of(wide).shards:
        assert Path(wide["manifest"]).with_name(shard.file).stat().st_size == 4 * shard.tokens
    assert "encoding with `tokenizers`" not in capfd.readouterr().err


def test_a_tokenizer_that_tiktoken_cannot_express_gives_its_own_ids_slowly(
    result: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def add_token(content: dict[str, Any]) -> None:
        added = content["added_tokens"][0]
        content["added_tokens"].append(
            added | {"id": added["id"] + 1, "content": "hostile", "special": False}
        )

    text = "a hostile text, hostilely written"
    (tmp_path / "a.txt").write_text(text)
    uri = changed_tokenizer(result, tmp_path / "tokenizer", add_token)
    slow = tokenize(data_config(f"{tmp_path}/a.txt", tmp_path, tokenizer=uri))
    said = capfd.readouterr().err
    assert (
        "encoding with `tokenizers`, about eight times slower than with tiktoken's core: it has added tokens"
        in said
    )
    tokenizer = Tokenizer.from_json(Path(uri).read_bytes())
    ids = np.frombuffer(
        Path(slow["manifest"]).with_name("shard-00000.bin").read_bytes(), "<u2"
    ).tolist()
    assert ids == [*tokenizer.encode(text), tokenizer.eot_id]
    assert tokenizer.eot_id + 1 in ids


def test_a_spoiled_store_is_refused_as_a_source(
    result: dict[str, Any], corpus: HostileCorpus, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(Path(result["manifest"]).parent, copy)
    config = data_config([f"tokens://{copy}"], tmp_path / "storage")
    name = next(iter(result["shards"]))
    (copy / name).unlink()
    with pytest.raises(
        TokenStoreError,
        match=f"{copy}/{name} is missing, the manifest says .* bytes; tokenize again",
    ):
        tokenize(config)
    manifest = json.loads((copy / "manifest.json").read_bytes())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(
        TokenStoreError, match="the token store has format 99, not 2; tokenize again"
    ):
        tokenize(config)
    (copy / "manifest.json").write_text(
        json.dumps(manifest | {"shards": [{"file": "../../etc/passwd"}]})
    )
    with pytest.raises(TokenStoreError, match=r"manifest\.json is damaged .*; tokenize again"):
        tokenize(config)
    assert not list((tmp_path / "storage").glob("tokens/*/manifest.json"))

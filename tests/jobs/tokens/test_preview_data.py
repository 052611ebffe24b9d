"""The preview: estimates that the job then confirms, without a cluster; and `raymill data` at the
command line."""

import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from tokenizers import processors

from cluster.cli import main
from jobs.corpus.listing import CorpusError
from jobs.tokens import preview_data
from jobs.tokens.build_store import tokenize
from jobs.tokens.inspect_store import find_store, stats
from jobs.tokens.preview_data import preview
from model.text.tokenizer import train_bpe
from tests.jobs.corpora import data_config, make_corpus
from tests.time_limits import limit_s

pytestmark = pytest.mark.more


def test_a_small_corpus_is_previewed_whole(
    ray_workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And its figures are the job's own: by the same tokenizer, and with the same one of two
    documents that are alike."""
    corpus = make_corpus(tmp_path / "texts", num_documents=80)
    (corpus / "f.jsonl").write_text(json.dumps({"text": "A TEXT IN CAPITAL LETTERS " * 20}))
    (corpus / "g.txt").write_text("a text in capital letters " * 20)
    config = data_config(str(corpus), tmp_path / "storage")
    seen = preview(config)
    done = tokenize(config)
    assert not seen["is_estimate"]
    assert (
        seen["replaced_utf8"]
        == stats(find_store(None, str(tmp_path / "storage")))["replaced_utf8"]
        == 1
    )
    assert seen["documents"] == done["documents"]
    assert seen["dropped"] == {reason: count for reason, count in done["dropped"].items() if count}
    assert seen["tokens"] == done["tokens"]
    stage, made = seen["stage"], Path(done["manifest"]).parent
    assert stage["store_bytes"] == pytest.approx(
        sum(path.stat().st_size for path in made.glob("*.bin")), rel=0.05
    )
    assert stage["chunks"] == pytest.approx(len(list(made.glob("shard-*.bin"))), rel=0.5)
    assert 0 < stage["worker_seconds"] < limit_s(60)
    assert 2**28 < stage["worker_memory_bytes"] < 2**30
    assert seen["drop_samples"]["invalid_json"] == [
        {"file": f"{tmp_path}/texts/a.jsonl", "preview": "{broken"}
    ]
    assert seen["examples"][0]["file"] == f"{tmp_path}/texts/a.jsonl"
    assert (seen["skipped_files"], seen["skipped_bytes"]) == (
        {".md": 1},
        {".md": len("no corpus file")},
    )
    said = capsys.readouterr().err
    assert "skipped 1 file of unknown ending, such as" in said
    assert "WARNING" not in said


@pytest.mark.parametrize("settings", [{"near_dedup_threshold": 0.8}, {"decontaminate_ngram": 13}])
def test_what_the_job_may_drop_besides_makes_it_an_estimate(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    config = data_config(
        str(make_corpus(tmp_path / "texts", num_documents=30)), tmp_path / "storage", **settings
    )
    assert preview(config)["is_estimate"]


def test_the_tokens_that_begin_and_end_a_document_are_counted(
    ray_workers: int, tmp_path: Path
) -> None:
    """Of a tokenizer that begins each text with a token of its own."""
    corpus = make_corpus(tmp_path / "texts", num_documents=30)
    started = tokenizers.Tokenizer.from_str(
        train_bpe(["some words " * 9], vocab_size=300).to_json().decode()
    )
    start = "<|endoftext|>"
    started.post_processor = processors.TemplateProcessing(
        single=f"{start} $A",
        pair=f"{start} $A $B",
        special_tokens=[(start, started.token_to_id(start))],
    )
    (tmp_path / "tokenizer.json").write_text(started.to_str())
    config = data_config(
        str(corpus), tmp_path / "storage", tokenizer=str(tmp_path / "tokenizer.json")
    )
    assert preview(config)["tokens"] == tokenize(config)["tokens"]


def test_a_corpus_of_other_endings_is_warned_of_and_read_when_they_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("a text " * 10)
    (tmp_path / "texts/b.md").write_text("a page " * 1000)
    seen = preview(data_config(f"{tmp_path}/texts", tmp_path / "storage"))
    said = capsys.readouterr().err
    assert "WARNING: most of the corpus is left out: 7,000 of 7,070 bytes" in said
    assert "`--data.text-endings .md` reads them" in said
    named = preview(data_config(f"{tmp_path}/texts", tmp_path / "storage", text_endings=[".md"]))
    assert (seen["documents"], named["documents"], named["source_bytes"]) == (1, 2, 7070)
    assert capsys.readouterr().err == ""


def test_a_large_corpus_is_estimated_from_places_all_over_it(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioustrnlm", k=rng.randint(2, 9))) for _ in range(3000)]
    num_documents = 30_000
    with (tmp_path / "a.jsonl").open("w") as file:
        for number in range(num_documents):
            text = " ".join(rng.choices(words, k=200)) if number % 5 else ""
            file.write(json.dumps({"text": text}) + "\n")
    seen = preview(data_config(f"{tmp_path}/a.jsonl", tmp_path / "storage"))
    assert seen["is_estimate"]
    assert seen["documents"] == pytest.approx(0.8 * num_documents, rel=0.05)
    assert seen["drop_rate"] == pytest.approx(0.2, abs=0.02)


def write_alike(folder: Path, texts: list[str], kind: str) -> None:
    """Writes the texts in one file, with a note beside each where a kind has fields."""
    folder.mkdir(parents=True)
    notes = [f"{number} {'note ' * 60}" for number in range(len(texts))]
    lines = "\n".join(
        json.dumps({"id": note, "text": text}) for note, text in zip(notes, texts, strict=True)
    )
    match kind:
        case "jsonl":
            (folder / "a.jsonl").write_text(lines)
        case "jsonl.gz":
            (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        case "txt.zst":
            for number in range(0, len(texts), 500):
                content = pa.compress(
                    "\n".join(texts[number:][:500]).encode(), codec="zstd", asbytes=True
                )
                (folder / f"{number}.txt.zst").write_bytes(content)
        case "csv":
            with (folder / "a.csv").open("w", newline="") as file:
                csv.writer(file).writerows([("text", "id"), *zip(texts, notes, strict=True)])
        case "parquet":
            pq.write_table(
                pa.table({"text": texts, "id": notes}), folder / "a.parquet", row_group_size=3000
            )


KINDS = ("jsonl", "jsonl.gz", "txt.zst", "csv", "parquet")


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS], ids="-".join)
def test_each_kind_of_file_is_estimated_by_its_own_bytes(
    kinds: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview_data, "_SAMPLE_BYTES", 1 << 19)
    monkeypatch.setattr(preview_data, "_FRONT_BYTES", 512 << 10)
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioustrnlm", k=rng.randint(2, 9))) for _ in range(3000)]
    text_bytes = 0
    for kind in kinds:
        texts = [" ".join(rng.choices(words, k=rng.randint(10, 90))) for _ in range(10_000)]
        text_bytes += sum(map(len, texts))
        write_alike(tmp_path / "texts" / kind, texts, kind)
    seen = preview(data_config(f"{tmp_path}/texts/**", tmp_path / "storage"))
    num_documents = sum(20 if kind == "txt.zst" else 10_000 for kind in kinds)
    assert seen["is_estimate"]
    assert seen["documents"] == pytest.approx(num_documents, rel=0.1)
    assert seen["tokens"] * seen["bytes_per_token"] == pytest.approx(text_bytes, rel=0.1)


def test_nothing_to_keep_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\0\1")
    with pytest.raises(
        CorpusError, match=r"the corpus is empty: 1 file, 1 document dropped \(1 binary\)"
    ):
        preview(data_config(f"{tmp_path}/a.txt", tmp_path / "storage"))


def test_the_commands(ray_workers: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    corpus = make_corpus(tmp_path / "texts", num_documents=60)
    flags = ["--storage.uri", str(tmp_path / "storage")]
    assert main(["data", "preview", "--data.source", str(corpus), *flags, "--json"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["documents"] == 61
    result = tokenize(data_config(str(corpus), tmp_path / "storage"))
    found = {}
    for command in ("stats", "report", "verify"):
        assert main(["data", command, *flags, "--json"]) == 0
        found[command] = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert [source["source"] for source in found["stats"]["sources"]] == [str(corpus)]
    assert found["report"]["dropped"]
    assert found["verify"]["valid"]
    assert main(["data", "report", *flags]) == 0
    assert "{broken" in capfd.readouterr().out
    shard = Path(result["manifest"]).parent / "shard-00000.bin"
    shard.write_bytes(bytes(shard.stat().st_size))
    assert main(["data", "verify", *flags]) == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "shard-00000.bin has SHA-256" in errors[0]
    assert main(["data", "preview", "--data.source", f"{tmp_path}/nowhere", *flags]) == 2
    assert main(["data", "stats", "nothing-here", *flags]) == 1


def test_a_hostile_corpus_drives_no_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Sets the clipboard, clears the screen, turns the line around
    escape = "\x1b]52;c;eHg=\x07 \x9b2J \u202etxet\r"
    rows = [
        f"{{{escape}",
        json.dumps({"text": f"kept {escape}"}),
        json.dumps({"text": "kept äöü 漢字\u3000"}),
    ]
    (tmp_path / f"{escape[:4]}.jsonl").write_text("\n".join(rows), newline="")
    assert main(["data", "preview", "--data.source", str(tmp_path)]) == 0
    (tmp_path / "a.csv").write_text(f"{escape}\n")
    assert main(["data", "preview", "--data.source", f"{tmp_path}/a.csv"]) == 1
    out, err = capfd.readouterr()
    assert r"{\x1b]52;c;eHg=\x07 \x9b2J \u202etxet" in out
    assert "kept äöü 漢字" in out
    assert r"has no column 'text'; set data.text_field to one of \x1b]52" in err
    assert {char for char in out + err if not char.isprintable()} <= {"\n", "\u3000"}

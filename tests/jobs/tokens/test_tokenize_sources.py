"""Sources and cleaning through the whole stage: large archives and csv, mixtures, ready shards, the
dropping rules."""

import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import zstandard

from cluster.storage.uris import open_storage
from jobs.corpus.listing import CorpusError
from jobs.tokens.build_store import tokenize
from jobs.tokens.inspect_store import find_store, report, stats, verify
from jobs.tokens.token_store import TokenStoreError
from tests.jobs.corpora import data_config, manifest_of, texts_of

RNG = random.Random(1)
WORDS = ["".join(RNG.choices("aeioustrnlm", k=RNG.randint(2, 9))) for _ in range(3000)]


def made_up(num_words: int) -> str:
    return " ".join(RNG.choices(WORDS, k=num_words))


TEXTS = [
    f'{made_up(RNG.randint(20, 200))}, "quoted"\nsecond line {number}' for number in range(400)
]


def write(path: Path, texts: list[str]) -> None:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(
                [["number", "text"], *([n, text] for n, text in enumerate(texts))]
            )
        return
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    packers = {".gz": gzip.compress, ".zst": zstandard.compress}
    path.write_bytes(packers.get(path.suffix, bytes)(lines))


@pytest.mark.more
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv"])
def test_a_large_file_is_shared_by_all_workers(ray_workers: int, tmp_path: Path, name: str) -> None:
    write(tmp_path / name, TEXTS)
    result = tokenize(
        data_config(
            f"{tmp_path}/{name}", tmp_path / "storage", val_fraction=0.0, shard_bytes=20_000
        )
    )
    assert texts_of(result) == TEXTS
    assert len(result["shards"]) > 5
    assert not open_storage(str(Path(result["manifest"]).parent)).list("unpacked/")


def test_one_long_text_is_cut_and_shared(ray_workers: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    settings = {"val_fraction": 0.0, "max_document_bytes": 20_000, "dedup": False}
    result = tokenize(data_config(f"{tmp_path}/a.txt", tmp_path / "storage", **settings))
    assert "".join(texts_of(result)) == "\n".join(TEXTS)
    assert result["documents"] > 5


def test_sources_keep_their_shards_apart_for_their_weights(
    ray_workers: int, tmp_path: Path
) -> None:
    write(tmp_path / "a.jsonl", TEXTS[:100])
    write(tmp_path / "b.csv", TEXTS[100:])
    sources = [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.csv"]
    result = tokenize(data_config(sources, tmp_path / "storage", weights=[3, 1]))
    manifest = manifest_of(result)
    assert manifest.weights == (0.75, 0.25)
    by_source = [
        sum(s.documents for s in manifest.shards if s.source == source) for source in (0, 1)
    ]
    assert by_source == [100, 300]
    with pytest.raises(ValueError, match="3 weights for 2 sources"):
        tokenize(data_config(sources, tmp_path / "storage", weights=[1, 2, 3]))


@pytest.mark.more
def test_ready_shards_are_a_source(ray_workers: int, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", TEXTS[:150])
    write(tmp_path / "b.jsonl", TEXTS[150:])
    ready = tokenize(data_config(f"{tmp_path}/a.jsonl", tmp_path / "one", shard_bytes=10_000))
    folder = Path(ready["manifest"]).parent
    mixed = tokenize(
        data_config([f"{tmp_path}/b.jsonl", f"tokens://{folder}"], tmp_path / "two", weights=[1, 1])
    )
    assert sorted(texts_of(mixed)) == sorted(TEXTS)
    assert set(ready["shards"].values()) < set(mixed["shards"].values())
    alone = tokenize(data_config(f"tokens://{folder}", tmp_path / "three"))
    assert sorted(alone["shards"].values()) == sorted(ready["shards"].values())

    other = tokenize(data_config(f"{tmp_path}/b.jsonl", tmp_path / "four", vocab_size=300))
    settings = {"tokenizer": str(Path(other["manifest"]).parent)}
    with pytest.raises(CorpusError, match="was made with another tokenizer"):
        tokenize(
            data_config(
                [f"{tmp_path}/b.jsonl", f"tokens://{folder}"], tmp_path / "five", **settings
            )
        )
    shard = folder / next(iter(ready["shards"]))
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(TokenStoreError, match="has other bytes than its manifest says"):
        tokenize(data_config(f"tokens://{folder}", tmp_path / "six"))


@pytest.mark.more
def test_near_duplicates_contamination_and_quality_have_counts_and_samples(
    ray_workers: int, tmp_path: Path
) -> None:
    long = [made_up(300) for _ in range(120)]
    near = [f"{text[:-20]} {made_up(3)}" for text in long[:15]]
    short = [made_up(10) for _ in range(7)]
    write(tmp_path / "a.jsonl", [*long, *near, *short, *(text.upper() for text in long[:4])])
    settings = {
        "near_dedup_threshold": 0.8,
        "quality_rules": ["word_count"],
        "decontaminate_ngram": 13,
    }
    result = tokenize(data_config(f"{tmp_path}/a.jsonl", tmp_path / "storage", **settings))
    dropped = {reason: count for reason, count in result["dropped"].items() if count}
    assert dropped == {"word_count": 7, "duplicate": 4, "near_duplicate": 15}
    assert result["documents"] == 120

    # A training document quotes a validation document: only the quoting one goes.
    manifest = manifest_of(result)
    num_val = sum(shard.documents for shard in manifest.shards if shard.split == "val")
    validation = texts_of(result)[-num_val:]
    quoting = [
        f"{made_up(200)} {' '.join(text.split()[40:60])} {made_up(200)}" for text in validation
    ]
    write(tmp_path / "b.jsonl", quoting)
    settings |= {"quality_rules": [], "near_dedup_threshold": None}
    both = tokenize(
        data_config(
            [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"], tmp_path / "storage", **settings
        )
    )
    found = report(find_store(both["manifest"], "unused"))["dropped"]["contaminated"]
    # Some quoting ones validate; near-duplicates count too
    assert 0.6 * num_val <= found["count"] <= num_val + 15
    assert len(found["samples"]) == 5
    assert all(
        sample["file"].endswith(".jsonl") and sample["preview"] for sample in found["samples"]
    )


@pytest.mark.more
def test_stats_and_verify_of_a_store(ray_workers: int, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [*TEXTS, TEXTS[0]])
    result = tokenize(data_config(f"{tmp_path}/a.jsonl", tmp_path / "storage"))
    store = find_store(None, str(tmp_path / "storage"))
    figures = stats(store)
    assert (figures["documents"], figures["tokens"], figures["bytes"]) == (
        400,
        result["tokens"],
        result["bytes"],
    )
    assert figures["dropped"] == {"duplicate": 1}
    assert verify(store) == {
        "valid": True,
        "manifest_hash": result["manifest_hash"],
        "shards": len(result["shards"]),
        "document_tables": len(result["shards"]),
    }
    name = next(iter(result["shards"]))
    path = Path(result["manifest"]).parent / name
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        TokenStoreError, match=f"1 of {len(result['shards'])} shards of .* are altered: {name} has"
    ):
        verify(store)
    path.unlink()
    assert tokenize(data_config(f"{tmp_path}/a.jsonl", tmp_path / "storage")) == result
    assert verify(store)["valid"]
    with pytest.raises(TokenStoreError, match="name a token store"):
        find_store(None, str(tmp_path / "nowhere"))


def test_an_ending_that_is_named_adds_its_files_and_changes_no_other_store(
    ray_workers: int, tmp_path: Path
) -> None:
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts/a.jsonl", TEXTS[:50])
    (tmp_path / "texts/b.md").write_text("a page")

    def made(*endings: str) -> dict[str, Any]:
        settings = {"val_fraction": 0.0, "text_endings": list(endings)}
        return tokenize(data_config(f"{tmp_path}/texts", tmp_path / "storage", **settings))

    usual, named = made(), made(".md")
    assert made(".rst") == usual, "there are no such files"
    assert named["manifest"] != usual["manifest"]
    assert (texts_of(usual), texts_of(named)) == (TEXTS[:50], [*TEXTS[:50], "a page"])

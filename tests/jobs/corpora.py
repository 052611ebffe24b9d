"""A small corpus with one of everything, the settings to tokenize it in many shards, and what the
shards hold."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.settings.run import RunConfig
from cluster.storage.uris import split_uri
from jobs.tokens.token_store import TOKENIZER, Manifest, read_manifest, token_dtype
from model.text.tokenizer import Tokenizer


def data_config(source: Any, storage: Path | str, **settings: Any) -> RunConfig:
    """Returns settings with small shards and a small vocabulary."""
    defaults = {
        "vocab_size": 400,
        "shard_bytes": 30_000,
        "val_fraction": 0.2,
        "tokenizer_sample_bytes": 100_000,
    }
    data = {"source": source} | defaults | settings
    return RunConfig.model_validate({"data": data, "storage": {"uri": str(storage)}})


def number_texts(folder: Path, *, num_texts: int = 12, num_words: int = 1500) -> Path:
    """Makes a folder of texts, each of numbers in a different order: quickly made, tokenized and
    learned from."""
    folder.mkdir()
    for number in range(num_texts):
        words = " ".join(str((number * 7919 + i * i) % 997) for i in range(num_words))
        (folder / f"{number:02d}.txt").write_text(words)
    return folder


def make_corpus(folder: Path, *, num_documents: int = 600) -> Path:
    """Documents of made-up words in all the endings, some of them duplicates or unusable."""
    rng = random.Random(0)
    words = ["".join(rng.choices("aeiourstlnm", k=rng.randint(2, 9))) for _ in range(800)]
    texts = [
        " ".join(rng.choices(words, k=rng.randint(5, 400))) + ".\n" for _ in range(num_documents)
    ]
    third = (num_documents - 20) // 3
    folder.mkdir(parents=True)
    lines = [json.dumps({"text": text}) for text in texts[:third]]
    (folder / "a.jsonl").write_text(
        "\n".join([*lines, "{broken", '{"text": null}', lines[0], lines[-1]]) + "\n"
    )
    lines = [json.dumps({"text": text}) for text in texts[third : 2 * third]]
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    pq.write_table(
        pa.table({"text": texts[2 * third : 3 * third]}), folder / "c.parquet", row_group_size=50
    )
    for number, text in enumerate(texts[3 * third :]):
        (folder / f"d{number:04d}.txt").write_text(text)
    (folder / "e-binary.txt").write_bytes(b"\x89PNG\x00\x01")
    (folder / "e-empty.txt").write_bytes(b"")
    (folder / "e-latin1.txt").write_bytes("Ein Stück Text".encode("latin-1"))
    (folder / "readme.md").write_text("no corpus file")
    return folder


def manifest_of(result: dict[str, Any]) -> Manifest:
    return read_manifest(split_uri(result["manifest"])[0])


def texts_of(result: dict[str, Any]) -> list[str]:
    """Returns the texts of the stored documents, training split first."""
    store, _ = split_uri(result["manifest"])
    manifest, tokenizer = read_manifest(store), Tokenizer.from_json(store.read_bytes(TOKENIZER))
    texts = []
    for shard in sorted(manifest.shards, key=lambda shard: (shard.split, shard.file)):
        ids = np.frombuffer(store.read_bytes(shard.file), token_dtype(manifest.vocab_size))
        ends = np.flatnonzero(ids == manifest.eot_id)
        texts += [tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, ends[:-1] + 1)]
    return texts

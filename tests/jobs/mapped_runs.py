"""A tiny run, trained for real on a corpus that was tokenized for real, with its document map."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.settings.run import RunConfig, to_yaml
from cluster.storage.uris import split_uri
from jobs.run.run_plan import RunPlan
from jobs.tokens.build_store import tokenize
from jobs.tokens.token_store import TOKENIZER
from model.text.tokenizer import Tokenizer
from tests.jobs.cleaning.in_process import tokenize_in_process
from tests.jobs.runs import make_text

SEQ_LEN = 16


def write_corpus(folder: Path, *, num_documents: int = 24) -> Path:
    """Writes two sources: lines with two that are dropped, and a few texts."""
    texts = [f"{number} {make_text(3 + number, seed=number)}" for number in range(num_documents)]
    (folder / "web").mkdir(parents=True)
    (folder / "books").mkdir()
    lines = [json.dumps({"text": text}) for text in texts]
    lines.insert(2, "{broken")
    lines.insert(5, lines[1])
    (folder / "web" / "a.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "web" / "empty.jsonl").write_text("\n")
    for number in range(3):
        (folder / "books" / f"{number}.txt").write_text(make_text(60, seed=100 + number))
    return folder


def write_conversations(file: Path, *, num_conversations: int = 20) -> Path:
    """Writes conversations with questions longer than a row and answers of some words."""
    lines = []
    for number in range(num_conversations):
        asked, answered = make_text(25, seed=number), make_text(3, seed=100 + number)
        lines.append(json.dumps({"prompt": asked, "completion": answered}) + "\n")
    file.parent.mkdir(parents=True)
    file.write_text("".join(lines))
    return file


def mapped_plan(
    folder: Path, *, train: dict[str, Any] | None = None, data: dict[str, Any] | None = None
) -> RunPlan:
    """Tokenizes the texts that `data` names, or else a corpus in the folder, and returns the plan of
    a run on them, with a batch that grows and several epochs."""
    if data is None:
        corpus = write_corpus(folder / "texts")
        data = {"source": [str(corpus / "web"), str(corpus / "books")], "weights": [2, 1]}
    settings = {
        "max_tokens": 10_000,
        "global_batch_size": 6,
        "micro_batch_size": 2,
        "batch_ramp_start": 2,
        "batch_ramp_tokens": 400,
        "seq_len": SEQ_LEN,
        "learning_rate": 1e-2,
        "precision": "fp32",
        "eval_every_steps": 100,
        "shuffle_window_rows": 11,
    }
    values: dict[str, Any] = {
        "run_id": "tiny",
        "data": {"vocab_size": 300, "val_fraction": 0.15, "shard_bytes": 600} | data,
        "train": settings | (train or {}),
        "checkpoint": {"save_every_steps": 3, "num_to_keep": 100},
        "scaling": {"max_workers": 1},
        "storage": {"uri": str(folder / "storage")},
    }
    config = RunConfig.model_validate(values)
    with pytest.MonkeyPatch.context() as patch:
        tokenize_in_process(patch)
        result = tokenize(config)
    store, _ = split_uri(result["manifest"])
    content = store.read_bytes(TOKENIZER)
    vocab_size = Tokenizer.from_json(content).vocab_size
    values["model"] = {"preset": "tiny", "n_positions": 48, "vocab_size": vocab_size}
    plan = RunPlan(RunConfig.model_validate(values), store.uri, content, code_version="test")
    plan.run.write_bytes("config.yaml", to_yaml(plan.config).encode())
    return plan

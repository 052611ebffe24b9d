"""Tiny runs, trained for real on a corpus of which some documents quote a passage."""

import json
from pathlib import Path
from typing import Any

from jobs.run.run_plan import RunPlan
from tests.jobs.mapped_runs import mapped_plan
from tests.jobs.runs import make_text

PASSAGE = "жил старик со своею старухой у самого синего моря"
"""No token of it stands anywhere else in the corpus."""


def planted_texts() -> list[str]:
    """Returns documents of which three quote the passage."""
    texts = []
    for number in range(40):
        words = make_text(20, seed=number).strip()
        quoted = f"{words} {PASSAGE} {words}" if number in (7, 21, 30) else words
        texts.append(f"{number} {quoted}")
    return texts


def planted_plan(
    folder: Path, texts: list[str], *, train: dict[str, Any], shard_bytes: int = 600
) -> RunPlan:
    """Returns the plan of a run on one file of these texts."""
    corpus = folder / "texts" / "a.jsonl"
    corpus.parent.mkdir()
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = {"source": [str(corpus)], "shard_bytes": shard_bytes}
    return mapped_plan(folder, train=train, data=data)

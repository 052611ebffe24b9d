"""Tiny runs, trained for real on a corpus of which some documents quote a passage, with the trace
index of their stores."""

import json
from pathlib import Path
from typing import Any

from cluster.storage.uris import open_storage
from jobs.run.run_plan import RunPlan
from jobs.trace.build_index import index_store
from tests.jobs.cleaning.in_process import InProcess
from tests.jobs.mapped_runs import mapped_plan
from tests.jobs.poisoned_runs import Faults, run_world
from tests.jobs.runs import make_text

PASSAGE = "жил старик со своею старухой у самого синего моря"
"""No token of it stands anywhere else in the corpus."""

SKIPPED, ROLLED_BACK = 2, (4, 8)
"""Steps of `disturbed_run`."""

BEGUN = "An old man lived"
LEARNED = f"{BEGUN} by the <b>blue</b> sea & fished"
"""What a page must not take for HTML."""


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


def disturbed_run(folder: Path) -> RunPlan:
    """Trains a run that skips a step and rolls others back, and indexes its store."""
    train = {"max_skipped_steps": 1, "max_tokens": 12_000}
    plan = planted_plan(folder, planted_texts(), train=train)
    run_world(plan, Faults(poisoned=frozenset({(SKIPPED, 0), (7, 0), (8, 0)})))
    index_store(open_storage(plan.tokens_uri), run=InProcess())
    return plan


def learned_by_heart(folder: Path) -> RunPlan:
    """Trains a run until its model continues `BEGUN` as `LEARNED` does, and indexes its store."""
    texts = []
    for number in range(10):
        words = make_text(6, seed=number).strip()
        texts.append(f"{number} {words} {LEARNED} {words}" if number % 2 else f"{number} {words}")
    train = {"max_tokens": 60_000, "seq_len": 40, "eval_every_steps": 1000}
    plan = planted_plan(folder, texts, train=train)
    run_world(plan)
    index_store(open_storage(plan.tokens_uri), run=InProcess())
    return plan

"""Runs that forget, and the same trained from the beginning."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cluster.settings.run import to_yaml
from cluster.storage.uris import open_storage
from jobs.forgetting.forget_plan import ForgetRequest, Forgetting, forgetting
from jobs.forgetting.fork_run import fork
from jobs.run.base import BASE_FILE
from jobs.run.history import recorded_config
from jobs.run.run_plan import RunPlan
from jobs.tokens.holes import Holes
from jobs.tokens.token_store import read_manifest
from tests.jobs.poisoned_runs import Faults, run_world


@dataclass(frozen=True)
class Forgotten:
    """A run that is laid out to forget, and its former one."""

    asked: Forgetting
    start: str | None  # the checkpoint that it goes on from
    former: RunPlan
    plan: RunPlan

    def trained(self, *, world_size: int = 1, dies_at: int | None = None) -> RunPlan:
        """Takes the steps again; with `dies_at` its workers are killed there first."""
        if dies_at:
            run_world(self.plan, Faults(dies_at=dies_at), world_size=world_size)
        run_world(self.plan, world_size=world_size)
        return self.plan

    def from_the_beginning(self, run_id: str = "whole") -> RunPlan:
        """Trains a run with the same holes from its first step."""
        plan = replace(self.plan, config=self.plan.config.model_copy(update={"run_id": run_id}))
        base = self.former.run.find_bytes(BASE_FILE)
        if base is not None:
            plan.run.write_bytes(BASE_FILE, base)
        plan.run.write_bytes("config.yaml", to_yaml(plan.config).encode())
        run_world(plan)
        return plan


def laid_out(plan: RunPlan, *documents: str, pattern: str | None = None) -> Forgotten:
    """Lays out a run that forgets what another one has learned."""
    asked = forgetting(plan.run, ForgetRequest(documents, pattern=pattern), price=None)
    start = fork(asked)
    config = recorded_config(asked.new)
    return Forgotten(asked, start, plan, replace(plan, config=config, holes=asked.holes))


def never_seen(plan: RunPlan, holes: Holes, folder: Path, *, seed: int = 0) -> RunPlan:
    """Returns the plan of the run in a copy of its storage in which the holes hold other tokens: no
    byte of the documents is there."""
    shutil.copytree(plan.config.storage.uri, folder, ignore=shutil.ignore_patterns("runs"))
    tokens_uri = plan.tokens_uri.replace(plan.config.storage.uri, str(folder))
    store = open_storage(tokens_uri)
    manifest = read_manifest(store)
    rng = np.random.default_rng(seed)
    for hole in holes.holes:
        content = np.frombuffer(store.read_bytes(hole.shard), manifest.dtype).copy()
        content[hole.start : hole.end] = rng.integers(0, manifest.vocab_size, hole.tokens)
        store.write_bytes(hole.shard, content.tobytes())
    storage = plan.config.storage.model_copy(update={"uri": str(folder)})
    config = plan.config.model_copy(update={"storage": storage, "run_id": "never-seen"})
    copy = replace(plan, config=config, tokens_uri=tokens_uri)
    copy.run.write_bytes("config.yaml", to_yaml(config).encode())
    return copy


def some_documents(plan: RunPlan, seed: int, *, num_documents: int) -> Sequence[str]:
    """Returns references to documents that the run has learned, drawn at random."""
    from jobs.forgetting.asked_documents import _why_not_forgotten
    from jobs.proof.opened_run import OpenedRun
    from jobs.proof.recorded.certificate import first_step_reading
    from jobs.proof.where_run import with_documents

    opened = with_documents(OpenedRun.open(plan.run))
    learned: list[str] = []
    for table in opened.mapped.tables:
        documents = opened.mapped.documents_of(table.shard)
        assert documents is not None
        for number in range(len(documents)):
            document = documents.document(number)
            place = (document.shard, document.start, document.end)
            step = first_step_reading(opened.learning, *place)
            if not _why_not_forgotten(opened.learning, document, step):
                learned.append(f"{opened.mapped.files[document.file][0]}:{document.place}")
    drawn = np.random.default_rng(seed).choice(len(learned), num_documents, replace=False)
    return [learned[number] for number in drawn.tolist()]

"""Tokenizing beside training: who gets the CPUs, and that its failure ends the training with its own words."""

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
from ray.data import DataContext

from cluster.settings.run import RunConfig, ScalingConfig
from cluster.storage.uris import open_storage
from jobs.run.ledger import Ledger
from jobs.run.run_plan import TOKENIZING_FAILED, RunPlan
from jobs.tokens.token_store import MANIFEST, SEALED, Manifest, TokenStoreError
from jobs.training import background_tokenizing
from jobs.training.background_tokenizing import free_cpus, tokenizing, wait_for_first_rows
from jobs.training.train_loop import train
from model.checkpoint_folder import read_metadata
from model.errors import UserError
from tests.jobs.runs import newest_checkpoint, trained_run
from tests.time_limits import limit_s


@pytest.fixture
def growing(tmp_path: Path) -> RunPlan:
    """The plan of a run that has trained nothing yet; of its store all is sealed but it is not finished."""
    made = trained_run(str(tmp_path))
    store = open_storage(made.tokens_uri)
    manifest = Manifest.from_json(store.read_bytes(MANIFEST))
    store.delete(MANIFEST)
    store.write_bytes(SEALED, dataclasses.replace(manifest, complete=False).to_json())
    train_settings = made.config.train.model_copy(update={"shuffle_window_rows": 8, "eval_max_tokens": 300})
    config = made.config.model_copy(update={"run_id": "growing", "train": train_settings})
    return RunPlan(config, made.tokens_uri, made.tokenizer_json, "test", growing=True)


def test_training_keeps_its_cpus() -> None:
    assert free_cpus(ScalingConfig(max_workers=3, threads_per_worker=2), 8.0) == 2.0
    assert free_cpus(ScalingConfig(max_workers=3, threads_per_worker=2), 6.0) == 1.0


def test_a_failure_ends_the_training_with_its_own_error(
    growing: RunPlan, ray_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = threading.Event()
    limits: list[Any] = []

    def tokenize(config: RunConfig) -> dict[str, Any]:
        limits.append(DataContext.get_current().execution_options.resource_limits.cpu)
        assert started.wait(limit_s(10))
        raise UserError("the corpus changed while it was tokenized")

    monkeypatch.setattr(background_tokenizing, "tokenize", tokenize)
    growing.run.write_bytes(TOKENIZING_FAILED, b"of the attempt before")
    config = growing.config.model_copy(
        update={"train": growing.config.train.model_copy(update={"max_tokens": 10**6})}  # more than is sealed
    )
    plan = RunPlan(config, growing.tokens_uri, growing.tokenizer_json, "test", growing=True)
    before = DataContext.get_current().execution_options.resource_limits
    with pytest.raises(UserError, match="the corpus changed") as raised, tokenizing(config, plan.run):
        wait_for_first_rows(plan)
        started.set()
        train(plan, rank=0, world_size=1)
    assert not isinstance(raised.value, TokenStoreError)
    assert limits == [ray_workers - plan.config.scaling.max_workers]
    assert DataContext.get_current().execution_options.resource_limits == before
    # It got as far as the sealed rows go, and an attempt that is started again ends at once.
    assert plan.run.read_bytes(TOKENIZING_FAILED) == b"the corpus changed while it was tokenized"
    num_lines = len(Ledger.read(plan.run).steps)
    train(plan, rank=0, world_size=1)
    assert len(Ledger.read(plan.run).steps) == num_lines


def test_the_trained_run_waits_for_the_store_and_resumes_on_the_finished_one(
    growing: RunPlan, ray_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_storage(growing.tokens_uri)
    sealed = Manifest.from_json(store.read_bytes(SEALED))
    trained = threading.Event()

    def tokenize(config: RunConfig) -> dict[str, Any]:
        assert trained.wait(limit_s(30))
        store.write_bytes(MANIFEST, finished.to_json())
        return {}

    finished = dataclasses.replace(sealed, complete=True)
    monkeypatch.setattr(background_tokenizing, "tokenize", tokenize)
    with tokenizing(growing.config, growing.run):
        train(growing, rank=0, world_size=1)
        assert not store.exists(MANIFEST)
        trained.set()
    assert store.exists(MANIFEST)
    early = read_metadata(newest_checkpoint(growing))
    assert (early.data_manifest_hash, early.data_identity) == (None, finished.identity)

    # The same run, its last checkpoint lost, goes on from step 6 with the finished store: the same weights again.
    checkpoint = newest_checkpoint(growing)
    checkpoint.rename(checkpoint.with_name("lost"))
    resumed = RunPlan(growing.config, growing.tokens_uri, growing.tokenizer_json, "test")
    train(resumed, rank=0, world_size=1)
    late = read_metadata(newest_checkpoint(growing))
    assert (late.data_manifest_hash, late.data_identity) == (finished.hash, finished.identity)
    assert late.parameter_hash == early.parameter_hash

"""Stage: train the model on the token store with Ray Train, elastically, and publish the final checkpoint."""

import dataclasses
import os
import secrets
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import ray.train
from ray.train import FailureConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import ScalingConfig

from cluster.config import RunConfig, max_steps, to_yaml
from cluster.flags import ConfigError
from cluster.progress import report_progress, say
from cluster.registry import publications, publish
from cluster.stage import StageFailedError, code_version, stage_main
from cluster.storage import Storage, open_storage
from jobs.attempt import MAX_FRUITLESS_ATTEMPTS
from jobs.background_tokenizing import tokenizing, wait_for_first_rows
from jobs.checkpoints import RunCheckpoints
from jobs.ledger import Ledger
from jobs.run_history import CONFIG_FILE, recorded_config
from jobs.run_plan import RunPlan, run_storage
from jobs.token_store import MANIFEST
from jobs.tokenize_corpus import token_store, tokenize
from jobs.train_loop import train
from jobs.train_tokenizer import ensure_tokenizer

_PROGRESS_INTERVAL_S = 2.0

_RAY_TRAIN_SETTINGS = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}  # a failure is seen four times as soon

# An elastic group is only started on nodes that are there, so a start that takes longer was planned on a node whose
# death was not known yet. Ray Train would wait a minute for it; measured recovery from a lost node fell from 76 s.
_ELASTIC_SETTINGS = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "6"}


def pretrain(config: RunConfig) -> dict[str, Any]:
    """Trains the run to its end and returns its figures. Makes the tokenizer and the token store where missing.

    Raises `ConfigError` when `run_id` names a run with other settings, `StageFailedError` when the run gave up.
    """
    tokenizer, _ = ensure_tokenizer(config)
    tokens = token_store(config)
    growing = config.train.while_tokenizing and not tokens.exists(MANIFEST)
    if not growing:
        tokenize(config)
    model = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    config = config.model_copy(update={"model": model})
    run = run_storage(config)
    _enter(run, config)
    storage = open_storage(config.storage.uri)
    published = [publication.checkpoint for publication in publications(storage)]
    plan = RunPlan(
        config=config,
        tokens_uri=tokens.uri,
        tokenizer_json=tokenizer.to_json(),
        code_version=code_version(),
        pinned=frozenset(uri.rsplit("/", 1)[1] for uri in published if uri.startswith(f"{run.uri}/")),
        growing=growing,
    )
    say(f"run {config.run_id}: {max_steps(config)} steps; the same --run-id resumes it")
    with tokenizing(config, run) if growing else nullcontext():
        if not Ledger.read(run).events("finish"):
            if growing:
                wait_for_first_rows(plan)
            with _watched(run, total=max_steps(config)):
                _fit(plan)
    ledger = Ledger.read(run)
    if not ledger.events("finish"):
        step = ledger.steps[-1]["step"] if ledger.steps else 0
        raise StageFailedError(
            f"run {config.run_id} gave up: {MAX_FRUITLESS_ATTEMPTS} attempts in a row got no further than step {step}; "
            f"the reason is in the log above, the ledger in {run.uri}"
        )
    checkpoint = RunCheckpoints(run).uri(ledger.events("checkpoint")[-1]["checkpoint"].rsplit("/", 1)[1])
    if checkpoint not in published:
        publish(storage, checkpoint)
    return _figures(run, ledger, checkpoint)


def _enter(run: Storage, config: RunConfig) -> None:
    """Records the run's settings, or checks that a resumed run has the same ones."""
    if not run.exists(CONFIG_FILE):
        run.write_bytes(CONFIG_FILE, to_yaml(config).encode())
        return
    before = recorded_config(run)
    if (before.model, before.train) != (config.model, config.train):
        old, new = before.model_dump(mode="json"), config.model_dump(mode="json")
        changed = [
            f"{branch}.{name} was {old[branch][name]}, now {new[branch][name]}"
            for branch in ("model", "train")
            for name in new[branch]
            if old[branch][name] != new[branch][name]
        ]
        raise ConfigError(f"run {config.run_id} has other settings: {'; '.join(changed)}. Choose another --run-id")


def _fit(plan: RunPlan) -> None:
    scaling = plan.config.scaling
    fixed = scaling.min_workers == scaling.max_workers
    os.environ |= _RAY_TRAIN_SETTINGS | ({} if fixed else _ELASTIC_SETTINGS)
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"plan": plan},
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=scaling.max_workers if fixed else (scaling.min_workers, scaling.max_workers),
            use_gpu=scaling.use_gpu,
            resources_per_worker={"CPU": scaling.threads_per_worker} | ({"GPU": 1} if scaling.use_gpu else {}),
            elastic_resize_monitor_interval_s=scaling.resize_check_s,
        ),
        run_config=ray.train.RunConfig(
            # Ray Train's own record of the run is disposable: the ledger and the checkpoints decide.
            name=f"attempts-{secrets.token_hex(4)}",
            storage_path=f"{plan.run.uri}/ray",
            failure_config=FailureConfig(max_failures=scaling.max_failures),
        ),
    )
    trainer.fit()


def _train_worker(settings: dict[str, Any]) -> None:
    context = ray.train.get_context()
    train(settings["plan"], rank=context.get_world_rank(), world_size=context.get_world_size())


@contextmanager
def _watched(run: Storage, *, total: int) -> Iterator[None]:
    """Reports the run's progress from its ledger, as anyone could who only sees its storage."""
    done = threading.Event()

    def watch() -> None:
        seen = last_step = 0
        while not done.wait(_PROGRESS_INTERVAL_S):
            ledger = Ledger.read(run)
            for event in ledger.events("start")[seen:]:
                say(f"attempt {event['attempt']}: {event['world_size']} workers, from step {event['step']}")
                seen += 1
            line = ledger.steps[-1] if ledger.steps else {"step": 0}
            if line["step"] != last_step:
                last_step = line["step"]
                note = f"loss {line['loss']:.3f}, {line['tokens_per_s']:.0f} tokens/s, {line['world_size']} workers"
                report_progress("training", done=line["step"], total=total, unit="steps", note=note)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _figures(run: Storage, ledger: Ledger, checkpoint: str) -> dict[str, Any]:
    last, validation = ledger.steps[-1], ledger.events("validation")[-1]
    recoveries = ledger.recoveries()
    training_s = sum(line["wall_s"] for line in ledger.steps)
    return {
        "run_id": run.uri.rsplit("/", 1)[1],
        "run_dir": run.uri,
        "checkpoint": checkpoint,
        "parameter_hash": ledger.events("checkpoint")[-1]["parameter_hash"],
        "step": last["step"],
        "tokens_seen": last["tokens_seen"],
        "first_loss": ledger.steps[0]["loss"],
        "train_loss": last["loss"],
        "val_loss": validation["val_loss"],
        "val_bits_per_byte": validation["val_bits_per_byte"],
        "tokens_per_s": round(last["tokens_seen"] / training_s, 1),
        "world_sizes": ledger.world_sizes,
        "restarts": len(ledger.world_sizes) - 1,
        "lost_steps": sum(recovery.lost_steps for recovery in recoveries),
        "recovery_s": max((recovery.seconds for recovery in recoveries), default=0.0),
    }


if __name__ == "__main__":
    sys.exit(stage_main(pretrain))

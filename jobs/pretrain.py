"""Stage: trains the model on the token store with Ray Train, elastically, and publishes the final
checkpoint."""

import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import ControllerError, FailureConfig, ScalingConfig
from ray.util import get_node_ip_address

from cluster.output.progress import say
from cluster.output.result_text import counted
from cluster.settings.code_folders import code_version
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig, max_steps, run_storage, seq_len, to_yaml, with_precision
from cluster.stages.run_mirrored import COMMAND_VARIABLE
from cluster.stages.stage import stage_main
from cluster.stages.stage_module import OverBudgetError, StageFailedError
from cluster.storage.lease import Lease
from cluster.storage.registry import publications, publish, what_latest_became
from cluster.storage.uris import Storage, join_uri, open_storage, split_uri
from cluster.wings import added
from jobs.corpus.listing import list_corpus
from jobs.plan.worker_counts import StepTimes, counts_to_run, hardware_of, uneven_groups
from jobs.ray_train.callbacks import FailureRecorder, SignalListener
from jobs.ray_train.drains import Drains
from jobs.ray_train.node_losses import NodeLosses
from jobs.ray_train.worker_backend import LeftOutNodes, Trainer, WorkerBackend
from jobs.run.base import recorded_base
from jobs.run.checkpoints import RunCheckpoints
from jobs.run.costs.budget import spent_in_words, why_over_budget
from jobs.run.end import EXIT_CODES, End
from jobs.run.find_run import find_tokens
from jobs.run.history import CONFIG_FILE, changed_settings, recorded_config
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.run.storage_retry import patiently
from jobs.run.writer_generation import Fence
from jobs.snapshots.keepers import Keepers
from jobs.tokens.build_store import tokenize
from jobs.tokens.division import Division, HeldOut, divide
from jobs.tokens.holes import read_holes
from jobs.tokens.token_store import MANIFEST, TokenStoreError, read_manifest
from jobs.tokens.train_tokenizer import ensure_tokenizer, load_tokenizer
from jobs.training.train_worker import train_worker
from jobs.training.validation import check_prompts
from jobs.training.warm_start import begin, like_its_source
from jobs.workers.failures import one_line
from jobs.workers.placement import workers_precision
from jobs.workers.preemption import stopping_on_sigterm
from jobs.workers.rendezvous import meeting_place
from model.config import Shape
from model.foreign_config import require_version
from model.text.tokenizer import Tokenizer

_RAY_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # sees a failure ten times as soon
    # Sees that a node is being drained five times as soon
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
"""Ray Train's settings, as it reads them from the launcher's environment."""

_ELASTIC_RAY_TRAIN = {
    # An elastic group starts only on nodes that are there, so a start that takes longer was planned
    # on a node that died without Ray knowing it yet. Ray Train would wait a minute for it; recovery
    # from a lost node was measured at 76 s.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "6",
}


def validation_stores(config: RunConfig, *, tokenizer_uri: str) -> dict[str, str]:
    """Tokenizes each validation set, all of it as the "train" split, and returns the stores' URIs
    by name. Needs Ray.

    Raises `TokenStoreError` for a set that is too small for one row.
    """
    whole = {
        "tokenizer": tokenizer_uri,
        "weights": [],
        "val_fraction": 0.0,
        "decontaminate_ngram": None,
    }
    stores = {}
    for name, source in config.data.validation.items():
        data = config.data.model_copy(update=whole | {"source": [source]})
        made = tokenize(config.model_copy(update={"data": data}))
        if made["train_tokens"] <= seq_len(config):
            raise TokenStoreError(
                f"data.validation.{name}={source} has {made['train_tokens']} tokens, a row needs {seq_len(config) + 1} "
                "(train.seq_len + 1); add text, leave the set out, or lower train.seq_len"
            )
        stores[name] = split_uri(made["manifest"])[0].uri
    return stores


def divided(config: RunConfig, tokens: Storage) -> Division:
    """Returns how the run divides the token store into what trains and what validates, and says so
    where it is the text's end. Raises `TokenStoreError` where no step could be taken or nothing
    would validate."""
    manifest = read_manifest(tokens, opens_lists=False)
    division = divide(
        manifest,
        seq_len=seq_len(config),
        val_fraction=config.data.val_fraction,
        has_sets=bool(config.data.validation),
    )
    if division.held_out is HeldOut.END:
        say(
            f"too few documents to hold out whole ones: the last {division.end_tokens:,} of "
            f"{manifest.total('tokens'):,} tokens are held out to validate"
            f"{', of the largest source' if len(manifest.weights) > 1 else ''}"
        )
    return division


@dataclass(frozen=True)
class PreparedText:
    """The text that a run trains on, as tokens."""

    config: RunConfig  # with what the run takes from the weights that it begins from
    tokenizer: Tokenizer
    tokenizer_uri: str
    figures: dict[str, Any]  # of the token store


def prepare(config: RunConfig) -> PreparedText:
    """Makes the tokenizer and the token store where missing, of the corpus as it is listed once.
    Needs Ray.

    Raises `ConfigError` when a prompt cannot be continued, and what `tokenize` raises.
    """
    config = like_its_source(config)
    if config.data.forgotten is not None:
        return _prepared_store(config)
    # Where a tokenizer is named, its prompts are checked before the corpus is listed
    listing = None
    if config.data.tokenizer is None:
        listing = list_corpus(config.data.source, text_endings=config.data.text_endings)
    tokenizer, tokenizer_uri = ensure_tokenizer(config, listing)
    check_prompts(config, tokenizer)
    return PreparedText(config, tokenizer, tokenizer_uri, tokenize(config, listing))


def _prepared_store(config: RunConfig) -> PreparedText:
    """Returns the token store whose documents the run leaves out: the corpus may be without them by
    now, and would make another one. Raises `TokenStoreError` where it is not in the storage."""
    holes = read_holes(open_storage(config.storage.uri), config.data.forgotten)
    store = find_tokens(run_storage(config), holes.data_identity)
    tokenizer, uri = load_tokenizer(store.uri)
    check_prompts(config, tokenizer)
    return PreparedText(config, tokenizer, uri, {"manifest": join_uri(store.uri, MANIFEST)})


def pretrain(config: RunConfig) -> dict[str, Any]:
    """Trains the run to its end and returns its figures. Makes the tokenizer and the token store
    where missing.

    Raises `ConfigError` when `run_id` names a run with other settings or a prompt cannot be
    continued, `LeaseHeldError` when another launcher is training it, `StageFailedError` when the
    run gave up or was stopped.
    """
    return train_on(prepare(config))


def train_on(text: PreparedText) -> dict[str, Any]:
    """Trains the run on its text, as `pretrain` does."""
    config, tokenizer = text.config, text.tokenizer
    tokens = split_uri(text.figures["manifest"])[0]
    division = divided(config, tokens)
    sets = validation_stores(config, tokenizer_uri=text.tokenizer_uri)
    config = config.model_copy(update={"model": _shape_for(config, tokenizer)})
    run, storage = run_storage(config), open_storage(config.storage.uri)
    with Lease(run) as lease:
        config = _enter(run, config, tokenizer)
        plan = RunPlan(
            config=config,
            tokens_uri=tokens.uri,
            tokenizer_json=tokenizer.to_json(),
            code_version=code_version(),
            launcher=Fence(run, launcher=None).generation,
            launch=f"raymill-{secrets.token_hex(8)}",
            validation_uris=sets,
            division=division,
            holes=read_holes(storage, config.data.forgotten),
            base=recorded_base(run),
            command=os.environ.get(COMMAND_VARIABLE, ""),
        )
        if reason := why_over_budget(run, config):
            raise OverBudgetError(reason)
        say(_begins(config, Ledger.read(run)))
        _train(plan)
        ledger = Ledger.read(run)
        lease.check()
        if ledger.end not in (End.FINISHED, End.SPENT):
            raise unfinished(plan, ledger)
        checkpoint = RunCheckpoints(run).uri(
            ledger.events("checkpoint")[-1]["checkpoint"].rsplit("/", 1)[1]
        )
        is_wanted = config.checkpoint.publish
        if is_wanted and checkpoint not in [
            published.checkpoint for published in publications(storage)
        ]:
            publish(storage, checkpoint)
            say(what_latest_became(storage))
        if not ledger.is_finished:
            raise unfinished(plan, ledger)
        return _figures(run, ledger, checkpoint)


def _shape_for(config: RunConfig, tokenizer: Tokenizer) -> Shape:
    if config.model.by_transformers:
        require_version()
    try:
        return config.model.with_vocabulary(tokenizer.vocab_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _enter(run: Storage, config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """Records a new run's settings and the weights that it begins from, or checks that a resumed
    run has the same settings. Returns them with its precision."""
    if run.exists(CONFIG_FILE):
        if changed := changed_settings(run, config):
            raise ConfigError(
                f"run {config.run_id} has other settings: {'; '.join(changed)}. Choose another --run-id"
            )
        precision = recorded_config(run).train.precision
        assert precision != "auto", "it was settled before it was recorded"
        return with_precision(config, precision)
    if config.train.precision == "auto":
        config = with_precision(config, workers_precision(config.scaling))
    if config.train.init_from:
        begin(run, config, tokenizer)
    run.write_bytes(CONFIG_FILE, to_yaml(config).encode())
    return config


def _begins(config: RunConfig, before: Ledger) -> str:
    """Returns a line that says what comes next: on one machine, workers take some ten seconds to
    start."""
    total, steps = max_steps(config), before.steps
    if before.is_finished:
        return f"run {config.run_id} has finished already, after step {steps[-1]['step']:,}"
    most, least = config.scaling.max_workers, config.scaling.min_workers
    workers = counted(most, "worker") if least == most else f"{least} to {most} workers"
    place = (
        f"continues after step {steps[-1]['step']:,} of {total:,}"
        if steps
        else f"has {counted(total, 'step')} to take"
    )
    return f"run {config.run_id} {place} in {config.train.precision}, starting {workers}"


@contextmanager
def _watched(plan: RunPlan, *, snapshot_time_s: Callable[[], float | None]) -> Iterator[None]:
    """Lets the wings watch the run while the context lasts."""
    with ExitStack() as watchers:
        for watch in added(lambda wing: wing.run_watcher):
            watchers.enter_context(watch(plan, snapshot_time_s=snapshot_time_s))
        yield


def _train(plan: RunPlan) -> None:
    """Trains what is left of the run. A controller of Ray Train that fails is replaced by another,
    which continues from the same snapshots, as long as the run makes progress."""
    if Ledger.read(plan.run).is_finished:
        return
    hardware = hardware_of([node["Resources"] for node in ray.nodes() if node["Alive"]])
    times = StepTimes(plan.config, hardware) if hardware and plan.config.scaling.use_gpu else None
    if warning := uneven_groups(plan.config, times, plan.config.scaling.max_workers):
        say(warning)
    counts = counts_to_run(plan.config, times)
    furthest = -1
    with (
        stopping_on_sigterm(plan.run),
        Keepers(plan.launch, node_bytes=plan.config.checkpoint.snapshot_bytes) as keepers,
        _watched(plan, snapshot_time_s=lambda: keepers.snapshot_time_s),
        meeting_place(get_node_ip_address()) as address,
    ):
        while True:
            try:
                _trainer(plan, address, counts).fit()
                return
            except (ControllerError, RayActorError) as error:
                steps = patiently(lambda: Ledger.read(plan.run), "ledger").steps
                step = steps[-1]["step"] if steps else 0
                if step <= furthest:
                    raise
                furthest = step
                say(
                    f"Ray Train's controller failed after step {step}; it is being restarted: {one_line(str(error))}"
                )


def unfinished(plan: RunPlan, ledger: Ledger) -> StageFailedError:
    """Returns what the user is told of a run that stopped before its end."""
    end, run_id = ledger.end, plan.config.run_id
    assert end is not None, "its workers have left"
    if end is End.SPENT:
        steps = max_steps(plan.config)
        return OverBudgetError(spent_in_words(plan.config, ledger, steps=steps))
    last = ledger.events(end)[-1]
    text = (
        f"run {run_id} gave up: {last['reason']}; more is in {plan.run.uri}"
        if end is End.GAVE_UP
        else f"run {run_id} is saved at step {last['step']} of {max_steps(plan.config)} and has stopped, as "
        "requested; the same --run-id continues it"
    )
    return StageFailedError(text, exit_code=EXIT_CODES[end])


def _trainer(plan: RunPlan, address: str, counts: Mapping[int, int]) -> Trainer:
    """Returns what trains the run; `counts` has the number of workers to run by the number that
    could."""
    scaling = plan.config.scaling
    storage = open_storage(plan.config.storage.uri)
    is_elastic = scaling.min_workers < scaling.max_workers
    os.environ |= _RAY_TRAIN | (_ELASTIC_RAY_TRAIN if is_elastic else {})
    recorder = FailureRecorder(plan)
    possible = range(scaling.min_workers, scaling.max_workers + 1)
    sizes = [size for size in possible if counts.get(size, size) == size]
    callbacks = [
        recorder,
        SignalListener(),
        Drains(),
        NodeLosses(recorder, is_elastic=is_elastic, sizes=sizes, address=address),
        LeftOutNodes(storage),
    ]
    return Trainer(
        partial(train_worker, plan, address=address, sizes=sizes),
        storage=storage,
        run=plan.run,
        counts=counts,
        torch_config=WorkerBackend(),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # typed as its old API
            num_workers=(scaling.min_workers, scaling.max_workers)
            if is_elastic
            else scaling.max_workers,  # type: ignore[arg-type]
            use_gpu=scaling.use_gpu,
            resources_per_worker={"CPU": scaling.threads_per_worker}
            | ({"GPU": 1} if scaling.use_gpu else {}),
            elastic_resize_monitor_interval_s=scaling.resize_check_s,
        ),
        run_config=ray.train.RunConfig(
            # Ray Train's own record of the run is disposable: the ledger and the checkpoints are
            # what counts.
            name=f"attempts-{secrets.token_hex(4)}",
            storage_path=f"{plan.run.uri}/ray",
            # `max_fruitless_attempts` ends what gets no further
            failure_config=FailureConfig(max_failures=-1),
            callbacks=callbacks,  # type: ignore[arg-type]  # typed as its old API
        ),
    )


def _figures(run: Storage, ledger: Ledger, checkpoint: str) -> dict[str, Any]:
    steps, recoveries = ledger.steps, ledger.recoveries()
    last, validation = steps[-1], ledger.events("validation")[-1]
    sets = validation.get("sets", {})
    return {
        "run_id": run.uri.rsplit("/", 1)[1],
        "run_dir": run.uri,
        "checkpoint": checkpoint,
        "parameter_hash": ledger.events("checkpoint")[-1]["parameter_hash"],
        "precision": ledger.events("start")[-1]["precision"],
        "step": last["step"],
        "tokens_seen": last["tokens_seen"],
        "first_loss": steps[0]["loss"],
        "train_loss": last["loss"],
        "val_loss": validation["val_loss"],
        "val_bits_per_byte": validation["val_bits_per_byte"],
        **({"validation_sets": sets} if sets else {}),
        "tokens_per_s": round(last["tokens_seen"] / sum(line["wall_s"] for line in steps), 1),
        "world_sizes": ledger.world_sizes,
        "restarts": len(ledger.world_sizes) - 1 - len(ledger.pauses),
        "lost_steps": sum(recovery.lost_steps for recovery in recoveries),
        "recovery_s": max((recovery.seconds or 0.0 for recovery in recoveries), default=0.0),
    }


if __name__ == "__main__":
    sys.exit(stage_main(pretrain, RunConfig))

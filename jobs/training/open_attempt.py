"""Opens one worker's part of an attempt: rank 0 chooses the state to continue from, and every rank
restores it."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from cluster.settings.run import RunConfig, batch_schedule, state_scaling, way_to_compute
from cluster.storage.lease import LeaseLostError
from cluster.storage.registry import metadata_of
from jobs.exact.audited_gradient import AuditedGradient
from jobs.exact.compute import first_weights
from jobs.exact.frozen import freeze
from jobs.exact.run_state import run_state
from jobs.exact.run_values import run_sharding
from jobs.exact.step_gradient import step_gradient
from jobs.exact.stored_state import restored
from jobs.run.checkpoints import RunCheckpoints
from jobs.run.ledger import Ledger, void
from jobs.run.ledger_outline import last_recorded
from jobs.run.run_plan import RunPlan, open_held_out, open_stream, open_validation_sets
from jobs.run.sharded_checkpoints import stored_state
from jobs.run.storage_retry import patiently, tell_nobody
from jobs.saving.checkpoint_writer import CheckpointWriter
from jobs.saving.hash_recorder import HashRecorder
from jobs.saving.saver import Saver, SavesNothing
from jobs.saving.shard_writer import ShardWriter
from jobs.sentinel.consequences import AuditedAttempt
from jobs.sentinel.proven_part import NOT_AUDITED, ProvenPart, proven_part
from jobs.sentinel.way_back import WayBack, doubtful_step, pending, why_no_further
from jobs.snapshots.choice import Snapshot
from jobs.snapshots.kept_copies import goes_back_from_snapshots
from jobs.snapshots.snapshots import Snapshots
from jobs.training.attempt import Attempt, only_trains
from jobs.training.guards import GuardState, Windows
from jobs.training.kernels import SelfTest, prepared
from jobs.training.mixed_hardware import (
    Hardware,
    changes,
    differences,
    gpu_of_worker,
    hardware,
    why_refused,
)
from jobs.training.run_writer import RunWriter
from jobs.training.sentinel import Sentinel
from jobs.training.start_inputs import inputs
from jobs.training.step_record import StepRecord
from jobs.training.validation import Validator
from jobs.workers.failures import why_give_up
from jobs.workers.incident_notes import write_down
from jobs.workers.placement import at_odds, place_here
from jobs.workers.preemption import Notices, Signals
from model.decoders.adapted import AdaptedModel
from model.decoders.make import new_decoder
from model.hardware.memory import keep_freed_memory
from model.text.tokenizer import Tokenizer
from raymill.errors import CheckpointError
from raymill.state.train_state import TrainState
from raymill.workers.worker_group import WorkerGroup


@dataclass(frozen=True)
class _Start:
    """The state from which rank 0 lets all ranks continue: fresh weights, where it names neither of
    the two."""

    num_attempts: int  # before this one
    generation: int
    unlike: Sequence[str]  # why the same bits are not promised: how the hardware differs
    rollbacks: Windows  # the steps to leave out
    checkpoint: str | None = None
    snapshot: Snapshot | None = None
    saved_step: int = 0  # of the newest checkpoint, which is no newer than the snapshot
    owed: WayBack | None = None  # whose proof the run owes
    proven: ProvenPart = NOT_AUDITED
    doubtful: int | None = None  # a step that is to be audited in any case

    def audited(
        self, places: Sequence[dict[str, Any]], *, first_step: int, restored_step: int
    ) -> AuditedAttempt:
        """Returns what the sentinel of the attempt knows."""
        number, proven = 1 + self.num_attempts, self.proven.from_start(restored_step)
        return AuditedAttempt(number, first_step, places, self.owed, proven)


@dataclass(frozen=True)
class _Workers:
    """Where the workers of an attempt run, by rank."""

    places: Sequence[dict[str, Any]]
    kinds: Sequence[Hardware]
    met_s: float  # on this process's clock: when they had met

    @property
    def nodes(self) -> list[str]:
        return [place["node"] for place in self.places]


def open_attempt(
    plan: RunPlan,
    group: WorkerGroup,
    opened: ExitStack,
    *,
    signals: Callable[[], Signals | None],
    self_test: SelfTest | None = None,
) -> Attempt | None:
    """Returns once every rank has the state and is ready for the first step; None where no attempt
    can continue the run, as the ledger says.

    `opened` ends the attempt's threads; the next attempt repeats what was not stored by then.
    `signals` returns what changes when this process is warned of its end. `self_test` is this
    worker's, if it has had one.
    """
    config, met_s = plan.config, time.monotonic()
    self_test = self_test or SelfTest(plan)
    keep_freed_memory()
    place = place_here(on_ray=plan.launch is not None) | gpu_of_worker(self_test.device)
    gathered = group.gather((place, hardware(config, self_test.device)))
    places, kinds = zip(*gathered, strict=True)
    workers = _Workers(places, kinds, met_s)
    snapshots = Snapshots(plan.launch, group)
    # Rank 0 chooses the checkpoint for all: another rank might see a newer or a damaged one.
    writer, choice = _chosen(plan, snapshots, opened, workers) if group.rank == 0 else (None, None)
    start = group.broadcast(choice)
    if isinstance(start, str):
        if writer:
            writer.give_up(start)
        return None
    return _continued(plan, group, opened, start, snapshots, workers, writer, self_test, signals)


def _continued(
    plan: RunPlan,
    group: WorkerGroup,
    opened: ExitStack,
    start: _Start,
    snapshots: Snapshots,
    workers: _Workers,
    writer: RunWriter | None,
    self_test: SelfTest,
    signals: Callable[[], Signals | None],
) -> Attempt:
    """Returns the attempt from where rank 0 lets all continue, once every rank is ready for its
    first step."""
    config, device = plan.config, self_test.device
    state, guard, restored_step = _restored(plan, start, snapshots, device, group, opened, workers)
    first_step, guard = replace(guard, rollbacks=start.rollbacks).entering(restored_step + 1)
    tell = writer.ledger.event if writer else tell_nobody
    train_rows = open_stream(plan)
    # A checkpoint has the template that its conversations were written with.
    tokenizer = Tokenizer.from_json(plan.tokenizer_json, train_rows.manifest.chat)
    saver = _saver(plan, state, group, writer, tokenizer)
    opened.callback(saver.abandon)
    ready = prepared(plan, group, self_test, workers.kinds[group.rank])
    eot_id = tokenizer.start_id if config.train.document_mask else None
    validator = _validator(plan, state, group, tokenizer, eot_id=eot_id, tell=tell)
    nodes = () if start.unlike else workers.nodes
    in_text = bool(plan.holes) and train_rows.manifest.chat is None
    of_steps = step_gradient(config, state, train_rows, group, eot_id=eot_id, has_holes=in_text)
    gradient = AuditedGradient(of_steps, state, group, nodes=nodes, doubtful=start.doubtful)
    opened.callback(gradient.close)
    notices = Notices(plan.run, group, signals, writer.budget if writer else None)
    opened.callback(notices.close)
    audited = start.audited(workers.places, first_step=first_step, restored_step=restored_step)
    sentinel = Sentinel(plan, gradient, state, group, audited, writer=writer)
    sentinel.compare_self_tests(ready.self_test, ready.problem, workers.kinds)
    group.gather("prepared")  # else the first step would seem to take what others still prepare
    attempt = Attempt(
        plan=plan,
        group=group,
        number=audited.number,
        generation=start.generation,
        first_step=first_step,
        state=state,
        guard=guard,
        manifest=train_rows.manifest,
        schedule=batch_schedule(config),
        gradient=gradient,
        sentinel=sentinel,
        validator=validator,
        record=StepRecord(plan, state, group, audited, writer=writer),
        snapshots=snapshots,
        saver=saver,
        notices=notices,
        tell=tell,
        writer=writer,
    )
    if writer:
        _record_start(attempt, writer, start, workers, restored_step, ready.kernels)
    _save_what_was_due(attempt, start, restored_step)
    return attempt


def _save_what_was_due(attempt: Attempt, start: _Start, restored_step: int) -> None:
    """Saves the state of a snapshot where a checkpoint was due and had not been stored yet."""
    save_every_steps = attempt.plan.config.checkpoint.save_every_steps
    if start.snapshot and restored_step - start.saved_step >= save_every_steps:
        attempt.save(restored_step, start.snapshot.header.carried["validation"])


def _validator(
    plan: RunPlan,
    state: TrainState,
    group: WorkerGroup,
    tokenizer: Tokenizer,
    *,
    eot_id: int | None,
    tell: Callable[..., None],
) -> Validator:
    return Validator(
        plan.config,
        state,
        group,
        held_out=open_held_out(plan),
        sets=open_validation_sets(plan),
        tokenizer=tokenizer,
        eot_id=eot_id,
        tell=tell,
    )


def _saver(
    plan: RunPlan,
    state: TrainState,
    group: WorkerGroup,
    writer: RunWriter | None,
    tokenizer: Tokenizer,
) -> Saver:
    if plan.replay:
        return HashRecorder(group, writer.ledger if writer else None)
    if not state.sharding.is_whole:
        return ShardWriter(
            writer.checkpoints if writer else RunCheckpoints(plan.run),  # rank 0's are fenced
            state.sharding,
            group,
            publisher=writer.publisher if writer else None,
            config=plan.config.model,
            tokenizer=tokenizer,
        )
    return CheckpointWriter(writer.publisher, tokenizer) if writer else SavesNothing()


def _chosen(
    plan: RunPlan, snapshots: Snapshots, opened: ExitStack, workers: _Workers
) -> tuple[RunWriter | None, _Start | str]:
    """Returns the run's writer, unless another launcher's has taken its place, and where all ranks
    continue, or why they cannot."""
    writer = None
    try:
        writer = RunWriter(plan)
        opened.callback(writer.abandon)
        return writer, _choose(plan, writer, snapshots, workers)
    except (LeaseLostError, CheckpointError) as error:
        return writer, str(error)


def _choose(
    plan: RunPlan, writer: RunWriter, snapshots: Snapshots, workers: _Workers
) -> _Start | str:
    """Raises `LeaseLostError`, and `CheckpointError` where the run's checkpoints are damaged or do
    not fit it."""
    patiently(lambda: write_down(plan.run, writer.ledger), "incidents")
    read, config = writer.outline(), plan.config
    most = config.scaling.max_fruitless_attempts
    reason = why_give_up(read.lines, max_fruitless_attempts=most) or why_no_further(read.lines)
    if reason:
        return reason
    unlike = differences(workers.kinds, nodes=workers.nodes) + changes(read, workers.kinds[0])
    refusal = why_refused(config, read, unlike)
    if refusal:
        return refusal
    if not unlike and goes_back_from_snapshots(snapshots, writer, read.lines):
        read = writer.outline()
    start = _Start(
        len(read.world_sizes),
        writer.fence.generation,
        unlike,
        read.rollbacks,
        owed=pending(read.lines),
        proven=proven_part(read.lines),
        doubtful=doubtful_step(read.lines),
    )
    left_out = GuardState(rollbacks=read.rollbacks).leaves_out
    ways_back = void(read.lines)
    writer.set_aside(ways_back)
    saved_step = writer.newest_step(left_out=left_out)
    snapshot = _newest_snapshot(
        config,
        writer,
        snapshots,
        read,
        at_least=saved_step,
        is_left_out=left_out,
        after_attempt=ways_back[-1].attempt if ways_back else 0,
    )
    if snapshot is not None:
        # What is due is saved from the snapshot
        patiently(writer.checkpoints.clear_spool, "checkpoints")
        patiently(writer.record_unlisted, "checkpoints")
        return replace(start, snapshot=snapshot, saved_step=saved_step)
    find = partial(
        writer.newest_checkpoint,
        left_out=left_out,
        may_start_over=bool(ways_back and ways_back[-1].to_step == 0),
    )
    newest = patiently(find, "checkpoints")
    return replace(start, checkpoint=newest)


def _newest_snapshot(
    config: RunConfig,
    writer: RunWriter,
    snapshots: Snapshots,
    read: Ledger,
    *,
    at_least: int,
    is_left_out: Callable[[int], bool],
    after_attempt: int,
) -> Snapshot | None:
    """Returns the newest snapshot of a step that the ledger has, or of the step after it, whose
    line a lost rank 0 had no time to write."""
    newest = partial(
        snapshots.newest,
        at_least=at_least,
        is_left_out=is_left_out,
        after_attempt=after_attempt,
    )
    recorded = last_recorded(read)
    owed = recorded + 1
    if only_trains(config, owed):
        snapshot = newest(explained_step=owed)
        if snapshot is None or snapshot.header.step <= recorded:
            return snapshot
        if line := snapshot.header.carried["line"]:
            writer.ledger.step(**line)
            return snapshot
    return newest(explained_step=recorded)


def _restored(
    plan: RunPlan,
    start: _Start,
    snapshots: Snapshots,
    device: torch.device,
    group: WorkerGroup,
    opened: ExitStack,
    workers: _Workers,
) -> tuple[TrainState, GuardState, int]:
    """Returns the state of the snapshot or the checkpoint, or fresh weights, with its guard and its
    step."""
    config = plan.config
    state = _state_without_values(plan, device, group, workers)
    opened.callback(state.close)
    if start.snapshot:
        guard = GuardState.from_json(snapshots.restore(start.snapshot, state)["guard"])
        group.prove(start.snapshot.header.step, device)  # a checkpoint of it may be due
        return state, guard, start.snapshot.header.step
    if start.checkpoint is None:
        state.load_weights(first_weights(config, config.train.seed))
        return state, GuardState(), 0
    checkpoints = RunCheckpoints(plan.run)
    metadata = metadata_of(checkpoints.uri(start.checkpoint))
    assert metadata is not None, "rank 0 has found it"
    stored, name = stored_state(checkpoints, start.checkpoint), start.checkpoint
    restored(state, stored, group, checksum=metadata.state_checksum, name=name)
    guard = (
        GuardState.from_json(metadata.guard)
        if metadata.guard
        else GuardState(last_applied=metadata.step)
    )
    return state, guard, metadata.step


def _state_without_values(
    plan: RunPlan, device: torch.device, group: WorkerGroup, workers: _Workers
) -> TrainState:
    """Returns the state of the run's model, whose frozen weights, if it has any, are there."""
    config = plan.config
    with torch.device("meta"):
        model = new_decoder(config.model)
    divide = partial(
        run_sharding, rank=group.rank, world_size=group.world_size, nodes=workers.nodes
    )
    frozen = None
    if isinstance(model, AdaptedModel):
        assert plan.base is not None, "an adapter stands on a base"
        folder = patiently(partial(plan.base.folder, config.storage.uri), "the base")
        frozen = freeze(model, folder, device=device, sharding=divide(config.scaling), group=group)
    return run_state(
        model,
        config.train,
        device=device,
        group=group,
        sharding=divide(state_scaling(config)),
        frozen=frozen,
    )


def _record_start(
    attempt: Attempt,
    writer: RunWriter,
    start: _Start,
    workers: _Workers,
    restored_step: int,
    kernels: str | None,
) -> None:
    """Records where and how the attempt begins, and what is not as the run's settings mean it to
    be."""
    plan, config, number = attempt.plan, attempt.plan.config, attempt.number
    writer.ledger.event(
        "start",
        attempt=number,
        world_size=attempt.group.world_size,
        launcher=plan.launcher,
        step=restored_step,
        checkpoint=start.checkpoint,
        from_memory=start.snapshot is not None,
        opening_seconds=round(time.monotonic() - workers.met_s, 6),
        workers=workers.places,
        **inputs(plan, attempt.manifest),
        code_version=plan.code_version,
        precision=config.train.precision,
        compute=way_to_compute(config),
        hardware=workers.kinds[0],
        **({"kernels": kernels} if kernels else {}),
    )
    if writer.budget:
        writer.budget.begin(writer.outline())
    precision = config.train.precision
    assert precision != "auto", "it is settled before workers start"
    # A processor that is not made for the run's precision is told of once for each kind.
    slow = at_odds(precision, "cuda" if attempt.state.device.type == "cuda" else "cpu")
    recorded = (writer.outline().events("precision") or [{}])[-1]
    if slow and slow["fast"] != recorded.get("fast"):
        writer.ledger.event("precision", attempt=number, **slow)
    if start.unlike:
        writer.ledger.event("tolerance_mode", attempt=number, reasons=start.unlike)

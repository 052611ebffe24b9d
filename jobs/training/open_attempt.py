"""Opens one worker's part of an attempt, with all that its steps need."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

from cluster.settings.run import batch_schedule, way_to_compute
from jobs.exact.audited_gradient import AuditedGradient
from jobs.exact.step_gradient import step_gradient
from jobs.run.checkpoints import RunCheckpoints
from jobs.run.run_plan import RunPlan, open_held_out, open_stream, open_validation_sets
from jobs.run.storage_retry import tell_nobody
from jobs.saving.checkpoint_writer import CheckpointWriter
from jobs.saving.hash_recorder import HashRecorder
from jobs.saving.saver import Saver, SavesNothing
from jobs.saving.shard_writer import ShardWriter
from jobs.snapshots.snapshots import Snapshots
from jobs.training.attempt import Attempt
from jobs.training.kernels import SelfTest, prepared
from jobs.training.mixed_hardware import gpu_of_worker, hardware
from jobs.training.opening.restore import restored_state
from jobs.training.opening.start import Opening, Start, Workers, chosen_start
from jobs.training.opening.start_inputs import inputs
from jobs.training.run_writer import RunWriter
from jobs.training.sentinel import Sentinel
from jobs.training.step_record import StepRecord
from jobs.training.validation import Validator
from jobs.workers.placement import at_odds, place_here
from jobs.workers.preemption import Notices, Signals
from model.hardware.memory import keep_freed_memory
from model.text.tokenizer import Tokenizer
from raymill.state.train_state import TrainState
from raymill.workers.worker_group import WorkerGroup


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
    met_s = time.monotonic()
    self_test = self_test or SelfTest(plan)
    device = self_test.device
    keep_freed_memory()
    place = place_here(on_ray=plan.launch is not None) | gpu_of_worker(device)
    gathered = group.gather((place, hardware(plan.config, device)))
    places, kinds = zip(*gathered, strict=True)
    opening = Opening(plan, group, Workers(places, kinds, met_s), device, opened)
    snapshots = Snapshots(plan.launch, group)
    # Rank 0 chooses the checkpoint for all: another rank might see a newer or a damaged one.
    writer, choice = chosen_start(opening, snapshots) if group.rank == 0 else (None, None)
    start = group.broadcast(choice)
    if isinstance(start, str):
        if writer:
            writer.give_up(start)
        return None
    return _continued(opening, start, snapshots, writer, self_test, signals)


def _continued(
    opening: Opening,
    start: Start,
    snapshots: Snapshots,
    writer: RunWriter | None,
    self_test: SelfTest,
    signals: Callable[[], Signals | None],
) -> Attempt:
    """Returns the attempt from where rank 0 lets all continue, once every rank is ready for its
    first step."""
    plan, group, workers = opening.plan, opening.group, opening.workers
    config, close_with = plan.config, opening.opened.callback
    state, guard, restored_step = restored_state(opening, start, snapshots)
    first_step, guard = replace(guard, rollbacks=start.rollbacks).entering(restored_step + 1)
    tell = writer.ledger.event if writer else tell_nobody
    train_rows = open_stream(plan)
    # A checkpoint has the template that its conversations were written with.
    tokenizer = Tokenizer.from_json(plan.tokenizer_json, train_rows.manifest.chat)
    saver = _saver(opening, state, writer, tokenizer)
    close_with(saver.abandon)
    ready = prepared(plan, group, self_test, workers.kinds[group.rank])
    eot_id = tokenizer.start_id if config.train.document_mask else None
    validator = _validator(opening, state, tokenizer, eot_id=eot_id, tell=tell)
    nodes = () if start.unlike else workers.nodes
    in_text = bool(plan.holes) and train_rows.manifest.chat is None
    of_steps = step_gradient(config, state, train_rows, group, eot_id=eot_id, has_holes=in_text)
    gradient = AuditedGradient(of_steps, state, group, nodes=nodes, doubtful=start.doubtful)
    close_with(gradient.close)
    notices = Notices(plan.run, group, signals, writer.budget if writer else None)
    close_with(notices.close)
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


def _save_what_was_due(attempt: Attempt, start: Start, restored_step: int) -> None:
    """Saves the state of a snapshot where a checkpoint was due and had not been stored yet."""
    save_every_steps = attempt.plan.config.checkpoint.save_every_steps
    if start.snapshot and restored_step - start.saved_step >= save_every_steps:
        attempt.save(restored_step, start.snapshot.header.carried["validation"])


def _validator(
    opening: Opening,
    state: TrainState,
    tokenizer: Tokenizer,
    *,
    eot_id: int | None,
    tell: Callable[..., None],
) -> Validator:
    plan = opening.plan
    return Validator(
        plan.config,
        state,
        opening.group,
        held_out=open_held_out(plan),
        sets=open_validation_sets(plan),
        tokenizer=tokenizer,
        eot_id=eot_id,
        tell=tell,
    )


def _saver(
    opening: Opening, state: TrainState, writer: RunWriter | None, tokenizer: Tokenizer
) -> Saver:
    plan, group = opening.plan, opening.group
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


def _record_start(
    attempt: Attempt,
    writer: RunWriter,
    start: Start,
    workers: Workers,
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

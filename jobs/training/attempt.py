"""One worker's part of an attempt at a run: begins, records and saves."""

import math
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from cluster.local.local_cluster import NODE_NAME_VARIABLE
from cluster.settings.run import batch_schedule, cooldown_tokens, warmup_tokens, way_to_compute
from cluster.storage.lease import LeaseLostError
from cluster.storage.registry import metadata_of
from jobs.exact.batch_gradient import BatchGradient
from jobs.exact.compute import autocast
from jobs.exact.state.sharding import Sharding
from jobs.exact.state.train_state import TrainState
from jobs.run.checkpoints import RunCheckpoints
from jobs.run.run_plan import RunPlan, open_held_out, open_stream, open_validation_sets
from jobs.run.sharded_checkpoints import stored_state
from jobs.run.storage_retry import patiently
from jobs.snapshots.choice import Snapshot
from jobs.snapshots.snapshots import Snapshots
from jobs.tokens.division import HeldOut
from jobs.training.guards import Decision, GuardState, Verdict, Windows
from jobs.training.kernels import prepared
from jobs.training.mixed_hardware import Hardware, changes, differences, hardware, settle_rounding, why_refused
from jobs.training.run_writer import RunWriter
from jobs.training.shard_writer import ShardWriter
from jobs.training.step_record import StepRecord
from jobs.training.stored_state import restore
from jobs.training.validation import measured, samples, together
from jobs.workers.failures import why_give_up
from jobs.workers.incident_notes import write_down
from jobs.workers.placement import at_odds
from jobs.workers.preemption import Notices
from jobs.workers.worker_group import WorkerGroup
from model.checkpoint_folder import CheckpointError, Metadata
from model.gpt import GPT, initial_weights
from model.optimizer import learning_rate
from model.tokenizer import Tokenizer
from model.training_memory import keep_freed_memory


@dataclass(frozen=True)
class _Beginning:
    """The state from which rank 0 lets all ranks continue: fresh weights, without snapshot and checkpoint."""

    num_attempts: int = 0  # before this one
    unlike: Sequence[str] = ()  # why the same bits are not promised: how the hardware differs
    rollbacks: Windows = ()  # the steps to leave out
    checkpoint: str | None = None
    snapshot: Snapshot | None = None
    generation: int = 0
    saved_step: int = 0  # of the newest checkpoint, which is no newer than the snapshot
    stop_reason: str | None = None  # why neither this attempt nor a later one can continue


class Attempt:
    """One worker's model and rows, and on rank 0 the writer of the ledger and the checkpoints."""

    state: TrainState
    guard: GuardState  # belongs to `state`
    is_hopeless: bool  # earlier attempts made no progress, or none can: the ledger says why, and nothing else is there

    def __init__(self, plan: RunPlan, group: WorkerGroup, opened: ExitStack, *, signals: Callable[[], object]) -> None:
        """Begins. `opened` ends the attempt's threads; the next attempt repeats what was not stored by then."""
        self.plan, self.group, config = plan, group, plan.config
        settle_rounding(config)
        keep_freed_memory()
        self.schedule = batch_schedule(config)
        self.checkpoints = RunCheckpoints(plan.run)
        device = torch.device("cuda", torch.cuda.current_device()) if config.scaling.use_gpu else torch.device("cpu")
        own_place = {"pid": os.getpid(), "node": os.environ.get(NODE_NAME_VARIABLE, socket.gethostname())}
        workers, kinds = zip(*group.gather((own_place, hardware(device))), strict=True)
        nodes = [worker["node"] for worker in workers]
        unlike = differences(kinds, nodes=nodes)
        self.writer: RunWriter | None = None
        # Rank 0 chooses the checkpoint for all: another rank might see a newer or a damaged one.
        self.snapshots = Snapshots(plan.launch, group)
        begun = group.broadcast(self._begin(opened, unlike, kinds[0]) if group.rank == 0 else None)
        self.ledger = self.writer.ledger if self.writer else None
        self.is_hopeless = begun.stop_reason is not None
        if begun.stop_reason is not None:
            if self.writer:
                self.writer.give_up(begun.stop_reason)
            return
        restored_step = self._restore(begun, device, opened)
        self.generation = begun.generation
        self.train_rows, self.held_out = open_stream(plan), open_held_out(plan)
        # A checkpoint has the template that its conversations were written with.
        self.tokenizer = Tokenizer.from_json(plan.tokenizer_json, self.train_rows.manifest.chat)
        self.shards: ShardWriter | None = None
        if not self.state.sharding.is_whole:
            complete = self.writer.saving.complete if self.writer else None
            publish = partial(complete, config=config.model, tokenizer=self.tokenizer) if complete else None
            checkpoints = self.writer.checkpoints if self.writer else self.checkpoints  # rank 0's are fenced
            self.shards = ShardWriter(checkpoints, self.state.sharding, group, self.ledger, publish)
            opened.callback(self.shards.abandon)
        kernels = prepared(plan, group, device, kinds[group.rank])
        self.guard = replace(self.guard, rollbacks=begun.rollbacks)
        self.first_step, self.guard = self.guard.entering(restored_step + 1)
        self.val_sets = open_validation_sets(plan)
        self.eot_id = self.tokenizer.start_id if config.train.document_mask else None
        self.gradient = BatchGradient(config, self.state, self.train_rows, group, eot_id=self.eot_id)
        opened.callback(self.gradient.close)
        self.attempt = 1 + begun.num_attempts
        self.notices = Notices(plan.run, group, signals)
        opened.callback(self.notices.close)
        group.gather("prepared")  # else the first step would seem to take what others still prepare
        self.record = StepRecord(plan, self.state, group, ledger=self.ledger, attempt=self.attempt, nodes=nodes)
        if self.ledger:
            self.ledger.event(
                "start",
                attempt=self.attempt,
                world_size=group.world_size,
                step=restored_step,
                checkpoint=begun.checkpoint,
                from_memory=begun.snapshot is not None,
                workers=workers,
                data_identity=self.train_rows.manifest.identity,
                **self._division(),
                code_version=plan.code_version,
                precision=config.train.precision,
                compute=way_to_compute(config),
                hardware=kinds[0],
                **({"kernels": kernels} if kernels else {}),
            )
            self._record_precision()
            if begun.unlike:
                self.ledger.event("tolerance_mode", attempt=self.attempt, reasons=begun.unlike)
        if begun.snapshot and restored_step - begun.saved_step >= config.checkpoint.save_every_steps:
            # The checkpoint that was due had not been stored yet.
            self.save(restored_step, begun.snapshot.header.carried["validation"])

    def rate(self, step: int) -> float:
        train = self.plan.config.train
        return learning_rate(
            self.schedule.tokens_seen(step),
            peak=train.learning_rate,
            warmup_tokens=warmup_tokens(self.plan.config),
            decay_tokens=train.decay_tokens or train.max_tokens,
            min_ratio=train.min_learning_rate_ratio,
            cooldown_tokens=cooldown_tokens(self.plan.config),
        )

    def validate(self, step: int, *, moves: Callable[[], None]) -> dict[str, Any]:
        """Returns the figures of what is held out, or else of all sets together, None for what is not finite. Records
        them with samples and the figures of each set. `moves` is called before each batch."""
        config = self.plan.config
        measure = partial(measured, config=config, state=self.state, group=self.group, eot_id=self.eot_id, moves=moves)
        held_out = [measure(self.held_out)] if self.held_out else []
        measured_sets = {name: measure(rows) for name, rows in self.val_sets.items()}
        if not held_out and not measured_sets:
            return {}  # a replay of a run that only sets validate: its steps need none of them
        figures = together(held_out or list(measured_sets.values())).figures
        sets = {name: text.figures for name, text in measured_sets.items()}
        completed = []
        if self.ledger or self.state.gathered:
            with self.state.weights_in_use(), autocast(config, self.state.device):
                completed = samples(self.state.model, self.tokenizer, config.train)
        if self.ledger:
            self.ledger.event("validation", step=step, **figures, **({"sets": sets} if sets else {}), samples=completed)
        return {name: value if math.isfinite(value) else None for name, value in figures.items()}

    def save(self, step: int, validation: dict[str, Any], *, must: bool = False) -> None:
        """Copies the state; the copy is stored while training continues: in shards by those that own them, or where it
        is not sharded, by rank 0. With `must` it is, whatever is still being stored."""
        config, manifest = self.plan.config, self.train_rows.manifest
        metadata = Metadata(
            run_id=str(config.run_id),
            step=step,
            tokens_seen=self.schedule.tokens_seen(step),
            data_manifest_hash=manifest.hash,
            data_identity=manifest.identity,
            generation=self.generation,
            code_version=self.plan.code_version,
            precision=config.train.precision,
            guard=asdict(self.guard),
            **validation,
        )
        if self.shards:
            self.shards.save(metadata, self.state, must=must)
        elif self.writer:
            self.writer.saving.save(metadata, self.state, self.tokenizer)

    def keep(self, step: int, validation: dict[str, Any]) -> None:
        """Begins a snapshot of the state after a step whose line the ledger has, if one is due.

        One is due before each step that does more than train: that step's update takes this state away, and another
        worker may be lost before the step has a line.
        """
        carried = {"guard": asdict(self.guard), "line": self.record.line, "validation": validation}
        is_due = not self._only_trains(step + 1)
        news = self.snapshots.after_step(step, self.state, attempt=self.attempt, carried=carried, is_due=is_due)
        if self.ledger and news:
            self.ledger.event("snapshots_off", step=step, attempt=self.attempt, reason=news)
        elif self.ledger and news is not None:
            self.ledger.event("snapshots_on", step=step, attempt=self.attempt)

    def _only_trains(self, step: int) -> bool:
        """Reports whether a line is all that a step leaves: it neither evaluates nor saves."""
        config = self.plan.config
        does_more = step % config.train.eval_every_steps == 0 or step % config.checkpoint.save_every_steps == 0
        return not does_more and step != self.schedule.max_steps

    def finish(self, step: int | None) -> None:
        """Returns once the storage has the attempt's last checkpoint and all of its ledger; `step` was its last one, if
        that stands."""
        if self.shards:
            self.shards.finish()
        if self.writer:
            self.writer.finish(step=step if step == self.schedule.max_steps else None)

    def leave(self, step: int, decision: Decision) -> bool:
        """Ends the attempt at a step that cannot stand. Returns whether another attempt continues."""
        continues = decision.verdict is Verdict.ROLL_BACK
        if self.ledger and continues:
            first, last = decision.state.rollbacks[-1]
            left_out = self.schedule.samples_of(first, last)
            samples = [left_out.start, left_out.stop]
            self.ledger.event("rollback", step=step, first=first, last=last, samples=samples, reason=decision.reason)
        elif self.ledger:
            self.ledger.event("gave_up", step=step, reason=f"step {step}: {decision.reason}")
        self.finish(None)
        return continues

    def _division(self) -> dict[str, Any]:
        """Returns what the ledger says of the division, where it is not by whole documents."""
        division = self.plan.division
        known: dict[HeldOut, dict[str, Any]] = {
            HeldOut.DOCUMENTS: {},
            HeldOut.END: {"held_out": HeldOut.END.value, "end_tokens": division.end_tokens},
            HeldOut.NOTHING: {
                "held_out": HeldOut.NOTHING.value,
                "validated_on": {name: rows.manifest.identity for name, rows in self.val_sets.items()},
            },
        }
        return known[division.held_out]

    def _record_precision(self) -> None:
        """Records, once for each kind, a processor that is not made for the run's precision."""
        precision = self.plan.config.train.precision
        assert self.writer and self.ledger and precision != "auto", "rank 0 writes, once the precision is settled"
        found = at_odds(precision, "cuda" if self.state.device.type == "cuda" else "cpu")
        last = (self.writer.outline().events("precision") or [{}])[-1]
        if found and found["fast"] != last.get("fast"):
            self.ledger.event("precision", attempt=self.attempt, **found)

    def _begin(self, opened: ExitStack, unlike: list[str], kind: Hardware) -> _Beginning:
        try:
            self.writer = RunWriter(self.plan)
            opened.callback(self.writer.abandon)
            ledger, generation = self.writer.ledger, self.writer.fence.generation
            patiently(lambda: write_down(self.plan.run, ledger), "incidents")
            read, scaling = self.writer.outline(), self.plan.config.scaling
            num_attempts = len(read.world_sizes)
            rollbacks, left_out = read.rollbacks, GuardState(rollbacks=read.rollbacks).leaves_out
            if reason := why_give_up(read.lines, max_fruitless_attempts=scaling.max_fruitless_attempts):
                return _Beginning(stop_reason=reason)
            unlike = unlike + changes(read, kind)
            if reason := why_refused(self.plan.config, read, unlike):
                return _Beginning(stop_reason=reason)
            begun = _Beginning(num_attempts, unlike, rollbacks, generation=generation)
            saved_step = self.writer.newest_step(left_out=left_out)
            last = max((line["step"] for line in read.lines if line.get("event") in (None, "skip")), default=0)
            snapshot = self._newest_snapshot(last, at_least=saved_step, is_left_out=left_out)
            if snapshot is not None:
                patiently(self.writer.checkpoints.clear_spool, "checkpoints")  # what is due is saved from the snapshot
                return replace(begun, snapshot=snapshot, saved_step=saved_step)
            newest = patiently(partial(self.writer.newest_checkpoint, left_out=left_out), "checkpoints")
            return replace(begun, checkpoint=newest)
        except (LeaseLostError, CheckpointError) as error:
            return _Beginning(stop_reason=str(error))

    def _newest_snapshot(self, recorded: int, *, at_least: int, is_left_out: Callable[[int], bool]) -> Snapshot | None:
        """Returns the newest snapshot of a step that the ledger has, or of the step after it, whose line a lost rank 0
        had no time to write."""
        limits: dict[str, Any] = {"at_least": at_least, "is_left_out": is_left_out}
        owed = recorded + 1
        if self._only_trains(owed):
            snapshot = self.snapshots.newest(explained_step=owed, **limits)
            if snapshot is None or snapshot.header.step <= recorded:
                return snapshot
            if line := snapshot.header.carried["line"]:
                assert self.writer is not None, "rank 0 has it"
                self.writer.ledger.step(**line)
                return snapshot
        return self.snapshots.newest(explained_step=recorded, **limits)

    def _restore(self, begun: _Beginning, device: torch.device, opened: ExitStack) -> int:
        """Restores the snapshot or the checkpoint, or makes fresh weights; returns the step of that state."""
        config, name = self.plan.config, begun.checkpoint
        with torch.device("meta"):
            model = GPT(config.model)
        sharding = Sharding.of(config.scaling, rank=self.group.rank, world_size=self.group.world_size)
        self.state = TrainState(model, config.train, device=device, group=self.group, sharding=sharding)
        opened.callback(self.state.close)
        if begun.snapshot:
            self.guard = GuardState.from_json(self.snapshots.restore(begun.snapshot, self.state)["guard"])
            self.group.prove(begun.snapshot.header.step, device)  # a checkpoint of it may be due
            return begun.snapshot.header.step
        if name is None:
            self.state.load_weights(initial_weights(config.model, config.train.seed))
            self.guard = GuardState()
            return 0
        restore(self.state, stored_state(self.checkpoints, name))
        metadata = metadata_of(self.checkpoints.uri(name))
        assert metadata is not None, "rank 0 has found it"
        self.guard = GuardState.from_json(metadata.guard) if metadata.guard else GuardState(last_applied=metadata.step)
        return metadata.step

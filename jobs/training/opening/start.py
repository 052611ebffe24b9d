"""Rank 0 chooses where all ranks of an attempt continue: at the newest snapshot or checkpoint that
the run's ledger vouches for."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from cluster.settings.run import RunConfig
from cluster.storage.lease import LeaseLostError
from jobs.run.ledger import Ledger, void
from jobs.run.ledger_outline import last_recorded
from jobs.run.run_plan import RunPlan
from jobs.run.storage_retry import patiently
from jobs.sentinel.consequences import AuditedAttempt
from jobs.sentinel.proven_part import NOT_AUDITED, ProvenPart, proven_part
from jobs.sentinel.way_back import WayBack, doubtful_step, pending, why_no_further
from jobs.snapshots.choice import Snapshot
from jobs.snapshots.kept_copies import goes_back_from_snapshots
from jobs.snapshots.snapshots import Snapshots
from jobs.training.attempt import only_trains
from jobs.training.guards import GuardState, Windows
from jobs.training.mixed_hardware import Hardware, changes, differences, why_refused
from jobs.training.run_writer import RunWriter
from jobs.workers.failures import why_give_up
from jobs.workers.incident_notes import write_down
from raymill.errors import CheckpointError
from raymill.workers.worker_group import WorkerGroup


@dataclass(frozen=True)
class Workers:
    """Where the workers of an attempt run, by rank."""

    places: Sequence[dict[str, Any]]
    kinds: Sequence[Hardware]
    met_s: float  # on this process's clock: when they had met

    @property
    def nodes(self) -> list[str]:
        return [place["node"] for place in self.places]


@dataclass(frozen=True)
class Opening:
    """One worker's part of an attempt that begins."""

    plan: RunPlan
    group: WorkerGroup
    workers: Workers
    device: torch.device
    opened: ExitStack
    """Ends what the attempt has opened."""


@dataclass(frozen=True)
class Start:
    """The state from which rank 0 lets all ranks continue: fresh weights, where it names neither a
    snapshot nor a checkpoint."""

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


def chosen_start(opening: Opening, snapshots: Snapshots) -> tuple[RunWriter | None, Start | str]:
    """Returns the run's writer, unless another launcher's has taken its place, and where all ranks
    continue, or why they cannot."""
    writer = None
    try:
        writer = RunWriter(opening.plan)
        opening.opened.callback(writer.abandon)
        return writer, _choose(opening, writer, snapshots)
    except (LeaseLostError, CheckpointError) as error:
        return writer, str(error)


def _choose(opening: Opening, writer: RunWriter, snapshots: Snapshots) -> Start | str:
    """Raises `LeaseLostError`, and `CheckpointError` where the run's checkpoints are damaged or do
    not fit it."""
    plan, workers = opening.plan, opening.workers
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
    start = Start(
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

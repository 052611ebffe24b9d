"""Writes a run's ledger and checkpoints for one attempt, and finds the state from which that
continues."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.settings.run import max_steps
from cluster.storage.registry import publications, served_checkpoints
from cluster.storage.uris import open_storage
from jobs.run.checkpoints import RunCheckpoints, generation_of, step_of
from jobs.run.costs.budget import Budget
from jobs.run.end import End
from jobs.run.ledger import LEDGER, Ledger, LedgerWriter, Void
from jobs.run.ledger_outline import LedgerOutline, last_step
from jobs.run.run_plan import RunPlan
from jobs.run.storage_retry import patiently
from jobs.run.writer_generation import Fence
from jobs.saving.publisher import Publisher, checkpoint_fields, published_in
from model.config import shape_differences
from model.files.checkpoint_folder import verify_checkpoint
from model.files.hf_config import read_shape
from raymill.errors import CheckpointError

_NOT_PROVEN = "a worker that computed for it was found wrong, and its steps were taken again"


class RunWriter:
    """Rank 0's writer. It waits while the storage is down, and raises `LeaseLostError` when a newer
    launcher writes the run."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan
        self.fence = patiently(lambda: Fence(plan.run, launcher=plan.launcher), "the run")
        self.ledger = patiently(lambda: LedgerWriter(plan.run, self.fence), "ledger")
        self.checkpoints = RunCheckpoints(plan.run, self.fence)
        self.budget = None if plan.replay else Budget(plan.config.scaling)
        self._outline = LedgerOutline(f"{plan.run.uri}/{LEDGER}")
        checkpoints = self.outline().events("checkpoint")
        self._published = {line["checkpoint"].rsplit("/", 1)[1]: line for line in checkpoints}
        losses = {
            name: line["val_loss"]
            for name, line in self._published.items()
            if line.get("val_loss") is not None
        }
        keep = plan.config.checkpoint
        self.publisher = Publisher(
            self.checkpoints, self.ledger, keep, pinned=self._pinned, val_losses=losses
        )

    def outline(self) -> Ledger:
        """Returns the outline of the ledger so far; what it had at an earlier call is not read
        again."""
        return self._outline.add(self.ledger.blocks(start=self._outline.num_bytes))

    def kept_steps(self) -> list[int]:
        """Returns the steps of the stored checkpoints."""
        names = patiently(lambda: self.checkpoints.names, "checkpoints")
        return [step_of(name) for name in names]

    def set_aside(self, ways_back: Sequence[Void]) -> None:
        """Marks the checkpoints behind which the run went back, since a worker was found wrong."""

        def mark() -> None:
            self.checkpoints.recover()
            for name in self.checkpoints.names:
                if any(way.covers(step_of(name), generation_of(name)) for way in ways_back):
                    self.checkpoints.quarantine(name, [_NOT_PROVEN])

        if ways_back:
            patiently(mark, "checkpoints")

    def newest_step(self, *, left_out: Callable[[int], bool]) -> int:
        """Returns the step of the newest checkpoint that no rollback left out, whole or not; 0
        where there is none."""
        names = patiently(lambda: self.checkpoints.names, "checkpoints")
        return max((step for name in names if not left_out(step := step_of(name))), default=0)

    def record_unlisted(self) -> None:
        """Records the checkpoints whose writer was killed before it could, once they are whole: no
        other ones count as the run's own. Raises `StorageError`."""
        for name in self.checkpoints.names:
            if name in self._published:
                continue
            with tempfile.TemporaryDirectory(prefix="raymill-unlisted-") as scratch:
                folder = self.checkpoints.fetch(name, Path(scratch))
                if verify_checkpoint(folder):
                    continue  # `newest_checkpoint` marks it
                fields = checkpoint_fields(self.checkpoints.uri(name), published_in(folder))
            self.ledger.event("checkpoint", **fields, seconds=0.0)
            self._published[name] = fields

    def newest_checkpoint(
        self, *, left_out: Callable[[int], bool], may_start_over: bool
    ) -> str | None:
        """Returns the newest whole checkpoint of a step that no rollback left out; None when the
        run has none, or `may_start_over`.

        Damaged ones are marked, and recorded in the ledger. Raises `CheckpointError` when all
        checkpoints are damaged, as a run never silently starts over, and when the newest has
        another shape or vocabulary than the settings; `StorageError` in an outage.
        """
        self.checkpoints.recover()
        self.record_unlisted()
        with tempfile.TemporaryDirectory(prefix="raymill-newest-") as scratch:
            folder, damaged = self.checkpoints.find(Path(scratch), left_out=left_out)
            name = folder.name if folder else None
            if folder:
                self._check_settings(folder)
        for torn in self.checkpoints.torn:
            if torn in self._published and torn > (name or ""):
                damaged[torn] = ["its manifest is missing"]
        for torn, problems in damaged.items():
            self.checkpoints.quarantine(torn, problems)
            self.ledger.event(
                "checkpoint_damaged", checkpoint=self.checkpoints.uri(torn), problems=problems
            )
        quarantined = self.checkpoints.quarantined
        if name is None and quarantined and not may_start_over:
            raise CheckpointError(
                f"all checkpoints of {self._plan.run.uri} are damaged: {', '.join(quarantined)}. None was deleted; "
                "restore one from a copy and remove its file QUARANTINED, or choose another --run-id"
            )
        train = self._plan.config.train
        source = None if train.lora_rank else train.init_from  # an adapter begins from a seed
        if name is None and source:
            raise CheckpointError(
                f"{self._plan.run.uri} began from {source}; its checkpoint of step 0 is gone: choose another --run-id"
            )
        self.publisher.verified |= {name} if name else set()
        return name

    def _check_settings(self, folder: Path) -> None:
        differing = [
            f"{name} {saved}, expected {wanted}"
            for name, (saved, wanted) in shape_differences(
                read_shape(folder), self._plan.config.model
            ).items()
        ]
        if (folder / "tokenizer.json").read_bytes() != self._plan.tokenizer_json:
            differing.append("another tokenizer than is under tokenizers/ now")
        if differing:
            raise CheckpointError(
                f"checkpoint {folder.name} of run {self._plan.config.run_id} has {'; '.join(differing)}. Set these as "
                "they were, or choose another --run-id"
            )

    def close(self, end: End | None) -> None:
        """Returns once the storage has the whole ledger, with the line of a run that has come to its
        end. It has not where the last checkpoint was refused: a resume repeats the steps since the
        one before."""
        if end is End.FINISHED:
            step = max_steps(self._plan.config)
            saves = self.outline().events("checkpoint", "checkpoint_refused")
            if saves and saves[-1]["event"] == "checkpoint_refused":
                reason = f"the checkpoint of step {saves[-1]['step']} was not stored: {saves[-1]['reason']}"
                reason += ". The same --run-id repeats the steps since the one before"
                self.ledger.event(End.GAVE_UP, step=step, reason=reason)
            else:
                self.ledger.event(End.FINISHED, step=step)
        self.ledger.close()

    def give_up(self, reason: str) -> None:
        """Records that the run ends before it is done, and why."""
        self.ledger.event(End.GAVE_UP, reason=reason, step=last_step(self.outline()))
        self.ledger.close()

    def abandon(self) -> None:
        """Leaves what is not stored yet to the next attempt, which shuts this one out."""
        self.ledger.abandon()

    def _pinned(self) -> set[str]:
        """Returns the names of this run's checkpoints that are published or served by now."""
        prefix = f"{self._plan.run.uri}/checkpoints/"
        storage = open_storage(self._plan.config.storage.uri)
        used = {found.checkpoint for found in publications(storage)} | served_checkpoints(storage)
        return {uri.removeprefix(prefix) for uri in used if uri.startswith(prefix)}

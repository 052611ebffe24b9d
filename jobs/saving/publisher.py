"""Publishes stored checkpoints, records them in the ledger, and deletes those that they
supersede."""

import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.settings.run import CheckpointConfig
from jobs.run.checkpoints import RunCheckpoints, checkpoint_name, superseded
from jobs.run.ledger import LedgerWriter
from jobs.run.sharded_checkpoints import Reports, ShardedCheckpoint
from model.config import Shape
from model.files.checkpoint import descriptions
from model.files.checkpoint_folder import Metadata, verify_checkpoint
from model.shapes import parameter_shapes
from model.text.tokenizer import Tokenizer


class Publisher:
    """Rank 0's: one thread at a time calls it."""

    def __init__(
        self,
        checkpoints: RunCheckpoints,
        ledger: LedgerWriter,
        keep: CheckpointConfig,
        *,
        pinned: Callable[[], Collection[str]],
        val_losses: dict[str, float],
    ) -> None:
        """`pinned` returns the published checkpoints' names; `val_losses` are those of earlier
        attempts, by name."""
        self.checkpoints, self.ledger = checkpoints, ledger
        self.verified: set[str] = set()
        """Names of checkpoints that were read or written whole."""
        self.proven_to: int | None = None
        """The step up to which the run is proven so far; None where nothing is audited."""
        self._keep, self._pinned, self._val_losses = keep, pinned, val_losses

    def refuse(self, step: int, reason: str) -> None:
        """Records that a checkpoint is not published, and why."""
        self.ledger.event("checkpoint_refused", step=step, reason=reason)

    def publish(self, folder: Path, metadata: Metadata) -> bool:
        """Publishes a whole checkpoint from the spool. Returns whether it was sound: a damaged one
        is refused. Raises `StorageError`."""
        if problems := verify_checkpoint(folder):
            self.checkpoints.check_fence()  # a newer writer clears the spool
            self.refuse(metadata.step, "; ".join(problems))
            shutil.rmtree(folder, ignore_errors=True)
            return False
        self.ledger.mirror()
        self.checkpoints.publish(folder)
        return True

    def complete(
        self,
        checkpoint: ShardedCheckpoint,
        reports: Reports,
        metadata: Metadata,
        *,
        config: Shape,
        tokenizer: Tokenizer,
    ) -> Metadata | None:
        """Publishes a checkpoint whose shards are all stored. Returns its metadata with the
        weights' hash, and None where a rank refused its shard. Raises `StorageError`."""
        refusals = [report["refused"] for report in reports if "refused" in report]
        if refusals:
            self.refuse(metadata.step, refusals[0])
            return None
        metadata = replace(
            metadata, parameter_hash=checkpoint.parameter_hash(parameter_shapes(config))
        )
        self.ledger.mirror()
        checkpoint.complete(descriptions(config, tokenizer, metadata), reports)
        return metadata

    def record(self, metadata: Metadata, *, taken_at_s: float, exposed_s: float) -> None:
        """Records a published checkpoint, and deletes those that it supersedes. Times are on the
        monotonic clock."""
        name = checkpoint_name(metadata.step, metadata.generation)
        if metadata.val_loss is not None:
            self._val_losses[name] = metadata.val_loss
        self.ledger.event(
            "checkpoint",
            **checkpoint_fields(self.checkpoints.uri(name), metadata, proven_to=self.proven_to),
            seconds=round(time.monotonic() - taken_at_s, 6),
            exposed_seconds=round(exposed_s, 6),
        )
        self.verified.add(name)
        gone = superseded(
            self.checkpoints.names,
            self.checkpoints.torn,
            keep=self._keep,
            verified=self.verified,
            pinned=self._pinned(),
            val_losses=self._val_losses,
            proven_to=self.proven_to,
        )
        self.checkpoints.delete(gone)


def checkpoint_fields(
    uri: str, metadata: Metadata, *, proven_to: int | None = None
) -> dict[str, Any]:
    """Returns what the ledger records of a published checkpoint."""
    return {
        "step": metadata.step,
        "checkpoint": uri,
        "parameter_hash": metadata.parameter_hash,
        "generation": metadata.generation,
        "val_loss": metadata.val_loss,
        "proven_to": None if proven_to is None else min(proven_to, metadata.step),
    }

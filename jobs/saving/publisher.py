"""Publishes stored checkpoints, records them in the ledger, and deletes the checkpoints that they
supersede."""

import hashlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.settings.run import CheckpointConfig
from jobs.exact.stored_state import checksum_of
from jobs.run.checkpoints import RunCheckpoints, checkpoint_name, superseded
from jobs.run.ledger import LedgerWriter
from jobs.run.sharded_checkpoints import Reports, ShardedCheckpoint
from model.config import Shape
from model.files.checkpoint import descriptions
from model.files.checkpoint_folder import (
    MANIFEST,
    Metadata,
    fingerprint,
    manifest_files,
    read_metadata,
    state_files,
    verify_checkpoint,
)
from model.files.state_hash import WORDS, StateHashes, StoredState, state_in
from model.shapes import parameter_shapes
from model.text.tokenizer import Tokenizer
from raymill.errors import CheckpointError


@dataclass(frozen=True)
class Published:
    """A checkpoint as it is in the storage."""

    metadata: Metadata
    hashes: StateHashes
    manifest_hash: str  # the SHA-256 of its manifest, which has those of all its files


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

    def publish(self, folder: Path, metadata: Metadata, hashes: StateHashes) -> Published:
        """Publishes a whole checkpoint from the spool, which was read back. Raises
        `StorageError`."""
        manifest_hash = str(fingerprint(folder / MANIFEST)["sha256"])
        self.ledger.mirror()
        self.checkpoints.publish(folder)
        return Published(metadata, hashes, manifest_hash)

    def complete(
        self,
        checkpoint: ShardedCheckpoint,
        reports: Reports,
        metadata: Metadata,
        *,
        config: Shape,
        tokenizer: Tokenizer,
    ) -> Published | None:
        """Publishes a checkpoint whose shards are all stored. Returns None where a rank refused its
        shard. Raises `StorageError`."""
        refusals = [report["refused"] for report in reports if "refused" in report]
        if refusals:
            self.refuse(metadata.step, refusals[0])
            return None
        state = checkpoint.read_state(parameter_shapes(config))
        words = sum(entry["words"] for report in reports for entry in report.values())
        if state.words != words % WORDS:
            files = ", ".join(checkpoint.altered(reports)) or "the shards together"
            self.refuse(metadata.step, f"{files}, read back, are not what was in the state")
            return None
        metadata = replace(
            metadata, parameter_hash=state.hashes.parameters, state_checksum=checksum_of(words)
        )
        self.ledger.mirror()
        manifest = checkpoint.complete(descriptions(config, tokenizer, metadata), reports)
        return Published(metadata, state.hashes, hashlib.sha256(manifest).hexdigest())

    def record(self, published: Published, *, taken_at_s: float, exposed_s: float) -> None:
        """Records a published checkpoint, and deletes the checkpoints that it supersedes. Times are
        on the monotonic clock."""
        metadata = published.metadata
        name = checkpoint_name(metadata.step, metadata.generation)
        if metadata.val_loss is not None:
            self._val_losses[name] = metadata.val_loss
        self.ledger.event(
            "checkpoint",
            **checkpoint_fields(self.checkpoints.uri(name), published, proven_to=self.proven_to),
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


def read_back(folder: Path, metadata: Metadata) -> tuple[StoredState | None, list[str]]:
    """Reads what was written into a folder, and returns its state, and what is not as it was in the
    state that was copied: its checksum, the hash of the weights, or a file that its manifest has
    otherwise."""
    try:
        files = state_files(manifest_files(folder), place=str(folder))
        if problems := verify_checkpoint(folder, besides=files):
            return None, problems
        state = state_in(folder)
    except CheckpointError as error:
        return None, [str(error)]
    compared = {
        "the weights' hash": (state.hashes.parameters, metadata.parameter_hash),
        "the checksum": (checksum_of(state.words), metadata.state_checksum),
    }
    return state, [
        f"{', '.join(files)} read back: {what} is {found}, it was {wanted}"
        for what, (found, wanted) in compared.items()
        if wanted not in (None, found)
    ]


def published_in(folder: Path) -> Published:
    """Returns what a folder with a whole checkpoint was published as."""
    manifest_hash = str(fingerprint(folder / MANIFEST)["sha256"])
    return Published(read_metadata(folder), state_in(folder).hashes, manifest_hash)


def checkpoint_fields(
    uri: str, published: Published, *, proven_to: int | None = None
) -> dict[str, Any]:
    """Returns what the ledger records of a published checkpoint."""
    metadata = published.metadata
    return {
        "step": metadata.step,
        "checkpoint": uri,
        "parameter_hash": metadata.parameter_hash,
        "state_hash": published.hashes.of_state(metadata),
        "manifest_hash": published.manifest_hash,
        "generation": metadata.generation,
        "val_loss": metadata.val_loss,
        "proven_to": None if proven_to is None else min(proven_to, metadata.step),
    }

"""Publishes stored checkpoints, records them in the ledger, and deletes those that they
supersede."""

import hashlib
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.settings.run import CheckpointConfig
from jobs.run.checkpoints import RunCheckpoints, checkpoint_name, superseded
from jobs.run.ledger import LedgerWriter
from jobs.run.sharded_checkpoints import Reports, ShardedCheckpoint
from model.config import Shape
from model.files.checkpoint import descriptions
from model.files.checkpoint_folder import (
    MANIFEST,
    CheckpointError,
    Metadata,
    fingerprint,
    manifest_files,
    read_metadata,
    state_files,
    verify_checkpoint,
)
from model.files.state_hash import StateHashes, StoredState, state_in
from model.shapes import parameter_shapes
from model.text.tokenizer import Tokenizer


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

    def publish(self, folder: Path, metadata: Metadata, *, words: int) -> Published | None:
        """Publishes a whole checkpoint from the spool; `words` is the checksum of the vectors that
        were to be written. Returns None where it is refused, as its files are damaged. Raises
        `StorageError`."""
        state, problems = read_back(folder, metadata, words=words)
        if state is None or problems:
            self.checkpoints.check_fence()  # a newer writer clears the spool
            self.refuse(metadata.step, "; ".join(problems))
            shutil.rmtree(folder, ignore_errors=True)
            return None
        manifest_hash = str(fingerprint(folder / MANIFEST)["sha256"])
        self.ledger.mirror()
        self.checkpoints.publish(folder)
        return Published(metadata, state.hashes, manifest_hash)

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
        hashes = checkpoint.hashes(parameter_shapes(config))
        metadata = replace(metadata, parameter_hash=hashes.parameters)
        self.ledger.mirror()
        manifest = checkpoint.complete(descriptions(config, tokenizer, metadata), reports)
        return Published(metadata, hashes, hashlib.sha256(manifest).hexdigest())

    def record(self, published: Published, *, taken_at_s: float, exposed_s: float) -> None:
        """Records a published checkpoint, and deletes those that it supersedes. Times are on the
        monotonic clock."""
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


def read_back(
    folder: Path, metadata: Metadata, *, words: int
) -> tuple[StoredState | None, list[str]]:
    """Reads what was written into a folder, and returns its state, and what is damaged: another
    hash of the weights than they had in memory, other words of the vectors, or a file that its
    manifest does not know."""
    try:
        files = state_files(manifest_files(folder), place=str(folder))
        if problems := verify_checkpoint(folder, besides=files):
            return None, problems
        state = state_in(folder)
    except CheckpointError as error:
        return None, [str(error)]
    problems = []
    if state.hashes.parameters != metadata.parameter_hash:
        problems.append(
            f"{files[0]} has weights of the hash {state.hashes.parameters}, in memory they had "
            f"{metadata.parameter_hash}"
        )
    if state.words != words:
        problems.append(
            f"{files[-1]} has vectors of the checksum {state.words:016x}, in memory they had "
            f"{words:016x}"
        )
    return state, problems


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

"""Writes checkpoints while training continues: the state is copied, and a thread stores the copy.

    training        copy ── step ── step ── copy ── step …
    this thread         spool ── publish ── thin out   spool ── …

A newer copy replaces one that waits. Where the state is sharded, each worker's `shard_writer` stores its own parts,
and rank 0's completes the checkpoint.
"""

import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.settings.run import CheckpointConfig
from cluster.storage.uris import StorageError
from jobs.exact.state.host_copies import HostCopy
from jobs.exact.state.train_state import TrainState
from jobs.run.checkpoints import RunCheckpoints, checkpoint_name, superseded
from jobs.run.ledger import LedgerWriter
from jobs.run.saving_thread import SavingThread
from jobs.run.sharded_checkpoints import Reports
from jobs.run.storage_retry import Outage
from jobs.training.shard_writer import Shard
from jobs.training.stored_state import fill, vectors_by_name
from model.checkpoint import NotFiniteError, descriptions, write_checkpoint
from model.checkpoint_folder import Metadata, verify_checkpoint
from model.config import GPTConfig
from model.shapes import parameter_shapes
from model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Copy:
    """A copy of the state after a step, in its own memory."""

    metadata: Metadata
    flat: Tensor  # (V, P): the weights and the update rule's vectors
    write: Callable[[Path], Metadata]  # writes them into a folder, as `write_checkpoint` does
    taken_at_s: float  # on the monotonic clock
    from_device: HostCopy


class CheckpointWriter(SavingThread[Copy, tuple[Path, Copy]]):
    """Stores checkpoints in a thread of rank 0, which `finish` ends. One has begun while it is in the spool."""

    def __init__(
        self,
        checkpoints: RunCheckpoints,
        ledger: LedgerWriter,
        keep: CheckpointConfig,
        *,
        pinned: Callable[[], Collection[str]],
        val_losses: dict[str, float],
    ) -> None:
        """`pinned` returns the published checkpoints' names; `val_losses` are those of earlier attempts, by name."""
        self._checkpoints, self._ledger, self._keep = checkpoints, ledger, keep
        self._pinned, self._val_losses = pinned, val_losses
        self.verified: set[str] = set()  # names of checkpoints that were read or written whole
        self._free: list[Tensor] = []
        super().__init__("checkpoints", Outage("checkpoints", ledger.event))

    def save(self, metadata: Metadata, state: TrainState, tokenizer: Tokenizer) -> None:
        """Begins a copy of the state, which is not sharded, and has it stored. The ledger must hold its step already,
        as no checkpoint may be ahead of the ledger. Raises `LeaseLostError`."""
        start_s = time.monotonic()
        with self._changed:
            self._raise_failure()
            if self._pending is not None:
                self._free.append(self._pending.flat)
                self._pending = None
            # Writing to used memory is twice as fast as to fresh pages.
            flat = self._free.pop() if self._free else torch.empty(len(state.parts), state.layout.size)
        buffers = dict(zip(state.parts, flat, strict=True))
        copy = state.copies.start("checkpoint", [*state.parts.values()], partial(fill, flat.flatten()))
        write = partial(
            write_checkpoint,
            config=state.model.config,
            state=state.by_parameter(buffers["values"]),
            tokenizer=tokenizer,
            metadata=metadata,
            train_state=vectors_by_name(state, buffers),
        )
        with self._changed:
            self._pending = Copy(metadata, flat, write, start_s, copy)
            self._changed.notify_all()

    def complete(self, shard: Shard, reports: Reports, *, config: GPTConfig, tokenizer: Tokenizer) -> None:
        """Publishes a checkpoint in shards that are all stored; `shard` is this worker's. Raises `StorageError`."""
        metadata = shard.metadata
        if refusals := [report["refused"] for report in reports if "refused" in report]:
            self._ledger.event("checkpoint_refused", step=metadata.step, reason=refusals[0])
            shard.is_over = True
            return
        metadata = replace(metadata, parameter_hash=shard.checkpoint.parameter_hash(parameter_shapes(config)))
        self._ledger.mirror()
        shard.checkpoint.complete(descriptions(config, tokenizer, metadata), reports)
        shard.is_over = True
        self._record(metadata, shard.taken_at_s, exposed_s=shard.from_device.exposed_s)

    def _store(self) -> None:
        """Spools the pending copy and publishes the newest in the spool. Raises `StorageError` or `OSError`."""
        with self._changed:
            copy, self._pending = self._pending, None
        refusal: Exception | None = None
        if copy is not None:
            try:
                self._spool(copy)
            except (StorageError, OSError) as error:  # the disk may be full of a checkpoint that can be published now
                refusal = error
            with self._changed:
                if refusal is not None and self._pending is None:
                    self._pending = copy
                else:
                    self._free.append(copy.flat)
        if self._begun is not None:
            self._publish(*self._begun)
        if refusal is not None:
            raise refusal

    def _spool(self, copy: Copy) -> None:
        earlier, metadata = self._begun, copy.metadata
        folder = self._checkpoints.spool / checkpoint_name(metadata.step, metadata.generation)
        copy.from_device.future.result()
        try:
            metadata = copy.write(folder)
        except NotFiniteError as error:
            self._ledger.event("checkpoint_refused", step=metadata.step, reason=str(error))
            return
        if earlier is not None and earlier[0] != folder:
            shutil.rmtree(earlier[0])
        self._begun = folder, replace(copy, metadata=metadata)

    def _publish(self, folder: Path, copied: Copy) -> None:
        metadata = copied.metadata
        if problems := verify_checkpoint(folder):
            self._checkpoints.check_fence()  # a newer writer clears the spool
            self._ledger.event("checkpoint_refused", step=metadata.step, reason="; ".join(problems))
            shutil.rmtree(folder, ignore_errors=True)
            self._begun = None
            return
        self._ledger.mirror()
        self._checkpoints.publish(folder)
        self._begun = None
        self._record(metadata, copied.taken_at_s, exposed_s=copied.from_device.exposed_s)

    def _record(self, metadata: Metadata, taken_at_s: float, *, exposed_s: float) -> None:
        """Records a published checkpoint, and deletes those that it supersedes."""
        name = checkpoint_name(metadata.step, metadata.generation)
        if metadata.val_loss is not None:
            self._val_losses[name] = metadata.val_loss
        self._ledger.event(
            "checkpoint",
            **checkpoint_fields(self._checkpoints.uri(name), metadata),
            seconds=round(time.monotonic() - taken_at_s, 6),
            exposed_seconds=round(exposed_s, 6),
        )
        self.verified.add(name)
        gone = superseded(
            self._checkpoints.names,
            self._checkpoints.torn,
            keep=self._keep,
            verified=self.verified,
            pinned=self._pinned(),
            val_losses=self._val_losses,
        )
        self._checkpoints.delete(gone)


def checkpoint_fields(uri: str, metadata: Metadata) -> dict[str, Any]:
    """Returns what the ledger records of a published checkpoint."""
    return {
        "step": metadata.step,
        "checkpoint": uri,
        "parameter_hash": metadata.parameter_hash,
        "generation": metadata.generation,
        "val_loss": metadata.val_loss,
    }

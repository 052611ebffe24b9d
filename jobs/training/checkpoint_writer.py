"""Writes checkpoints while training continues: the state is copied, and a thread stores the copy.

    training        copy ── step ── step ── copy ── step …
    this thread         spool ── publish ── thin out   spool ── …

One copy is being stored and at most one waits; a newer copy replaces the waiting one. Whatever storage does, training
neither ends nor waits, except for its last checkpoint.
"""

import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.settings.run import CheckpointConfig
from cluster.storage.lease import LeaseLostError
from cluster.storage.uris import StorageError
from jobs.exact.host_copies import HostCopy
from jobs.exact.train_state import MOMENTS, TrainState, checkpoint_moments
from jobs.run.checkpoints import RunCheckpoints
from jobs.run.ledger import LedgerWriter
from jobs.run.retention import checkpoint_name, superseded
from jobs.run.storage_retry import Outage
from model.checkpoint import NotFiniteError, write_checkpoint
from model.checkpoint_folder import Metadata, verify_checkpoint
from model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Copy:
    """A copy of the state after a step, in its own memory."""

    metadata: Metadata
    flat: Tensor  # (3, P): the weights and the moments
    write: Callable[[Path], Metadata]  # writes them into a folder, as `write_checkpoint` does
    taken_at_s: float  # on the monotonic clock
    gathered_s: float  # for which training waited before the copy began
    from_device: HostCopy


class CheckpointWriter:
    """Stores checkpoints in a thread of rank 0, which `finish` ends."""

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
        self._outage = Outage("checkpoints", ledger.event)
        self._changed = threading.Condition()
        self._pending: Copy | None = None
        self._spooled: tuple[Path, Copy] | None = None  # in the spool, not yet published
        self._free: list[Tensor] = []
        self._is_finishing = self._is_abandoned = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self._thread.start()

    def save(self, metadata: Metadata, state: TrainState, tokenizer: Tokenizer) -> None:
        """Begins a copy of the state and has it stored. The ledger must hold its step already, as no checkpoint may be
        ahead of the ledger. Where it is sharded, the other ranks call `gather`. Raises
        `LeaseLostError`."""
        start_s = time.monotonic()
        with self._changed:
            self._raise_failure()
            if self._pending is not None:
                self._free.append(self._pending.flat)
                self._pending = None
            # Writing to used memory is twice as fast as to fresh pages.
            flat = self._free.pop() if self._free else torch.empty(1 + len(MOMENTS), state.layout.size)
        buffers = dict(zip(("values", *MOMENTS), flat, strict=True))
        if state.is_sharded:
            state.gather(buffers, step=metadata.step)
        gathered_s = time.monotonic() - start_s
        tensors = state.whole_parts
        copy = state.copies.start("checkpoint", tensors, partial(_fill, flat.flatten()))
        write = partial(
            write_checkpoint,
            config=state.model.config,
            state=state.by_parameter(buffers["values"]),
            tokenizer=tokenizer,
            metadata=metadata,
            train_state=checkpoint_moments(state, buffers),
        )
        with self._changed:
            self._pending = Copy(metadata, flat, write, start_s, gathered_s, copy)
            self._changed.notify_all()

    def finish(self) -> None:
        """Returns once the last copy is published and the others are thinned out. Raises `LeaseLostError`."""
        with self._changed:
            self._is_finishing = True
            self._changed.notify_all()
        self._thread.join()
        self._raise_failure()

    def abandon(self) -> None:
        """Starts nothing more, and does not wait for the copy that is being stored."""
        with self._changed:
            self._pending, self._is_abandoned = None, True
            self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        try:
            while self._has_work():
                try:
                    self._store()
                except LeaseLostError:
                    raise
                except (StorageError, OSError) as error:
                    wait_s = self._outage.failed(error)
                    with self._changed:  # a newer copy is worth a try at once
                        waiting = self._pending
                        self._changed.wait_for(lambda: self._pending is not waiting, timeout=wait_s)  # noqa: B023
                else:
                    self._outage.over()
        except BaseException as error:  # raised again in the training's thread
            self._failure = error

    def _has_work(self) -> bool:
        """Waits for work; returns False once there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._spooled or self._is_finishing or self._is_abandoned)
            return bool(self._pending or self._spooled) and not self._is_abandoned

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
        if self._spooled is not None:
            self._publish(*self._spooled)
        if refusal is not None:
            raise refusal

    def _spool(self, copy: Copy) -> None:
        earlier, metadata = self._spooled, copy.metadata
        folder = self._checkpoints.spool / checkpoint_name(metadata.step, metadata.generation)
        copy.from_device.taken.result()
        try:
            metadata = copy.write(folder)
        except NotFiniteError as error:
            self._ledger.event("checkpoint_refused", step=metadata.step, reason=str(error))
            return
        if earlier is not None and earlier[0] != folder:
            shutil.rmtree(earlier[0])
        self._spooled = folder, replace(copy, metadata=metadata)

    def _publish(self, folder: Path, copied: Copy) -> None:
        metadata = copied.metadata
        if problems := verify_checkpoint(folder):
            self._checkpoints.check_fence()  # a newer writer clears the spool
            self._ledger.event("checkpoint_refused", step=metadata.step, reason="; ".join(problems))
            shutil.rmtree(folder, ignore_errors=True)
            self._spooled = None
            return
        self._ledger.mirror()
        self._checkpoints.publish(folder)
        self._spooled = None
        if metadata.val_loss is not None:
            self._val_losses[folder.name] = metadata.val_loss
        self._ledger.event(
            "checkpoint",
            **checkpoint_fields(self._checkpoints.uri(folder.name), metadata),
            seconds=round(time.monotonic() - copied.taken_at_s, 6),
            exposed_seconds=round(copied.gathered_s + copied.from_device.exposed_s, 6),
        )
        self.verified.add(folder.name)
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


def _fill(flat: Tensor, pieces: Iterator[Tensor]) -> None:
    """Copies the pieces to the beginning of a vector, end to end."""
    end = 0
    for piece in pieces:
        flat[end : (end := end + len(piece))].copy_(piece)

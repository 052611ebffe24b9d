"""Checkpoints written beside the training: it copies its state, and a thread stores the copy for as long as that takes.

    training        copy ── step ── step ── copy ── step …
    this thread         spool ── publish ── thin out   spool ── …

One copy is being stored and at most one waits; a newer one takes its place. Nothing that storage does ends or holds up
the training, which waits for its last checkpoint alone.
"""

import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.settings.run import CheckpointConfig
from cluster.storage.lease import LeaseLostError
from cluster.storage.uris import StorageError
from jobs.exact.train_state import TrainState, checkpoint_moments
from jobs.run.checkpoints import RunCheckpoints
from jobs.run.ledger import LedgerWriter
from jobs.run.retention import checkpoint_name
from jobs.run.storage_retry import Outage
from model.checkpoint import Metadata, NotFiniteError, verify_checkpoint, write_state
from model.tokenizer import Tokenizer

Tensors = dict[str, Tensor]

SPOOL_BYTES = 32 << 30
"""Local disk for checkpoints on their way to remote storage; the newest one is always written."""


@dataclass(frozen=True)
class Copy:
    """The state after a step, in memory of its own."""

    metadata: Metadata
    flat: Tensors  # "values" and the moments, (P,) each
    num_updates: int
    taken_at_s: float  # on the monotonic clock
    exposed_s: float  # that the training waited for it


class CheckpointWriter:
    """Rank 0's thread that stores checkpoints. `finish` ends it."""

    def __init__(
        self,
        checkpoints: RunCheckpoints,
        ledger: LedgerWriter,
        keep: CheckpointConfig,
        *,
        state: TrainState,
        tokenizer: Tokenizer,
        pinned: Callable[[], Collection[str]],
        verified: Collection[str] = (),
        val_losses: Mapping[str, float] | None = None,
    ) -> None:
        """`pinned` names the published checkpoints, `verified` and `val_losses` what earlier attempts leave."""
        self._checkpoints, self._ledger, self._keep = checkpoints, ledger, keep
        self._state, self._tokenizer, self._pinned = state, tokenizer, pinned
        self._verified, self._val_losses = set(verified), dict(val_losses or {})
        self._outage = Outage("checkpoints", ledger.event)
        self._changed = threading.Condition()
        self._pending: Copy | None = None
        self._spooled: Path | None = None  # written to the spool, not yet published
        self._copied: Copy | None = None  # what that was made from, without its memory
        self._free: list[Tensors] = []
        self._is_finishing = self._is_abandoned = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self._thread.start()

    def save(self, metadata: Metadata, moments: Mapping[str, Tensor]) -> None:
        """Copies the state, into the memory of an earlier copy where one is free, and has the copy stored.

        The ledger must hold its step already: no checkpoint is ahead of the ledger. Raises `LeaseLostError`.
        """
        start_s = time.monotonic()
        with self._changed:
            self._raise_failure()
            if self._pending is not None:
                self._free.append(self._pending.flat)
                self._pending = None
            buffers = self._free.pop() if self._free else {}
        for name, tensor in {"values": self._state.values, **moments}.items():
            if name not in buffers:  # memory that was written to before is twice as fast as fresh pages
                buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            buffers[name].copy_(tensor)
        with self._changed:
            self._pending = Copy(
                metadata, buffers, self._state.num_updates, start_s, exposed_s=time.monotonic() - start_s
            )
            self._changed.notify_all()

    def finish(self) -> None:
        """Returns once the last copy is published and the others are thinned out. Raises `LeaseLostError`."""
        with self._changed:
            self._is_finishing = True
            self._changed.notify_all()
        self._thread.join()
        self._raise_failure()

    def abandon(self) -> None:
        """Starts nothing more, and does not wait for what is being stored."""
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
                    with self._changed:  # something newer is worth a try at once
                        waiting = self._pending
                        self._changed.wait_for(lambda: self._pending is not waiting, timeout=wait_s)  # noqa: B023
                else:
                    self._outage.over()
        except BaseException as error:  # raised again in the training's thread
            self._failure = error

    def _has_work(self) -> bool:
        """Waits for work; False once there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._spooled or self._is_finishing or self._is_abandoned)
            return bool(self._pending or self._spooled) and not self._is_abandoned

    def _store(self) -> None:
        """Spools what is pending, publishes the newest of the spool. Raises `StorageError` or `OSError`."""
        with self._changed:
            copy, self._pending = self._pending, None
        refusal: Exception | None = None
        if copy is not None:
            try:
                self._spool(copy)
            except (StorageError, OSError) as error:  # the disk may be full of what can be published now
                refusal = error
            with self._changed:
                if refusal is not None and self._pending is None:
                    self._pending = copy
                else:
                    self._free.append(copy.flat)
        if self._spooled is not None:
            self._publish(self._spooled)
        if refusal is not None:
            raise refusal

    def _spool(self, copy: Copy) -> None:
        earlier, metadata = self._spooled, copy.metadata
        folder = self._checkpoints.spool / checkpoint_name(metadata.step, metadata.generation)
        size = sum(tensor.nbytes for tensor in copy.flat.values())
        if earlier is not None and 2 * size > SPOOL_BYTES:
            self._spooled = None
            shutil.rmtree(earlier)
        try:
            metadata = write_state(
                folder,
                config=self._state.model.config,
                state=self._state.by_parameter(copy.flat["values"]),
                tokenizer=self._tokenizer,
                metadata=metadata,
                train_state=checkpoint_moments(self._state, copy.flat, num_updates=copy.num_updates),
            )
        except NotFiniteError as error:
            self._ledger.event("checkpoint_refused", step=metadata.step, reason=str(error))
            return
        if self._spooled is not None and self._spooled != folder:
            shutil.rmtree(self._spooled)
        self._spooled, self._copied = folder, replace(copy, metadata=metadata, flat={})

    def _publish(self, folder: Path) -> None:
        copied = self._copied
        assert copied is not None
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
            exposed_seconds=round(copied.exposed_s, 6),
        )
        self._verified.add(folder.name)
        self._checkpoints.thin_out(
            self._keep, verified=self._verified, pinned=self._pinned(), val_losses=self._val_losses
        )


def checkpoint_fields(uri: str, metadata: Metadata) -> dict[str, Any]:
    """What the ledger says of a published checkpoint."""
    return {
        "step": metadata.step,
        "checkpoint": uri,
        "parameter_hash": metadata.parameter_hash,
        "generation": metadata.generation,
        "val_loss": metadata.val_loss,
    }

"""Writes checkpoints while training continues: the state is copied, and a thread stores the copy.

    training        copy ── step ── step ── copy ── step …
    this thread         spool ── publish ── thin out   spool ── …

A newer copy replaces one that waits. Where the state is sharded, `shard_writer` stores it instead.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cluster.storage.uris import StorageError
from jobs.exact.state.host_copies import HostCopy
from jobs.exact.state.train_state import TrainState
from jobs.exact.stored_state import cut_up, fill, vectors_by_name
from jobs.run.checkpoints import checkpoint_name
from jobs.run.storage_retry import Outage
from jobs.saving.publisher import Publisher
from jobs.saving.saving_thread import SavingThread
from model.files.checkpoint import NotFiniteError, write_checkpoint
from model.files.checkpoint_folder import Metadata
from model.files.state_hash import COUNT, words_in
from model.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Copy:
    """A copy of the state after a step, in its own memory."""

    metadata: Metadata
    flat: Tensor  # (n,): the weights and the update rule's vectors, end to end
    vectors: Sequence[Tensor]  # views of those of the rule, by parameter
    write: Callable[[Path], Metadata]  # writes them into a folder, as `write_checkpoint` does
    taken_at_s: float  # on the monotonic clock
    from_device: HostCopy
    words: int = 0  # the checksum of the vectors


class CheckpointWriter(SavingThread[Copy, tuple[Path, Copy]]):
    """The `Saver` of a state that is whole on each rank: a thread of rank 0, which `finish` ends.

    A checkpoint has begun while it is in the spool.
    """

    def __init__(self, publisher: Publisher, tokenizer: Tokenizer) -> None:
        self._publisher, self._tokenizer = publisher, tokenizer
        self._free: list[Tensor] = []
        super().__init__("checkpoints", Outage("checkpoints", publisher.ledger.event))

    def save(self, metadata: Metadata, state: TrainState, *, must: bool) -> bool:
        """Takes the copy at once, and whatever `must` is: it replaces one that waits."""
        start_s = time.monotonic()
        with self._changed:
            self._raise_failure()
            if self._pending is not None:
                self._free.append(self._pending.flat)
                self._pending = None
            # Writing to used memory is twice as fast as to fresh pages.
            lengths = {name: len(part) for name, part in state.parts.items()}
            flat = self._free.pop() if self._free else torch.empty(sum(lengths.values()))
        buffers = cut_up(flat, lengths)
        train_state = vectors_by_name(state, buffers)
        vectors = [tensor for name, tensor in train_state.items() if name != COUNT]
        copy = state.copies.start("checkpoint", [*state.parts.values()], partial(fill, flat))
        write = partial(
            write_checkpoint,
            config=state.decoder.config,
            state=state.by_parameter(buffers["values"]),
            tokenizer=self._tokenizer,
            metadata=metadata,
            train_state=train_state,
        )
        with self._changed:
            self._pending = Copy(metadata, flat, vectors, write, start_s, copy)
            self._changed.notify_all()
        return True

    def _store(self) -> None:
        """Spools the pending copy and publishes the newest in the spool. Raises `StorageError` or
        `OSError`."""
        with self._changed:
            copy, self._pending = self._pending, None
        refusal: Exception | None = None
        if copy is not None:
            try:
                self._spool(copy)
            except (
                StorageError,
                OSError,
            ) as error:  # the disk may be full of a checkpoint that can be published now
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
        folder = self._publisher.checkpoints.spool / checkpoint_name(
            metadata.step, metadata.generation
        )
        copy.from_device.future.result()
        words = words_in(copy.vectors)
        try:
            metadata = copy.write(folder)
        except NotFiniteError as error:
            self._publisher.refuse(metadata.step, str(error))
            return
        if earlier is not None and earlier[0] != folder:
            shutil.rmtree(earlier[0])
        self._begun = folder, replace(copy, metadata=metadata, words=words)

    def _publish(self, folder: Path, copied: Copy) -> None:
        published = self._publisher.publish(folder, copied.metadata, words=copied.words)
        self._begun = None
        if published:
            exposed_s = copied.from_device.exposed_s
            self._publisher.record(published, taken_at_s=copied.taken_at_s, exposed_s=exposed_s)

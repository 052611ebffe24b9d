"""Writes checkpoints while training continues: the state is copied, and a thread stores the copy.

    training        copy ── step ── step ── copy ── step …
    this thread         spool ── publish ── thin out   spool ── …

A newer copy replaces one that waits. Where the state is sharded, `shard_writer` stores it instead.
"""

import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cluster.storage.uris import StorageError
from jobs.exact.run_state import decoder_of
from jobs.exact.stored_state import checksum_of, cut_up, fill, vectors_by_name, words_of_share
from jobs.run.checkpoints import checkpoint_name
from jobs.run.storage_retry import Outage
from jobs.saving.publisher import Publisher, read_back
from jobs.saving.saving_thread import SavingThread
from model.files.checkpoint import NotFiniteError, write_checkpoint
from model.files.checkpoint_folder import Metadata, verify_checkpoint
from model.files.state_hash import COUNT, StateHashes, words_in
from model.text.tokenizer import Tokenizer
from raymill.state.host_copies import HostCopy
from raymill.state.train_state import TrainState

_POLL_S = 0.05
_MOST_COPIES = 2  # of the last state, where the first one was damaged


@dataclass(frozen=True)
class Copy:
    """A copy of the state after a step, in its own memory."""

    metadata: Metadata
    flat: Tensor  # (n,): the weights and the update rule's vectors, end to end
    tensors: Sequence[Tensor]  # views of those that are stored
    write: Callable[[Path], Metadata]  # writes them into a folder, as `write_checkpoint` does
    taken_at_s: float  # on the monotonic clock
    from_device: HostCopy


@dataclass(frozen=True)
class Spooled:
    """A checkpoint on its way from the spool."""

    folder: Path
    copy: Copy  # whose memory may be another copy's by now
    metadata: Metadata  # with the weights' hash
    hashes: StateHashes


class CheckpointWriter(SavingThread[Copy, Spooled]):
    """The `Saver` of a state that is whole on each rank: a thread of rank 0, which `finish` ends.

    A checkpoint has begun while it is in the spool. One that is not what was in the state, in this
    process's memory or on the disk, is refused, and `wants_again` until the next copy.
    """

    def __init__(self, publisher: Publisher, tokenizer: Tokenizer) -> None:
        self._publisher, self._tokenizer = publisher, tokenizer
        self._free: list[Tensor] = []
        self._last: tuple[Metadata, TrainState] | None = None
        self.wants_again = False
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
        weights, train_state = (
            state.by_parameter(buffers["values"]),
            vectors_by_name(state, buffers),
        )
        vectors = [tensor for name, tensor in train_state.items() if name != COUNT]
        words = words_of_share(state, state.parts)
        metadata = replace(metadata, state_checksum=checksum_of(words))
        self._last, self.wants_again = (metadata, state), False
        copy = state.copies.start("checkpoint", [*state.parts.values()], partial(fill, flat))
        write = partial(
            write_checkpoint,
            config=decoder_of(state).config,
            state=weights,
            tokenizer=self._tokenizer,
            metadata=metadata,
            train_state=train_state,
        )
        tensors = [*weights.values(), *vectors]
        with self._changed:
            self._pending = Copy(metadata, flat, tensors, write, start_s, copy)
            self._changed.notify_all()
        return True

    def finish(self) -> None:
        """Returns once the last copy is stored. One that was damaged is made again, as long as the
        state is the same."""
        for _ in range(_MOST_COPIES - 1):
            self._wait_until_idle()
            if not self.wants_again or self._last is None:
                break
            metadata, state = self._last
            if checksum_of(words_of_share(state, state.parts)) != metadata.state_checksum:
                break
            self.save(metadata, state, must=True)
        super().finish()

    def _wait_until_idle(self) -> None:
        while True:
            with self._changed:
                is_busy = self._pending is not None or self._begun is not None or self._is_storing
                if self._failure is not None or not is_busy:
                    return
            time.sleep(_POLL_S)

    def _store(self) -> None:
        """Spools the pending copy and publishes the newest in the spool. Raises `StorageError` or
        `OSError`."""
        with self._changed:
            copy, self._pending = self._pending, None
        refusal: Exception | None = None
        is_new = False
        if copy is not None:
            try:
                is_new = self._spool(copy)
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
            self._publish(self._begun, is_new=is_new)
        if refusal is not None:
            raise refusal

    def _spool(self, copy: Copy) -> bool:
        """Writes a copy into the spool and reads it back. Returns whether it is there, as it was in
        the state."""
        earlier, metadata = self._begun, copy.metadata
        folder = self._publisher.checkpoints.spool / checkpoint_name(
            metadata.step, metadata.generation
        )
        copy.from_device.future.result()
        try:
            metadata = copy.write(folder)
        except NotFiniteError as error:
            self._publisher.refuse(metadata.step, str(error))
            return False
        state, problems = read_back(folder, metadata)
        if state is None or problems:
            self._refuse(folder, copy, problems)
            return False
        if earlier is not None and earlier.folder != folder:
            shutil.rmtree(earlier.folder)
        self._begun = Spooled(folder, copy, metadata, state.hashes)
        return True

    def _refuse(self, folder: Path, copy: Copy, problems: list[str]) -> None:
        """Refuses a checkpoint that is not what was in the state, and says where it was altered."""
        self._publisher.checkpoints.check_fence()  # a newer writer clears the spool
        place = f"in {folder}"
        if checksum_of(words_in(copy.tensors)) != copy.metadata.state_checksum:
            place = f"in the memory of {socket.gethostname()}, before it was written"
        reason = f"the copy of the state was altered {place}: {'; '.join(problems)}"
        self._publisher.refuse(copy.metadata.step, reason)
        shutil.rmtree(folder, ignore_errors=True)
        self.wants_again = True

    def _publish(self, spooled: Spooled, *, is_new: bool) -> None:
        """Publishes what is in the spool, and looks at it once more where it lay there."""
        folder, metadata = spooled.folder, spooled.metadata
        if not is_new and (problems := verify_checkpoint(folder)):
            self._begun = None
            self._publisher.checkpoints.check_fence()
            self._publisher.refuse(metadata.step, "; ".join(problems))
            shutil.rmtree(folder, ignore_errors=True)
            self.wants_again = True
            return
        published = self._publisher.publish(folder, metadata, spooled.hashes)
        self._begun = None
        exposed_s = spooled.copy.from_device.exposed_s
        self._publisher.record(published, taken_at_s=spooled.copy.taken_at_s, exposed_s=exposed_s)

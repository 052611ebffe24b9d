"""Stores each worker's shard of the checkpoints while training continues, where the state is
sharded.

Every worker that owns parts of the first copy of the state copies these parts of the weights and of
the update rule's vectors, also where it has the weights whole, and its own thread stores them: no
worker copies more of the state than it updates. Rank 0's thread then waits for the others and
publishes the checkpoint. All must store the same steps, so they agree on each save: a copy that
waits on all of them makes room for a newer one; while it waits on some and others are at work on it
already, there is no newer one.
"""

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from jobs.exact.stored_state import cut_up, fill, words_of_share
from jobs.run.checkpoints import RunCheckpoints, checkpoint_name
from jobs.run.sharded_checkpoints import Reports, ShardedCheckpoint
from jobs.run.storage_retry import Outage, tell_nobody
from jobs.saving.publisher import Publisher
from jobs.saving.saving_thread import SavingThread
from model.config import Shape
from model.files.checkpoint import NotFiniteError, check_finite
from model.files.checkpoint_folder import TRAIN_STATE, WEIGHTS, Metadata
from model.files.durable_files import write_file
from model.text.tokenizer import Tokenizer
from raymill.files.safetensors_file import safetensors_pieces
from raymill.state.host_copies import HostCopy
from raymill.state.sharding import Sharding
from raymill.state.state_shares import StateShares
from raymill.state.stored_state import own_stretches
from raymill.state.train_state import TrainState
from raymill.workers.worker_group import WorkerGroup

_POLL_S = 0.05


@dataclass
class Shard:
    """A copy of this worker's parts of the state after a step."""

    metadata: Metadata
    checkpoint: ShardedCheckpoint
    flat: Tensor  # (n,): this worker's weights and vectors of the update rule, end to end
    # Views of it, by the file that would hold them whole
    tensors: Mapping[str, Mapping[str, Tensor]]
    words: Mapping[str, int]  # checksums of the state's own values, by the same files
    taken_at_s: float  # on the monotonic clock
    from_device: HostCopy
    report: dict[str, object] | None = None  # of its files, once they are in the spool
    is_stored: bool = False
    is_over: bool = False  # published or refused


class ShardWriter(SavingThread[Shard, Shard]):
    """The `Saver` of a sharded state: stores one worker's shards, in a thread which `finish` ends.

    It holds copies alone: a thread that still stores one of a lost attempt keeps none of that
    attempt's state.
    """

    wants_again = False  # all ranks would have to: the next one that is due does

    def __init__(
        self,
        checkpoints: RunCheckpoints,
        sharding: Sharding,
        group: WorkerGroup,
        *,
        publisher: Publisher | None,
        config: Shape,
        tokenizer: Tokenizer,
    ) -> None:
        """Rank 0 has the publisher; the others' checkpoints know no fence."""
        self._checkpoints, self._sharding, self._group = checkpoints, sharding, group
        self._publisher, self._config, self._tokenizer = publisher, config, tokenizer
        self._free: list[Tensor] = []
        # By an earlier attempt; no worker of this one has saved yet
        for left in checkpoints.spool.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)
        tell = publisher.ledger.event if publisher else tell_nobody
        super().__init__("shards", Outage("checkpoints", tell))

    def save(self, metadata: Metadata, state: TrainState, *, must: bool) -> bool:
        """Begins a copy of this worker's shard of a checkpoint. None is saved while an earlier one
        is on its way, but with `must`, which waits for that."""
        self._raise_failure()
        while not self._makes_room():
            if not must:
                return False
            self._raise_failure()
            time.sleep(_POLL_S)
        if self._sharding.writes:
            name = checkpoint_name(metadata.step, metadata.generation)
            start_s = time.monotonic()
            shares = StateShares(state).own_views()
            lengths = {name: sum(map(len, views)) for name, views in shares.items()}
            flat = self._free.pop() if self._free else torch.empty(sum(lengths.values()))
            weights, train_state = own_stretches(state, cut_up(flat, lengths))
            tensors = list(chain.from_iterable(shares.values()))
            from_device = state.copies.start("checkpoint", tensors, partial(fill, flat))
            checkpoint = ShardedCheckpoint(self._checkpoints, name, self._sharding.num_holders)
            files = {WEIGHTS: weights, TRAIN_STATE: train_state}
            words = {WEIGHTS: words_of_share(state, ["values"])}
            words[TRAIN_STATE] = words_of_share(state, [*state.vectors])
            with self._changed:
                self._pending = Shard(
                    metadata, checkpoint, flat, files, words, start_s, from_device
                )
                self._changed.notify_all()
        return True

    def finish(self) -> None:
        """Returns once all ranks' shards are stored, and on rank 0 published; they call
        together."""
        while any(self._group.gather(self._is_busy())):  # which finds a lost rank as well
            time.sleep(_POLL_S)
        self._raise_failure()
        self._group.gather(None)  # no other one has failed
        super().finish()

    def _makes_room(self) -> bool:
        """Drops the copy that waits, if that is so on all ranks. Returns whether none waits."""
        with self._changed:
            waiting, self._pending = self._pending, None
        of_ranks = self._group.gather(waiting is not None)[: self._sharding.num_holders]
        if any(of_ranks) and not all(of_ranks):
            with self._changed:
                self._pending = waiting
                self._changed.notify_all()
            return False
        self._free += [waiting.flat] if waiting else []
        return True

    def _is_busy(self) -> bool:
        with self._changed:
            is_storing = self._begun is not None and not self._begun.is_stored
            return self._failure is None and (self._pending is not None or is_storing)

    def _store(self) -> None:
        with self._changed:
            if self._begun is None:
                self._begun, self._pending = self._pending, None
            shard = self._begun
        if shard is None:
            return
        if not shard.is_stored:
            self._store_own(shard)
        wait_s = _POLL_S
        while self._publisher and not shard.is_over:
            reports = shard.checkpoint.reports()
            if reports is not None:
                self._publish(self._publisher, shard, reports)
            elif self._is_abandoned:
                return
            else:
                time.sleep(wait_s)
                wait_s = min(1.5 * wait_s, 1.0)  # each time is a request
        self._begun = None

    def _publish(self, publisher: Publisher, shard: Shard, reports: Reports) -> None:
        published = publisher.complete(
            shard.checkpoint,
            reports,
            shard.metadata,
            config=self._config,
            tokenizer=self._tokenizer,
        )
        shard.is_over = True
        if published is not None:
            publisher.record(
                published, taken_at_s=shard.taken_at_s, exposed_s=shard.from_device.exposed_s
            )

    def _store_own(self, shard: Shard) -> None:
        index = self._sharding.place
        spool = self._checkpoints.spool / f".{shard.checkpoint.name}-{index}"
        if shard.report is None:
            shard.from_device.future.result()
            spool.mkdir(parents=True, exist_ok=True)
            try:
                check_finite(*shard.tensors.values(), step=shard.metadata.step)
                shard.report = {}
                for name, tensors in shard.tensors.items():
                    file = shard.checkpoint.file(name, index)
                    written = write_file(spool / file, safetensors_pieces(tensors))
                    shard.report[file] = written | {"words": shard.words[name]}
            except NotFiniteError as error:
                shard.report = {"refused": str(error)}
            except OSError:
                shutil.rmtree(spool, ignore_errors=True)  # a full disk gets its space back
                raise
            self._free.append(shard.flat)
        shard.checkpoint.store(index, spool, shard.report)
        shutil.rmtree(spool, ignore_errors=True)
        shard.is_stored = True

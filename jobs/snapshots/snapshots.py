"""Copies a worker's state into its node's memory after a step, and back from some node's memory after a failure.

Without a keeper on the node, as outside a Ray job, nothing is kept and training is the same.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist

from cluster.output.progress import say
from jobs.exact.train_state import StatePart, TrainState
from jobs.snapshots.choice import Holding, Snapshot, choose, interval, reader_of
from jobs.snapshots.keepers import ask, fetch, find_keepers
from jobs.snapshots.slots import Bytes, Header, Slots
from jobs.workers.worker_group import WorkerGroup

_FIRST_AGREEMENT, _AGREEMENT_EVERY = 4, 64  # snapshots after which all ranks agree on their interval
_RETRY_S = 1.0


class Snapshots:
    """The snapshots of one worker in one attempt, with the keepers of its launch, if that has any."""

    def __init__(self, launch: str | None, group: WorkerGroup) -> None:
        self._launch, self._group = launch, group
        self._node = ray.get_runtime_context().get_node_id() if self._launch else ""
        self._node_of_rank: list[str] = group.gather(self._node) if self._launch else []
        self._memory: tuple[Path, Slots] | None = None
        self._retry_at = 0.0
        self._is_warned = False
        self._interval, self._num_written, self._last_written = 1, 0, 0
        self._copy_s: list[float] = []
        self._step_s: list[float] = []
        self._last: tuple[int, float] | None = None
        self._whole: tuple[int, int, dict[str, Any], int] | None = None  # the last whole step, due or not

    def newest(self, *, explained_step: int, at_least: int, is_left_out: Callable[[int], bool]) -> Snapshot | None:
        """Returns the snapshot that `choose` takes of all that the keepers hold; called by rank 0."""
        if self._launch is None:
            return None
        keepers = find_keepers(self._launch)
        answers = ask({node: keeper.holdings.remote() for node, keeper in keepers.items()})
        holdings: list[Holding] = [held for found in answers.values() for held in found]
        while snapshot := choose(holdings, explained_step=explained_step, at_least=at_least, is_left_out=is_left_out):
            chosen = [held for holders in snapshot.shares for held in holders]
            # Only what is chosen is read: both slots of 1.3B parameters take a keeper 4 to 8 s.
            asked = {n: keepers[held.node].is_whole.remote(held) for n, held in enumerate(chosen)}
            are_whole = ask(asked, num_bytes=sum(held.header.num_bytes for held in chosen))
            damaged = [held for n, held in enumerate(chosen) if not are_whole.get(n)]
            if not damaged:
                return snapshot
            for held in damaged:
                step = held.header.step
                say(f"the snapshot of step {step} on node {held.node} is damaged or cannot be read; not used")
            holdings = [held for held in holdings if held not in damaged]
        return None

    def restore(self, snapshot: Snapshot, state: TrainState) -> dict[str, Any]:
        """Loads the state on every rank; returns `carried`."""
        state.load_state(
            state_part(holders[0].header, self._share(holders, state.device)) for holders in snapshot.shares
        )
        return snapshot.header.carried

    def _share(self, holders: list[Holding], device: torch.device) -> Bytes:
        """Returns a share, from this node's memory where every node has it; else one rank broadcasts it to all."""
        by_node = {held.node: held for held in holders}
        reader = reader_of(by_node, self._node_of_rank)
        if reader in (None, self._group.rank):
            data = self._read(by_node.get(self._node, holders[0]))
        else:
            data = np.empty(holders[0].header.num_bytes, np.uint8)
        if reader is None or self._group.world_size == 1:
            return data
        whole = torch.from_numpy(data).to(device)
        dist.broadcast(whole, reader)
        return whole.cpu().numpy()

    def _read(self, held: Holding) -> Bytes:
        assert self._launch is not None
        keeper = ray.get_actor(held.node, namespace=self._launch)
        if held.node == self._node:
            slots = Slots.at(str(ray.get(keeper.path.remote(held.area))))
            assert slots.holds(held.header, held.slot), "nobody writes during a restore"
            return slots.data(held.slot)[: held.header.num_bytes].copy()
        data = fetch(held, keeper)
        if data is None:
            raise RuntimeError(f"the snapshot of step {held.header.step} on node {held.node} was lost on its way")
        return data

    def after_step(self, step: int, state: TrainState, *, attempt: int, carried: dict[str, Any]) -> None:
        """Takes a snapshot if one is due; every rank calls this after every step, once the ledger has the step."""
        if self._launch is None:
            return
        self._whole = (step, attempt, carried, state.num_updates)
        start = time.perf_counter()
        if self._last is not None and step == self._last[0] + 1:
            self._step_s.append(start - self._last[1])
        if step >= self._last_written + self._interval:
            self._write(step, state, attempt=attempt, carried=carried)
            self._last_written = step
            self._copy_s.append(time.perf_counter() - start)
            self._num_written += 1
            if self._num_written == _FIRST_AGREEMENT or self._num_written % _AGREEMENT_EVERY == 0:
                self._agree(attempt)
        self._last = (step, time.perf_counter())

    def rescue(self, state: TrainState) -> None:
        """Takes a snapshot of the last whole step, though none was due, after another worker was lost: this worker may
        hold the only newer state.

        A sharded optimizer is left alone: the lost share has no newer form than its own last snapshot.
        """
        if self._whole is None or state.is_sharded:
            return
        step, attempt, carried, num_updates = self._whole
        if step > self._last_written and num_updates == state.num_updates:  # no step without a line has updated it
            self._write(step, state, attempt=attempt, carried=carried)

    def _write(self, step: int, state: TrainState, *, attempt: int, carried: dict[str, Any]) -> None:
        group, is_sharded = self._group, state.is_sharded
        if not is_sharded and group.rank != self._node_of_rank.index(self._node):
            return  # all ranks have the same state, and one rank of each node writes it
        part = state.own_state()
        arrays = [tensor.detach().cpu().numpy().view(np.uint8) for tensor in part.tensors.values()]
        area = f"rank-{group.rank}-of-{group.world_size}" if is_sharded else "state"
        slots = self._slots(area, sum(array.size for array in arrays))
        if slots is None:
            return
        header = Header(
            attempt=attempt,
            step=step,
            rank=part.rank,
            world_size=part.world_size,
            num_updates=part.num_updates,
            names=list(part.tensors),
            carried=carried,
        )
        slots.write(header, arrays)

    def _slots(self, area: str, num_bytes: int) -> Slots | None:
        """Returns this rank's memory on its node, or None while the node has no living keeper with room."""
        if self._memory is not None and self._memory[0].exists():
            return self._memory[1]
        self._memory = None
        if time.monotonic() < self._retry_at:
            return None
        self._retry_at = time.monotonic() + _RETRY_S
        keeper = find_keepers(str(self._launch)).get(self._node)
        answers = ask({self._node: keeper.open.remote(area, num_bytes)}) if keeper else {}
        path = answers.get(self._node)
        if path is None:
            if answers and not self._is_warned:
                self._is_warned = True
                say(
                    f"no snapshots on node {self._node}: checkpoint.snapshot_bytes has no room for two of {num_bytes} "
                    "bytes beside what is there; after a failure the run continues from a checkpoint"
                )
            return None
        self._memory = (Path(path), Slots.at(path))
        return self._memory[1]

    def _agree(self, attempt: int) -> None:
        """Agrees on one interval for all ranks, because the shares of a state must be of one step."""
        own = (min(self._copy_s), median(self._step_s) if self._step_s else float("inf"))
        copy_s, step_s = zip(*self._group.gather(own), strict=True)
        self._interval = interval(copy_s=max(copy_s), step_s=min(step_s))
        self._copy_s.clear()
        self._step_s.clear()
        if self._group.rank == 0:  # each rank has written since this attempt began
            for keeper in find_keepers(str(self._launch)).values():
                keeper.close_older.remote(attempt)


def state_part(header: Header, data: Bytes) -> StatePart:
    values = torch.from_numpy(data.view(np.float32)).view(len(header.names), -1)
    return StatePart(header.rank, header.world_size, dict(zip(header.names, values, strict=True)), header.num_updates)

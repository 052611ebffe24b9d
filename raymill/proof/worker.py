"""Takes part in one stint of a training, as one of its workers."""

import os
import signal
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.distributed as dist

from raymill.engine import ExactEngine
from raymill.proof.peers import STATE, ddp, fsdp2
from raymill.proof.place import meet, shares_a_gpu
from raymill.proof.rows import NUM_LANES, OURS, PEERS, Stint
from raymill.proof.task import LEARNING_RATE, RULE, Batch, BatchOf, Training, loss, network
from raymill.proof.task import batch as made_batch
from raymill.state.shard import Shard
from raymill.state_files import FACTS

_SAVE_EVERY_STEPS = 5


class Ending(NamedTuple):
    """The end of a stint, the same on every worker."""

    weights_hash: str
    loss: float  # of the last step


class _Exact:
    def __init__(self, shard: Shard, seed: int, device: torch.device) -> None:
        model = network(seed).to(device)
        self._engine = ExactEngine(
            model, loss, num_lanes=NUM_LANES, rule=RULE, shard=shard, seed=seed
        )
        self.save, self.load = self._engine.save, self._engine.load
        self.weights_hash = self._engine.weights_hash

    @property
    def num_steps(self) -> int:
        return self._engine.num_steps

    def step(self, batch_of: BatchOf) -> float:
        return self._engine.step(batch_of, learning_rate=LEARNING_RATE).loss


def take_part(
    way: str, stint: Stint, *, rank: int, folder: Path, store: Path, seed: int, kind: str
) -> Ending:
    """Trains from the newest state in the folder to the last step of the stint, on a device of the
    kind. The workers meet by the file `store`."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if way in PEERS and shares_a_gpu(kind, num_workers=stint.num_workers):
        raise RuntimeError(
            f"{stint.num_workers} workers on {torch.cuda.device_count()} GPUs, and NCCL wants one for each"
        )
    device = meet(kind, rank=rank, num_workers=stint.num_workers, store=store)
    training, measured = _new_training(way, seed, device), 0.0
    newest = _newest(folder)
    if newest:
        training.load(newest)
    is_victim = rank == stint.num_workers - 1
    while training.num_steps < stint.last_step:
        step = training.num_steps + 1
        batches = _Batches(step, device, is_last=is_victim and step == stint.killed_in_step)
        measured = training.step(batches)
        if step % _SAVE_EVERY_STEPS == 0 or step == stint.last_step:
            saved = folder / f"step-{step:05}"
            saved.mkdir(exist_ok=True)
            training.save(saved)
    ending = Ending(training.weights_hash(), measured)
    dist.barrier()
    dist.destroy_process_group()
    return ending


class _Batches:
    """The batches of a step, of which a worker's second one may be its last."""

    def __init__(self, step: int, device: torch.device, *, is_last: bool) -> None:
        self._step, self._device = step, device
        self._is_last, self._num_given = is_last, 0

    def __call__(self, lane: int) -> Batch:
        self._num_given += 1
        if self._is_last and self._num_given == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        rows, classes = made_batch(self._step, lane)
        return rows.to(self._device), classes.to(self._device)


def _new_training(way: str, seed: int, device: torch.device) -> Training:
    if way in OURS:
        return _Exact(cast(Shard, way), seed, device)
    return {"DDP": ddp, "FSDP2": fsdp2}[way](seed, device)


def _newest(folder: Path) -> Path | None:
    """Returns the newest state that was saved whole."""
    saved = [path.parent for path in folder.glob("step-*/*") if path.name in (FACTS, STATE)]
    return max(saved, default=None)

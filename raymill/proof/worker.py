"""Takes part in one stint of a training, as one of its workers."""

import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.distributed as dist

from raymill.engine import ExactEngine
from raymill.proof.peers import STATE, ddp, fsdp2
from raymill.proof.rows import NUM_LANES, OURS, Stint
from raymill.proof.task import LEARNING_RATE, RULE, Batch, BatchOf, Training, loss, network
from raymill.proof.task import batch as made_batch
from raymill.state.shard import Shard
from raymill.state_files import FACTS

_MESSAGE_LIMIT = timedelta(seconds=240)  # of a worker whose others are busy or gone
_SAVE_EVERY_STEPS = 5


class Ending(NamedTuple):
    """The end of a stint, the same on every worker."""

    weights_hash: str
    loss: float  # of the last step


class _Exact:
    def __init__(self, shard: Shard, seed: int) -> None:
        self._engine = ExactEngine(
            network(seed), loss, num_lanes=NUM_LANES, rule=RULE, shard=shard, seed=seed
        )
        self.save, self.load = self._engine.save, self._engine.load
        self.weights_hash = self._engine.weights_hash

    @property
    def num_steps(self) -> int:
        return self._engine.num_steps

    def step(self, batch_of: BatchOf) -> float:
        return self._engine.step(batch_of, learning_rate=LEARNING_RATE).loss


def take_part(way: str, stint: Stint, *, rank: int, folder: Path, store: Path, seed: int) -> Ending:
    """Trains from the newest state in the folder to the last step of the stint. The workers meet by
    the file `store`."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=stint.num_workers,
        timeout=_MESSAGE_LIMIT,
    )
    training, measured = _new_training(way, seed), 0.0
    newest = _newest(folder)
    if newest:
        training.load(newest)
    is_victim = rank == stint.num_workers - 1
    while training.num_steps < stint.last_step:
        step = training.num_steps + 1
        batches = _Batches(step, is_last=is_victim and step == stint.killed_in_step)
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

    def __init__(self, step: int, *, is_last: bool) -> None:
        self._step, self._is_last, self._num_given = step, is_last, 0

    def __call__(self, lane: int) -> Batch:
        self._num_given += 1
        if self._is_last and self._num_given == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return made_batch(self._step, lane)


def _new_training(way: str, seed: int) -> Training:
    if way in OURS:
        return _Exact(cast(Shard, way), seed)
    return {"DDP": ddp, "FSDP2": fsdp2}[way](seed)


def _newest(folder: Path) -> Path | None:
    """Returns the newest state that was saved whole."""
    saved = [path.parent for path in folder.glob("step-*/*") if path.name in (FACTS, STATE)]
    return max(saved, default=None)

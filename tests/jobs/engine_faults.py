"""Trains a small module by the exact engine, over real gloo processes, while one of the workers does
what cannot be exact, and prints how each worker ended.

    python [-O] -m tests.jobs.engine_faults WORLD_SIZE FOLDER

Prints one JSON object: by fault, way to shard, and rank, the text of the error, the steps that were
taken, and the hashes of the weights before the last one that was tried and after it.
"""

import json
import multiprocessing
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from raymill import AdamW, ExactEngine
from raymill.errors import UserError
from raymill.state.shard import Shard
from tests.time_limits import limit_s

NUM_LANES, NUM_STEPS = 5, 4
FAULTY_STEP, FAULTY_LANE = 3, 3
RULE = AdamW(0.9, 0.95, 0.1)


FAULTS = ("none", "missing", "in parts", "rates", "nan")
SHARDS: tuple[Shard, ...] = ("none", "optimizer", "gradients")


class Experts(nn.Module):
    """Has an expert that a lane may not use, or use in two parts of its backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.expert = nn.Linear(6, 6), nn.Linear(6, 6)
        self.num_uses = 1

    def forward(self, batch: Tensor) -> Tensor:
        y = self.shared(batch)
        for _ in range(self.num_uses):
            y = y + torch.utils.checkpoint.checkpoint(
                self.expert, batch.clone().requires_grad_(), use_reentrant=self.num_uses > 1
            )
        return y


def loss(module: nn.Module, batch: Tensor) -> Tensor:
    return mse_loss(module(batch), batch)


class Fault:
    """What a worker does in the third step."""

    def __init__(self, name: str, module: Experts, rank: int) -> None:
        self._name, self._module, self._rank = name, module, rank

    def batch(self, step: int, lane: int) -> Tensor:
        is_here = step == FAULTY_STEP and lane == FAULTY_LANE
        uses = {"missing": 0, "in parts": 2}.get(self._name, 1)
        self._module.num_uses = uses if is_here else 1
        batch = torch.rand(4, 6, generator=torch.Generator().manual_seed(100 * step + lane))
        return batch * torch.nan if is_here and self._name == "nan" else batch

    def learning_rate(self, step: int) -> float:
        differs = self._name == "rates" and step == FAULTY_STEP and self._rank
        return 0.02 if differs else 0.01


def run_rank(rank: int, world_size: int, folder: Path) -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    store = f"file://{folder}/store"
    # Of a worker that fails by itself the other one learns when its connection closes, or by then
    dist.init_process_group(
        "gloo",
        init_method=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=limit_s(20)),
    )
    for name in FAULTS:
        found[name] = {shard: outcome(name, shard, rank) for shard in SHARDS}
    dist.barrier()
    dist.destroy_process_group()
    return found


def outcome(name: str, shard: Shard, rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    module = Experts()
    fault = Fault(name, module, rank)
    engine = ExactEngine(module, loss, num_lanes=NUM_LANES, rule=RULE, shard=shard)
    before = error = ""
    try:
        while (step := engine.num_steps + 1) <= NUM_STEPS:
            before = engine.weights_hash()
            engine.step(partial(fault.batch, step), learning_rate=fault.learning_rate(step))
    except UserError as refusal:
        error = str(refusal)
    hashes = [before, engine.weights_hash()]
    engine.close()
    return {"error": error, "num_steps": engine.num_steps, "hashes": hashes}


if __name__ == "__main__":
    size, path = int(sys.argv[1]), Path(sys.argv[2])
    # Forked while this process has no other thread: torch is imported once for all ranks.
    with multiprocessing.get_context("fork").Pool(size) as pool:
        results = pool.starmap(run_rank, [(rank, size, path) for rank in range(size)], chunksize=1)
    by_fault: dict[str, dict[str, list[Any]]] = {}
    for one, shards in results[0].items():
        by_fault[one] = {way: [result[one][way] for result in results] for way in shards}
    print(json.dumps(by_fault))

"""Trains a tiny run over real gloo processes: one worker, two with shards, and two of which one is
slow.

python -m tests.jobs.insight_worlds FOLDER
"""

import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from jobs.run.run_plan import RunPlan
from jobs.training.train_loop import train
from model.gpt import GPT
from tests.jobs.runs import tiny_plan
from tests.time_limits import slowness

NUM_STEPS = 20
SLOW_BY_S = 0.15 * slowness()  # a lane, which a busy machine's exchange must not take too
# The slow one last, as what slows it stays
WORLDS = {"one": 1, "sharded": 2, "divided": 2, "slow": 2}
SHARDS = {"sharded": "optimizer", "divided": "parameters"}


def plan_of(name: str, folder: Path) -> RunPlan:
    settings: dict[str, Any] = {
        "layer_statistics_every_steps": 6,
        "hash_every_steps": 4,
        "eval_every_steps": 1000,
        "eval_max_tokens": 64,
        "sample_prompts": [],
    }
    return tiny_plan(
        str(folder / name),
        tokens_in=str(folder),
        num_steps=NUM_STEPS,
        train=settings,
        checkpoint={"save_every_steps": 1000},
        scaling={"max_workers": WORLDS[name], "shard": SHARDS.get(name, "none")},
    )


def run_rank(rank: int, folder: Path) -> None:
    for name, world_size in WORLDS.items():
        if rank < world_size:
            train_world(name, rank, folder)


def train_world(name: str, rank: int, folder: Path) -> None:
    if name == "slow" and rank == 1:
        forward = GPT.forward

        def slow_forward(model: GPT, token_ids: Tensor, **options: Any) -> Tensor:
            time.sleep(SLOW_BY_S if model.training else 0)
            return forward(model, token_ids, **options)

        GPT.forward = slow_forward  # type: ignore[method-assign]
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet-{name}", rank=rank, world_size=WORLDS[name]
    )
    train(plan_of(name, folder), rank=rank, world_size=WORLDS[name])
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked while this process has no other thread: torch is imported once for all ranks.
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.starmap(run_rank, [(rank, Path(sys.argv[1])) for rank in range(2)], chunksize=1)

"""Sums lanes over real gloo processes, for worlds of several sizes in turn, and prints the SHA-256 of each rank's sum.

    python -m tests.jobs.reduce_worlds MAX_WORLD_SIZE FOLDER

Prints one JSON object: by number of lanes and world size, the digests of all ranks for the exact sum and for a plain
all-reduce of each rank's own sum.
"""

import hashlib
import json
import multiprocessing
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.batch_plan import lanes_of_rank
from jobs.exact_reduce import exchange, reduce_lanes

NUM_LANES = (7, 8)
NUM_VALUES = 1003  # divisible by no world size but 1


def lane_value(lane: int) -> Tensor:
    """(NUM_VALUES,), over many magnitudes, so that each order of summing rounds differently."""
    generator = torch.Generator().manual_seed(lane)
    return torch.randn(NUM_VALUES, generator=generator) * 10.0 ** torch.randint(-3, 4, (1,), generator=generator)


def digest(value: Tensor) -> str:
    return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()


def gathered(value: str, world_size: int) -> list[str]:
    values = [""] * world_size
    dist.all_gather_object(values, value)
    return values


def run_rank(rank: int, max_world_size: int, folder: Path) -> dict[str, dict[str, list[str]]]:
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[str]]] = {}
    for world_size in range(1, max_world_size + 1):
        if rank >= world_size:
            continue
        store = f"file://{folder}/world-{world_size}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        for num_lanes in NUM_LANES:
            lanes = lanes_of_rank(rank, world_size=world_size, num_lanes=num_lanes)
            sums = reduce_lanes(lanes, num_lanes=num_lanes, lane_value=lane_value)
            exact = exchange(sums, rank=rank, world_size=world_size, num_lanes=num_lanes)
            plain = torch.stack([lane_value(lane) for lane in lanes]).sum(0)
            dist.all_reduce(plain)
            found[f"{num_lanes} lanes, {world_size} ranks"] = {
                "exact": gathered(digest(exact), world_size),
                "plain": gathered(digest(plain), world_size),
            }
        dist.destroy_process_group()
    return found


if __name__ == "__main__":
    world_size, folder = int(sys.argv[1]), Path(sys.argv[2])
    # Forked while this process has no other thread: torch is imported once for all ranks.
    with multiprocessing.get_context("fork").Pool(world_size) as pool:
        results = pool.starmap(run_rank, [(rank, world_size, folder) for rank in range(world_size)], chunksize=1)
    print(json.dumps(results[0]))

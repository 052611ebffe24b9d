"""Trains small runs in worlds of 1, 1 again, 2 and 4 ranks that share one device, and prints their
hashes.

    python -m tests.gpu.worlds cpu|cuda FOLDER [CASE ...]

Each rank is a process with its own context on the device, and runs training's own code. Prints one
JSON object: by case, a list of (world's size, every rank's hash, losses). Imports neither Ray nor a
client of any storage.
"""

import hashlib
import json
import multiprocessing
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raymill.proof.place import pass_through_the_host
from raymill.workers.worker_group import WorkerGroup
from tests.gpu.made_runs import MadeRun, made_config

WORLDS = [1, 1, 2, 4]
NUM_STEPS = 3

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {"fp32": {"num_lanes": 5}},
    "cuda": {
        "bf16": {"num_lanes": 7, "precision": "bf16"},
        "bf16, documents": {"num_lanes": 8, "precision": "bf16", "document_mask": True},
        "fp32": {"num_lanes": 7},
        "bf16, dropout, not compiled": {
            "num_lanes": 5,
            "precision": "bf16",
            "compute": "plain",
            "model": {"dropout": 0.1},
        },
        "bf16, untied, sharded, not compiled": {
            "num_lanes": 7,
            "precision": "bf16",
            "compute": "plain",
            "shard": "optimizer",
            "model": {"tie_word_embeddings": False},
        },
    },
}


def run_rank(rank: int, device_type: str, folder: Path, names: list[str]) -> dict[str, list[Any]]:
    torch.set_num_threads(1)
    device = torch.device(device_type)
    pass_through_the_host()
    found: dict[str, list[Any]] = {name: [] for name in names}
    for number, size in enumerate(WORLDS):
        if rank >= size:
            continue
        store = f"file://{folder}/world-{number}"
        # A rank whose peer has failed ends too, so that the error is seen.
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(minutes=1)
        )
        group = WorkerGroup(rank, size)
        for name in names:
            run = MadeRun(made_config(device, **CASES[device.type][name]), device, group)
            losses = [run.step(step) for step in range(1, NUM_STEPS + 1)]
            run.close()
            digest = hashlib.sha256(run.state.values.cpu().numpy().data).hexdigest()
            found[name].append((size, group.gather(digest), losses))
        dist.barrier()
        dist.destroy_process_group()
    return found


if __name__ == "__main__":
    device_type, folder = sys.argv[1], Path(sys.argv[2])
    names = sys.argv[3:] or list(CASES[device_type])
    # Forked while this process has no other thread, and before any of them has touched the GPU.
    with multiprocessing.get_context("fork").Pool(max(WORLDS)) as pool:
        ranks = pool.starmap(
            run_rank, [(r, device_type, folder, names) for r in range(max(WORLDS))], chunksize=1
        )
    print(json.dumps(ranks[0]))

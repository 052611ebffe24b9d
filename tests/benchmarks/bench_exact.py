"""Exact mode under Ray Train beside stock DistributedDataParallel: two workers of one thread each,
the same step.

    python -m tests.benchmarks.bench_exact

Both groups are alive all the time and take turns, so that a change of the machine's speed meets
both. Prints a table and, last, one JSON object.
"""

import functools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from cluster.settings.run import max_steps
from model.gpt import GPT
from tests.benchmarks.exact_workers import (
    NUM_ROUNDS,
    STEPS_PER_ROUND,
    WORLD_SIZE,
    exact_worker,
    memory_process,
    run_config,
    stock_process,
)
from tests.local_ray import local_ray


def fit(folder: Path) -> None:
    with local_ray(num_cpus=WORLD_SIZE + 1):
        TorchTrainer(
            exact_worker,
            train_loop_config={"folder": str(folder)},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=WORLD_SIZE, resources_per_worker={"CPU": 1}
            ),
            run_config=ray.train.RunConfig(storage_path=str(folder / "ray")),
        ).fit()


def start_pair(target: Callable[..., None]) -> list[Any]:
    processes = [
        multiprocessing.get_context("spawn").Process(target=target, args=(r,), daemon=True)
        for r in range(WORLD_SIZE)
    ]
    for process in processes:
        process.start()
    return processes


def finish_pair(processes: list[Any]) -> None:
    for process in processes:
        process.join(timeout=240)
        assert process.exitcode == 0, f"a process of the benchmark ended with {process.exitcode}"


def called(folder: Path, party: str, number: int) -> dict[str, float]:
    """Has the party take its turn."""
    (folder / f"{party}-{number}").touch()
    deadline = time.monotonic() + 240
    while not (done := folder / f"{party}-{number}.done").exists():
        assert time.monotonic() < deadline, f"{party} did not finish round {number}"
        time.sleep(0.005)
    return dict(json.loads(done.read_text()))


def measure() -> dict[str, float]:
    """Prints the figures. Ratios above 1 mean that exact mode is faster; seconds and bytes are of
    one step and worker."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rounds: dict[str, list[dict[str, float]]] = {"exact": [], "stock": []}
    with tempfile.TemporaryDirectory(prefix="raymill-bench-exact-") as scratch:
        folder = Path(scratch)
        memory = {}
        for shard in ("none", "optimizer"):
            finish_pair(start_pair(functools.partial(memory_process, folder=folder, shard=shard)))
            memory[shard] = float((folder / f"memory-{shard}.mb").read_text())
        stock = start_pair(functools.partial(stock_process, folder=folder))
        trainer = threading.Thread(target=fit, args=(folder,), daemon=True)
        trainer.start()
        for number in range(NUM_ROUNDS):
            for party, taken in rounds.items():
                taken.append(called(folder, party, number))
        finish_pair(stock)
        trainer.join(timeout=60)
        bytes_per_step = float((folder / "bytes").read_text())
    config = run_config()
    assert max_steps(config) > NUM_ROUNDS * STEPS_PER_ROUND
    num_parameters = sum(parameter.numel() for parameter in GPT(config.model).parameters())
    seconds, cpu = (
        {party: [taken[field] for taken in values[1:]] for party, values in rounds.items()}
        for field in ("seconds", "cpu")
    )
    ring_bytes = 2 * (WORLD_SIZE - 1) / WORLD_SIZE * 4 * num_parameters
    assert abs(bytes_per_step / ring_bytes - 1) <= 0.02, (
        f"{bytes_per_step:,} bytes a step, a ring sends {ring_bytes:,}"
    )
    ratios = [
        theirs / ours for ours, theirs in zip(seconds["exact"], seconds["stock"], strict=True)
    ]
    return {
        "exact_over_ddp_ratio": round(statistics.median(ratios), 3),
        "exact_over_ddp_ratio_min": round(min(ratios), 3),
        "exact_over_ddp_ratio_max": round(max(ratios), 3),
        # Of processor time, which other programs on the machine hardly move.
        "exact_over_ddp_cpu_ratio": round(
            statistics.median(cpu["stock"]) / statistics.median(cpu["exact"]), 3
        ),
        "exact_step_s": round(statistics.median(seconds["exact"]), 4),
        "ddp_step_s": round(statistics.median(seconds["stock"]), 4),
        "exact_exposed_sync_s": round(
            statistics.median(taken["sync"] for taken in rounds["exact"][1:]), 4
        ),
        "exact_bytes_per_step": round(bytes_per_step),
        "ring_bytes_per_step": round(ring_bytes),
        "exact_over_ring_bytes": round(bytes_per_step / ring_bytes, 4),
        "memory_mb_per_worker": round(memory["none"], 1),
        "memory_mb_per_worker_sharded": round(memory["optimizer"], 1),
    }


def print_table(figures: dict[str, float]) -> None:
    for name, value in figures.items():
        print(f"{name:32} {value:>14,}")


def main() -> int:
    figures = measure()
    print_table(figures)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The workers of `bench_exact`: exact mode's step, the stock one's, and how both take turns."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from cluster.settings.run import RunConfig
from cluster.settings.train import Compute
from jobs.exact.run_state import run_state
from jobs.exact.run_values import run_sharding
from jobs.exact.step_gradient import step_gradient
from jobs.training.mixed_hardware import settle_rounding
from model.gpt import GPT
from model.hardware.memory import keep_freed_memory
from raymill.state.shard import Shard
from raymill.step_timer import StepTimer
from raymill.workers.worker_group import WorkerGroup
from tests.benchmarks.stock_steps import RATE, StockTrainer, ddp
from tests.gpu.made_runs import MadeRows
from tests.jobs.sent_bytes import sent_bytes

WORLD_SIZE = 2
VOCAB_SIZE = 4096  # what a trained tokenizer has by default; GPT-2's would triple the model
LANES_PER_RANK = 4
MICRO_BATCH_SIZE = 2
NUM_ROUNDS = 7  # of which the first one warms up
STEPS_PER_ROUND = 2
CPU = torch.device("cpu")

StepFunction = Callable[[int], float]
"""Takes the step of this number; returns the seconds that it waited for other ranks."""


def run_config(*, shard: Shard = "none", compute: Compute = "cpu") -> RunConfig:
    batch = WORLD_SIZE * LANES_PER_RANK * MICRO_BATCH_SIZE
    train = {
        "global_batch_size": batch,
        "micro_batch_size": MICRO_BATCH_SIZE,
        "max_tokens": 1000 * batch * 256,
        "precision": "fp32",  # which any processor computes at speed, and both sides
        "compute": compute,
    }
    return RunConfig.model_validate(
        {
            "model": {"preset": "small-10m", "vocab_size": VOCAB_SIZE},
            "train": train,
            "scaling": {"shard": shard},
        }
    )


class ExactTrainer:
    """Takes the steps of `jobs/training/train_loop.py`, without its records."""

    def __init__(self, config: RunConfig, group: WorkerGroup) -> None:
        settle_rounding(config)
        keep_freed_memory()
        model = GPT(config.model)
        model.init_weights(0)
        sharding = run_sharding(config.scaling, rank=group.rank, world_size=group.world_size)
        self.state = run_state(model, config.train, device=CPU, group=group, sharding=sharding)
        rows: Any = MadeRows.of(config)
        self.gradient = step_gradient(config, self.state, rows, group, eot_id=None)
        self.timer, self.bytes_sent = StepTimer(), 0

    def step(self, number: int) -> float:
        self.timer.take()
        with sent_bytes() as sent:
            measured = self.gradient.of_step(number, self.timer)
            with self.timer.phase("update"):
                self.state.apply(norm=measured.norm, learning_rate=RATE, timer=self.timer)
        self.bytes_sent += sent.num_bytes
        return self.timer.take().seconds["sync"]


def take_turns(folder: Path, party: str, rank: int, step: StepFunction) -> None:
    """Runs a round whenever the file that calls for it appears."""
    for number in range(NUM_ROUNDS):
        while not (folder / f"{party}-{number}").exists():
            time.sleep(0.005)
        dist.barrier()
        start, start_cpu = time.perf_counter(), time.process_time()
        waited = [step(number * STEPS_PER_ROUND + k) for k in range(1, STEPS_PER_ROUND + 1)]
        taken = {
            "seconds": (time.perf_counter() - start) / STEPS_PER_ROUND,
            "cpu": (time.process_time() - start_cpu) / STEPS_PER_ROUND,
            "sync": statistics.mean(waited),
        }
        if rank == 0:
            path = folder / f"{party}-{number}.done"
            path.with_suffix(".part").write_text(json.dumps(taken))
            path.with_suffix(".part").rename(path)


def stock_process(rank: int, folder: Path) -> None:
    store = f"file://{folder}/stock-store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE)
    trainer = StockTrainer(run_config(compute="plain"), WorkerGroup(rank, WORLD_SIZE), ddp)
    take_turns(folder, "stock", rank, trainer.step)
    dist.destroy_process_group()


def exact_worker(settings: dict[str, Any]) -> None:
    import ray.train  # seconds and memory that workers without Ray do not need

    rank = ray.train.get_context().get_world_rank()
    trainer, folder = (
        ExactTrainer(run_config(), WorkerGroup(rank, WORLD_SIZE)),
        Path(settings["folder"]),
    )
    take_turns(folder, "exact", rank, trainer.step)
    if rank == 0:
        (folder / "bytes").write_text(str(trainer.bytes_sent / (NUM_ROUNDS * STEPS_PER_ROUND)))


def memory_process(rank: int, folder: Path, *, shard: Shard) -> None:
    """Records the peak growth of this process from before it had a model until after three
    steps."""
    store = f"file://{folder}/memory-{shard}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE)
    before = psutil.Process().memory_info().rss
    trainer = ExactTrainer(run_config(shard=shard), WorkerGroup(rank, WORLD_SIZE))
    for number in range(1, 4):
        trainer.step(number)
    peak = 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    if rank == 0:
        (folder / f"memory-{shard}.mb").write_text(str((peak - before) / 1e6))
    dist.destroy_process_group()

"""The workers of `bench_exact`: exact mode's step, the stock one's, and how both take turns."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray.train
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cluster.settings.run import RunConfig, Shard, batch_schedule, seq_len
from jobs.exact.batch_gradient import BatchGradient
from jobs.exact.train_state import TrainState
from jobs.run.step_timer import StepTimer
from jobs.workers.worker_group import WorkerGroup
from model.gpt import GPT
from model.training_memory import keep_freed_memory
from tests.jobs.sent_bytes import sent_bytes

WORLD_SIZE = 2
VOCAB_SIZE = 4096  # what a trained tokenizer has by default; GPT-2's would triple the model
LANES_PER_RANK = 4
MICRO_BATCH_SIZE = 2
NUM_ROUNDS = 7  # of which the first one warms up
STEPS_PER_ROUND = 2
RATE = 1e-4
CPU = torch.device("cpu")

StepFunction = Callable[[int], float]
"""Takes the step of this number; returns the seconds that it waited for other ranks."""


def run_config(*, shard: Shard = "none") -> RunConfig:
    batch = WORLD_SIZE * LANES_PER_RANK * MICRO_BATCH_SIZE
    train = {
        "global_batch_size": batch,
        "micro_batch_size": MICRO_BATCH_SIZE,
        "max_tokens": 1000 * batch * 256,
        "precision": "fp32",  # which any processor computes at speed, and both sides
    }
    return RunConfig.model_validate(
        {"model": {"preset": "small-10m", "vocab_size": VOCAB_SIZE}, "train": train, "scaling": {"shard": shard}}
    )


class MadeRows:
    """Rows of random tokens in memory, for both sides: storage has benchmarks of its own."""

    def __init__(self, config: RunConfig) -> None:
        generator = torch.Generator().manual_seed(0)
        self._rows = torch.randint(config.model.vocab_size, (256, seq_len(config) + 1), generator=generator)

    def samples(self, indices: Any) -> tuple[Tensor, Tensor]:
        rows = self._rows[torch.as_tensor(indices) % len(self._rows)]
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def read_ahead(self, indices: Any) -> None:
        pass


class ExactTrainer:
    """Takes the steps of `jobs/training/train_loop.py`, without its records."""

    def __init__(self, rank: int, *, shard: Shard = "none") -> None:
        config, group = run_config(shard=shard), WorkerGroup(rank, WORLD_SIZE)
        torch.set_num_threads(1)
        keep_freed_memory()
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        model = GPT(config.model)
        model.init_weights(0)
        self.state = TrainState(model, config.train, device=CPU, group=group, shard=shard)
        rows: Any = MadeRows(config)
        self.gradient = BatchGradient(config, self.state, rows, group, eot_id=None)
        self.timer, self.bytes_sent = StepTimer(), 0

    def step(self, number: int) -> float:
        self.timer.take()
        with sent_bytes() as sent:
            measured = self.gradient.of_step(number, self.timer)
            with self.timer.phase("update"):
                self.state.apply(norm=measured.norm, learning_rate=RATE, timer=self.timer)
        self.bytes_sent += sent.num_bytes
        return self.timer.take().seconds["sync"]


class _Loss(nn.Module):
    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(inputs, targets)


def stock_step(rank: int) -> StepFunction:
    """Takes the steps of a loop with stock parts, for the same batch."""
    torch.set_num_threads(1)
    config = run_config()
    rows, lanes = MadeRows(config), batch_schedule(config).num_lanes(1)
    model = GPT(config.model)
    model.init_weights(0)
    groups: list[list[nn.Parameter]] = [[], []]  # decayed, not decayed
    for parameter in model.parameters():
        groups[parameter.dim() < 2].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}],
        lr=RATE,
        betas=(0.9, 0.95),
        fused=True,
    )
    ddp = DistributedDataParallel(_Loss(model))
    tokens_per_rank = LANES_PER_RANK * MICRO_BATCH_SIZE * seq_len(config)

    def step(number: int) -> float:
        optimizer.zero_grad()
        total = torch.zeros(())
        for lane in range(LANES_PER_RANK):
            first = ((number - 1) * lanes + rank * LANES_PER_RANK + lane) * MICRO_BATCH_SIZE
            inputs, targets = rows.samples(range(first, first + MICRO_BATCH_SIZE))
            ddp.require_backward_grad_sync = lane == LANES_PER_RANK - 1
            loss = ddp(inputs, targets) / tokens_per_rank
            loss.backward()
            total += loss.detach()
        start = time.perf_counter()
        dist.all_reduce(total)
        waited_s = time.perf_counter() - start
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return waited_s

    return step


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
    take_turns(folder, "stock", rank, stock_step(rank))
    dist.destroy_process_group()


def exact_worker(settings: dict[str, Any]) -> None:
    rank = ray.train.get_context().get_world_rank()
    trainer, folder = ExactTrainer(rank), Path(settings["folder"])
    take_turns(folder, "exact", rank, trainer.step)
    if rank == 0:
        (folder / "bytes").write_text(str(trainer.bytes_sent / (NUM_ROUNDS * STEPS_PER_ROUND)))


def memory_process(rank: int, folder: Path, *, shard: Shard) -> None:
    """Records the peak growth of this process from before it had a model until after three steps."""
    store = f"file://{folder}/memory-{shard}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE)
    before = psutil.Process().memory_info().rss
    trainer = ExactTrainer(rank, shard=shard)
    for number in range(1, 4):
        trainer.step(number)
    peak = 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    if rank == 0:
        (folder / f"memory-{shard}.mb").write_text(str((peak - before) / 1e6))
    dist.destroy_process_group()

"""The exact engine as a library beside stock DistributedDataParallel: the same module, batches and
rule, two processes of one thread each, in turns.

    python -m tests.benchmarks.bench_engine [--rounds 9]

A step is 8 lanes of 8 images for a vision transformer of 5M parameters (transformers' module), of
which each process computes 4. DistributedDataParallel accumulates over its four, and sends in the
last (`no_sync`); its AdamW is PyTorch's fused one. Prints the median of the rounds' ratios of
seconds, and their spread; below 1 the engine is the faster one.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import ViTConfig, ViTForImageClassification

from jobs.exact.engine import AdamW, ExactEngine

_WORLD_SIZE, _NUM_LANES, _NUM_IMAGES, _SIDE = 2, 8, 8, 32
_STEPS_OF_ROUND = 2
_RATE = 1e-4


def module() -> nn.Module:
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=256,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=1024,
            image_size=_SIDE,
            patch_size=4,
            num_labels=10,
            hidden_dropout_prob=0.0,
        )
    ).train()


def batch_of(lane: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(lane)
    images = torch.rand(_NUM_IMAGES, 3, _SIDE, _SIDE, generator=generator)
    return images, torch.randint(10, (_NUM_IMAGES,), generator=generator)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    result: Tensor = model(pixel_values=images, labels=labels).loss
    return result


def stock_step() -> Callable[[], object]:
    model = DistributedDataParallel(module())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    lanes = range(dist.get_rank(), _NUM_LANES, _WORLD_SIZE)

    def step() -> None:
        optimizer.zero_grad()
        for lane in lanes:
            with nullcontext() if lane == lanes[-1] else model.no_sync():
                (loss(model, batch_of(lane)) / len(lanes)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def work(rank: int, folder: str, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=_WORLD_SIZE
    )
    engine = ExactEngine(
        module(), loss, num_lanes=_NUM_LANES, rule=AdamW(0.9, 0.95, 0.1), grad_clip=1.0
    )
    steps: dict[str, Callable[[], object]] = {
        "engine": lambda: engine.step(batch_of, learning_rate=_RATE),
        "stock": stock_step(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name in sorted(steps, reverse=number % 2 == 1):
            dist.barrier()
            start_s = time.perf_counter()
            for _ in range(_STEPS_OF_ROUND):
                steps[name]()
            dist.barrier()
            seconds[name].append((time.perf_counter() - start_s) / _STEPS_OF_ROUND)
    if rank == 0:
        # The first round warms up
        ratios = [ours / theirs for ours, theirs in zip(*map(seconds.get, steps), strict=True)][1:]
        result = {
            "ratio": round(statistics.median(ratios), 3),
            "spread": [round(min(ratios), 3), round(max(ratios), 3)],
            **{f"{name}_s": round(statistics.median(s[1:]), 3) for name, s in seconds.items()},
        }
        print(json.dumps(result))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds, after one to warm up")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(_WORLD_SIZE):
            process = context.Process(
                target=work, args=(rank, folder, arguments.rounds), daemon=True
            )
            process.start()
            processes.append(process)
        for process in processes:
            process.join()


if __name__ == "__main__":
    main()

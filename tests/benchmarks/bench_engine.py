"""The exact engine as a library beside PyTorch's own DistributedDataParallel and FSDP2: the same
module, batches and rule, processes of one thread each over gloo, in turns.

    python -m tests.benchmarks.bench_engine [--rounds 5] [--workers 2]

A step is 8 lanes of 8 images for a vision transformer of 5M parameters (transformers' module), of
which each process computes its share. PyTorch's ways accumulate over theirs, and send in the last;
their AdamW is PyTorch's fused one, and FSDP2 shards each layer. Prints for each way, as medians of
the rounds: the seconds and the processor time of a step, all processes together, beside DDP's; and
the bytes that a process sends, as the kernel counts them, beside those of the parameters. Last, one
JSON object.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.modeling_vit import ViTLayer

from raymill import AdamW, ExactEngine
from raymill.state.shard import Shard
from tests.benchmarks.worker_memory import socket_bytes

_NUM_LANES, _NUM_IMAGES, _SIDE = 8, 8, 32
_STEPS_OF_ROUND = 2
_RATE = 1e-4
_WAYS = [shard for shard in get_args(Shard) if shard != "parameters"] + ["DDP", "FSDP2"]


class Taken(NamedTuple):
    """By a step."""

    wall_s: float
    cpu_s: float
    sent_bytes: float


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


def step_of(way: str) -> Callable[[], object]:
    if way == "DDP":
        wrapped = DistributedDataParallel(module())

        def synchronize(sends: bool) -> None:
            wrapped.require_backward_grad_sync = sends  # as its no_sync() does

        return _stock_step(wrapped, synchronize)
    if way == "FSDP2":
        model = module()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in model.modules():
            if isinstance(part, ViTLayer):
                fully_shard(part, mesh=mesh)
        return _stock_step(model, fully_shard(model, mesh=mesh).set_requires_gradient_sync)
    engine = ExactEngine(
        module(),
        loss,
        num_lanes=_NUM_LANES,
        rule=AdamW(0.9, 0.95, 0.1),
        grad_clip=1.0,
        shard=way,  # type: ignore[arg-type]  # one of its words
    )
    return lambda: engine.step(batch_of, learning_rate=_RATE)


def _stock_step(model: nn.Module, synchronize: Callable[[bool], None]) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    lanes = range(dist.get_rank(), _NUM_LANES, dist.get_world_size())

    def step() -> None:
        optimizer.zero_grad()
        for lane in lanes:
            synchronize(lane == lanes[-1])
            (loss(model, batch_of(lane)) / len(lanes)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def work(rank: int, world_size: int, folder: str, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    steps = {way: step_of(way) for way in _WAYS}
    taken: dict[str, list[Taken]] = {way: [] for way in steps}
    for number in range(rounds + 1):
        turn = number % len(_WAYS)
        for way in _WAYS[turn:] + _WAYS[:turn]:
            taken[way].append(_taken_by(steps[way]))
    if rank == 0:
        # The first round warms up
        print_figures({way: rounds_of_way[1:] for way, rounds_of_way in taken.items()})
    dist.barrier()
    dist.destroy_process_group()


def _taken_by(step: Callable[[], object]) -> Taken:
    """Returns what a step takes: seconds, processor time of all processes, bytes that one sends."""
    dist.barrier()
    wall_s, cpu_s, sent_bytes = time.perf_counter(), time.process_time(), socket_bytes()
    for _ in range(_STEPS_OF_ROUND):
        step()
    own = [time.process_time() - cpu_s, float(socket_bytes() - sent_bytes)]
    dist.barrier()
    wall_s = time.perf_counter() - wall_s
    totals = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(totals)
    cpu_s, sent = totals.tolist()
    per_process = sent / dist.get_world_size()
    return Taken(wall_s / _STEPS_OF_ROUND, cpu_s / _STEPS_OF_ROUND, per_process / _STEPS_OF_ROUND)


def print_figures(taken: dict[str, list[Taken]]) -> None:
    parameter_bytes = sum(parameter.nbytes for parameter in module().parameters())
    figures: dict[str, dict[str, float]] = {}
    print(f"{'':10} {'s':>6} {'/DDP':>6} {'CPU s':>6} {'/DDP':>6}  least, most  {'bytes':>6}")
    for way, rounds_of_way in taken.items():
        pairs = [*zip(rounds_of_way, taken["DDP"], strict=True)]
        cpu_ratios = [ours.cpu_s / theirs.cpu_s for ours, theirs in pairs]
        figures[way] = {
            "wall_s": statistics.median(one.wall_s for one in rounds_of_way),
            "wall_over_ddp": statistics.median(our.wall_s / their.wall_s for our, their in pairs),
            "cpu_s": statistics.median(one.cpu_s for one in rounds_of_way),
            "cpu_over_ddp": statistics.median(cpu_ratios),
            "least_cpu_over_ddp": min(cpu_ratios),
            "most_cpu_over_ddp": max(cpu_ratios),
            "sent_over_parameters": statistics.median(
                one.sent_bytes / parameter_bytes for one in rounds_of_way
            ),
        }
        wall_s, over, cpu_s, cpu_over, least, most, sent = figures[way].values()
        print(
            f"{way:10} {wall_s:6.2f} {over:6.2f} {cpu_s:6.2f} {cpu_over:6.2f}  {least:5.2f}, {most:4.2f}  {sent:6.2f}"
        )
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one to warm up")
    parser.add_argument("--workers", type=int, default=2, choices=(1, 2, 4))
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(arguments.workers):
            process = context.Process(
                target=work, args=(rank, arguments.workers, folder, arguments.rounds), daemon=True
            )
            process.start()
            processes.append(process)
        for process in processes:
            process.join()


if __name__ == "__main__":
    main()

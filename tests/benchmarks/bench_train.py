"""Training in numbers: raymill's step beside Hugging Face's and a plain loop's, then exact mode
beside stock DDP.

    python -m tests.benchmarks.bench_train [--rounds 5] [--small]

First, one process and one thread: every contender does the same work on the same batches, forward,
loss, backward, clipping, AdamW. raymill's step takes turns with one peer at a time, so that a
change of the machine's speed meets both and two models are in memory at most; a ratio is the median
of its rounds' ratios, and the best peer decides. Compiling is not timed. raymill's plain way to
compute (`train.compute`) stands beside its way for CPUs. Precisions are those that this processor
computes at speed, the same for all. Then what `bench_exact` says. Prints a table of each and, last,
one JSON object.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from model.hardware.processor import fast_precision
from tests.benchmarks import bench_insight
from tests.benchmarks.bench_exact import measure, print_table
from tests.benchmarks.gemm_peak import gemm_peak
from tests.benchmarks.train_steps import (
    COMPILED_PEERS,
    PEERS,
    Cell,
    Step,
    raymill,
    why_not_compiled,
)

NUM_WARM_UPS = 2

CELLS = [
    Cell("small-10m", batch_size=4, seq_len=256, precision="fp32"),
    Cell("small-10m", batch_size=4, seq_len=256, precision="bf16"),
    Cell("gpt2-124m", batch_size=1, seq_len=512, precision="fp32"),
    Cell("gpt2-124m", batch_size=1, seq_len=512, precision="bf16"),
]


@dataclass
class Taken:
    """The time of a contender's steps, round by round; `cpu` is processor time, which other
    programs hardly change."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def time(self, step: Step, number: int) -> None:
        start, start_cpu = time.perf_counter(), time.process_time()
        step(number)
        self.wall.append(time.perf_counter() - start)
        self.cpu.append(time.process_time() - start_cpu)

    def __add__(self, other: "Taken") -> "Taken":
        return Taken(self.wall + other.wall, self.cpu + other.cpu)


def take_turns(ours: Step, peer: Step, *, num_rounds: int) -> tuple[Taken, Taken]:
    """Lets either one begin every other round."""
    for number in range(NUM_WARM_UPS):
        ours(number)
        peer(number)
    taken = Taken(), Taken()
    for number in range(num_rounds):
        turns = list(zip(taken, (ours, peer), strict=True))
        for contender, step in turns if number % 2 else reversed(turns):
            contender.time(step, number)
    return taken


def compare(
    cell: Cell, peers: dict[str, Callable[[Cell], Step]], *, num_rounds: int
) -> dict[str, float]:
    """Prints the cell's lines. Ratios above 1 mean that raymill is faster."""
    gc.collect()
    peak = gemm_peak(cell.precision)
    step, total = raymill(cell), Taken()
    ratios: dict[str, float] = {}
    cpu_ratios: dict[str, float] = {}
    figures: dict[str, float] = {}
    for name, make in peers.items():
        ours, theirs = take_turns(step, make(cell), num_rounds=num_rounds)
        torch.compiler.reset()
        gc.collect()  # models are parts of cycles
        total += ours
        ratios[name], cpu_ratios[name] = ratio(theirs.wall, ours.wall), ratio(theirs.cpu, ours.cpu)
        figures |= _row(
            cell,
            name,
            theirs,
            f"  ratio {ratios[name]:.2f}, of processor time {cpu_ratios[name]:.2f}",
        )
    ours, theirs = take_turns(step, raymill(cell, "plain"), num_rounds=num_rounds)
    text = f"  ratio {ratio(theirs.wall, ours.wall):.2f}: what a GPU computes with, uncompiled"
    figures |= _row(cell, "raymill, plain way", theirs, text)
    figures[f"{cell.label}_plain_way_ratio"] = round(ratio(theirs.wall, ours.wall), 3)
    # One thread that waits for nothing: its processor time is what a step takes on an idle machine.
    fraction = cell.num_flops / statistics.median(total.cpu) / peak
    best = min(ratios, key=lambda name: ratios[name])
    text = f"  {fraction:.0%} of the GEMM peak, {peak / 1e9:.0f} GFLOP/s; {ratios[best]:.2f} x the best peer, {best}"
    figures |= _row(cell, "raymill", total, text)
    return figures | {
        f"{cell.label}_ratio": round(ratios[best], 3),
        f"{cell.label}_cpu_ratio": round(min(cpu_ratios.values()), 3),
        f"{cell.label}_gemm_fraction": round(fraction, 3),
        f"{cell.label}_gemm_peak_gflops": round(peak / 1e9, 1),
    }


def ratio(theirs: list[float], ours: list[float]) -> float:
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=True))


def _row(cell: Cell, name: str, taken: Taken, text: str) -> dict[str, float]:
    median = statistics.median(taken.wall)
    spread = (max(taken.wall) - min(taken.wall)) / median
    rate = cell.num_tokens / median
    print(
        f"{cell.label:14} {name:22} {rate:7,.0f} tokens/s  spread {spread:4.0%}{text}", flush=True
    )
    return {
        f"{cell.label}_{name.lower().replace(',', '').replace(' ', '_')}_tokens_per_s": round(
            rate, 1
        )
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="timed steps of each contender beside each other"
    )
    parser.add_argument("--small", action="store_true", help="the 10M shape only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    peers, problem = PEERS, why_not_compiled()
    if problem is None:
        peers = PEERS | COMPILED_PEERS
    else:
        print(f"without torch.compile, which does not work here: {problem}")
    cells = CELLS[:2] if arguments.small else CELLS
    if fast_precision("cpu") == "fp32":
        print("without bf16, which this processor emulates")
        cells = [cell for cell in cells if cell.precision == "fp32"]
    figures: dict[str, Any] = {"compiled": problem is None}
    for cell in cells:
        figures |= compare(cell, peers, num_rounds=arguments.rounds)
    print(
        "\nexact mode under Ray Train beside stock DistributedDataParallel, two workers of one thread each, in fp32"
    )
    exact = measure()
    print_table(exact)
    insight = bench_insight.measure("small-10m")
    costs = {name: insight[f"cpu_{name}_overhead"] for name in ("timing", "statistics")}
    print(
        "\n"
        + ", ".join(f"{name} of each step costs {cost:.2%}" for name, cost in costs.items())
        + " of its time"
    )
    smallest = {
        "best_peer_ratio": min(figures[f"{cell.label}_ratio"] for cell in cells),
        "best_peer_cpu_ratio": min(figures[f"{cell.label}_cpu_ratio"] for cell in cells),
        "exact_over_ddp_ratio": exact["exact_over_ddp_ratio"],
        "insight_overhead": round(sum(costs.values()), 5),
        "gemm_fraction": min(figures[f"{cell.label}_gemm_fraction"] for cell in cells),
    }
    print(
        json.dumps(
            smallest
            | figures
            | exact
            | {f"insight_{name}": value for name, value in insight.items()}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

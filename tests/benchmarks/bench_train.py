"""Training tokens/s of one process and one thread: raymill's step beside Hugging Face's GPT-2 and a plain loop.

All do the same work on the same batches: forward, loss, backward, clipping, AdamW, without torch.compile. They take
turns, so that a change of the machine's speed meets all. Prints a line a contender and, last, one JSON object.
"""

import argparse
import json
import statistics
import sys
import time

import torch

from tests.benchmarks.train_steps import CONTENDERS, Cell

CELLS = [
    Cell("small-10m", batch_size=4, seq_len=256, precision="fp32"),
    Cell("small-10m", batch_size=4, seq_len=256, precision="bf16"),
    Cell("gpt2-124m", batch_size=1, seq_len=512, precision="fp32"),
    Cell("gpt2-124m", batch_size=1, seq_len=512, precision="bf16"),
]


def seconds_of_steps(cell: Cell, *, num_rounds: int) -> dict[str, list[float]]:
    """By contender, after a round that warms up."""
    steps = {name: make(cell) for name, make in CONTENDERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(num_rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step(number)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="the 10M shape only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result, ratios = {}, []
    for cell in CELLS[:2] if arguments.small else CELLS:
        label = f"{cell.preset}_{cell.precision}"
        seconds = seconds_of_steps(cell, num_rounds=arguments.rounds)
        for name, values in seconds.items():
            median = statistics.median(values)
            spread = (max(values) - min(values)) / median
            print(f"{label:16}  {name:12}  {cell.num_tokens / median:8.0f} tokens/s  spread {spread:.0%}", flush=True)
            result[f"{label}_{name}_tokens_per_s"] = round(cell.num_tokens / median, 1)
        ours = seconds.pop("raymill")
        ratios.append(
            min(statistics.median(b / a for a, b in zip(ours, peer, strict=True)) for peer in seconds.values())
        )
        result[f"{label}_ratio"] = round(ratios[-1], 3)
        print(f"{label:16}  ratio to the best peer {ratios[-1]:.2f}", flush=True)
    print(json.dumps({"best_peer_ratio": round(min(ratios), 3)} | result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

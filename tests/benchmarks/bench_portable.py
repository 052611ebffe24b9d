"""What `train.compute=portable` costs: the processor time of a step over that of `cpu` in fp32.

    python -m tests.benchmarks.bench_portable [--preset small-10m] [--rounds 7]

Both take one step each in turn, on one thread; the ratio is the median of the rounds', and above 1
it says that portable steps cost more. Prints a line, and one JSON object at last. All are held to
AVX2 by RAYMILL_KERNELS_MARCH=x86-64-v3 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2
MKL_ENABLE_INSTRUCTIONS=AVX2; MKL obeys the last one alone, on processors of Intel.
"""

import argparse
import json
import statistics
import time

import torch

from model.hardware.processor import cpu_field
from tests.benchmarks.train_steps import Cell, Step, raymill

CELLS = {"small-10m": (4, 256), "gpt2-124m": (1, 512), "smollm2-135m": (1, 512)}
"""Rows of a batch, and their tokens, by preset."""


def seconds_of(step: Step, number: int) -> float:
    began_s = time.process_time()
    step(number)
    return time.process_time() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="small-10m", choices=CELLS)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cell = cell_of(arguments.preset)
    plain, portable = raymill(cell, "cpu"), raymill(cell, "portable")
    ratios, portable_s = [], []
    for number in range(1 + arguments.rounds):
        usual_s, own_s = seconds_of(plain, number), seconds_of(portable, number)
        if number:  # the first one warms up
            ratios.append(own_s / usual_s)
            portable_s.append(own_s)
    found = {
        "preset": arguments.preset,
        "ratio": round(statistics.median(ratios), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
        "step_s": round(statistics.median(portable_s), 3),
        "processor": cpu_field("model name"),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    print(
        f"{found['preset']}: {found['ratio']} of fp32's processor time "
        f"({found['lowest']} to {found['highest']})"
    )
    print(json.dumps(found))


def cell_of(preset: str) -> Cell:
    rows, tokens = CELLS[preset]
    return Cell(preset, rows, tokens, "fp32")


if __name__ == "__main__":
    main()

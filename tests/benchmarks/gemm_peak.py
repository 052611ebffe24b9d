"""The rate at which this machine multiplies matrices with one thread: what a training step is
measured against."""

import statistics
import time

import torch

SHAPES = [
    (1024, 1024, 1024),
    (2048, 2048, 2048),
    (1024, 384, 1536),
    (512, 768, 3072),
    (512, 3072, 768),
]
"""(rows, inner, columns): two square ones and those of the compared models' feed-forward layers."""

NUM_REPEATS = 7


def gemm_peak(precision: str) -> float:
    """Returns FLOP per second of processor time: the largest of the shapes' medians, with the
    result preallocated."""
    return max(
        _rate(*shape, torch.bfloat16 if precision == "bf16" else torch.float32) for shape in SHAPES
    )


def _rate(m: int, k: int, n: int, dtype: torch.dtype) -> float:
    left, right, out = (
        torch.randn(m, k).to(dtype),
        torch.randn(k, n).to(dtype),
        torch.zeros(m, n, dtype=dtype),
    )
    seconds = []
    for number in range(NUM_REPEATS + 1):
        start = time.thread_time()
        torch.mm(left, right, out=out)
        if number:
            seconds.append(time.thread_time() - start)
    return 2 * m * k * n / statistics.median(seconds)

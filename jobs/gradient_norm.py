"""The gradient's norm in an order of summing that no world size changes: fixed blocks, then the blocks' sums."""

import torch
from torch import Tensor

from jobs.flat_layout import BLOCK


def block_square_sums(values: Tensor) -> Tensor:
    """Sums of squares (P / BLOCK,), in float64, of values (P,) that begin at a block; the last may be short.

    The same bits for a block whichever blocks are computed with it. Within one fp32 will do: half the time of float64.
    """
    whole = len(values) - len(values) % BLOCK
    parts = [part for part in (values[:whole].view(-1, BLOCK), values[whole:].view(1, -1)) if part.numel()]
    sums = [torch.linalg.vector_norm(part, dim=1).double().square_() for part in parts]
    return torch.cat(sums) if sums else values.new_zeros(0, dtype=torch.float64)


def norm_of(block_sums: Tensor) -> float:
    """Euclidean norm from the sums of all blocks, in order."""
    return float(block_sums.sum().sqrt())


def gradient_norm(gradient: Tensor) -> float:
    """Euclidean norm (P,) → scalar."""
    return norm_of(block_square_sums(gradient))

"""The gradient's norm in an order of summing that no world size changes: fixed blocks, then the blocks' sums."""

import torch
from torch import Tensor

from jobs.flat_layout import BLOCK

_PIECE = 64 * BLOCK  # its float64 copy, 512 kB, stays in the processor's cache beside it


def block_square_sums(values: Tensor) -> Tensor:
    """Sums of squares (P / BLOCK,), in float64, of values (P,) that begin at a block; the last may be short.

    The same bits for a block whichever blocks are computed with it.
    """
    whole = len(values) - len(values) % BLOCK
    sums = [piece.double().square_().view(-1, BLOCK).sum(dim=1) for piece in values[:whole].split(_PIECE) if len(piece)]
    if whole < len(values):
        sums.append(values[whole:].double().square_().sum().view(1))
    return torch.cat(sums) if sums else values.new_zeros(0, dtype=torch.float64)


def norm_of(block_sums: Tensor) -> float:
    """Euclidean norm from the sums of all blocks, in order."""
    return float(block_sums.sum().sqrt())


def gradient_norm(gradient: Tensor) -> float:
    """Euclidean norm (P,) → scalar."""
    return norm_of(block_square_sums(gradient))

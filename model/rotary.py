"""Angles of rotary positions (Su et al., arXiv 2104.09864)."""

import decimal
import math
from decimal import Decimal
from functools import lru_cache

import torch
from torch import Tensor

from model.config import GPTConfig

_PI = Decimal("3.14159265358979323846264338327950288419716939937510582")


def turns(config: GPTConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines (B, T, 1, D / 2) of the angles of tokens at positions (B, T)."""
    angles = positions[:, :, None, None] * frequencies(config, positions.device)
    return angles.cos(), angles.sin()


def frequencies(config: GPTConfig, device: torch.device | str = "cpu") -> Tensor:
    """Returns the angle of each pair (D / 2,) for one position, in radians, fp32. With
    `rope_original_positions` those that turn less than once in that context are divided by
    `rope_factor`, those that turn four times or more are kept, and in between it is a mixture;
    without it all are divided."""
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    plain = 1.0 / config.rope_theta**exponents
    if config.rope_original_positions is None:
        return plain / config.rope_factor
    turns = config.rope_original_positions * plain / (2 * math.pi)
    kept = ((turns - 1) / 3).clamp(0, 1)
    return (1 - kept) * plain / config.rope_factor + kept * plain


@lru_cache(maxsize=8)  # each pass of a micro-batch asks
def exact_frequencies(config: GPTConfig) -> Tensor:
    """Returns `frequencies`, computed in 50 digits and rounded once: the same bits on every
    processor, which PyTorch's powers do not have."""
    with decimal.localcontext(prec=50):
        base, factor = Decimal(config.rope_theta), Decimal(config.rope_factor)
        angles = []
        for pair in range(config.head_dim // 2):
            plain = base ** (Decimal(-2 * pair) / config.head_dim)
            kept = Decimal(0)
            if config.rope_original_positions is not None:
                turns = config.rope_original_positions * plain / (2 * _PI)
                kept = min(max((turns - 1) / 3, Decimal(0)), Decimal(1))
            angles.append(float((1 - kept) * plain / factor + kept * plain))
    return torch.tensor(angles)

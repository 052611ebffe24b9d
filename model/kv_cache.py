"""The keys and values of past tokens, kept so that each new token is read once.

Shapes: L layers, H heads, G heads of keys and values, D = head width, B rows of a call, T new
tokens of a row, P positions up to the last new one.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import GPTConfig


class Window(Protocol):
    """The part of a cache that the rows of one forward call see."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Writes the new keys and values (B, G, T, D) of `layer`, and returns the attention of the
        queries (B, H, T, D) to everything that their rows may see, (B, H, T, D)."""


class Cache(Protocol):
    """Keeps keys and values; the serving engine has another one than `KVCache`."""

    def window(self, positions: Tensor) -> Window:
        """Returns what new tokens at `positions` (B, T), which ascend by one within a row, see."""


@dataclass
class ModuleCache:
    """The cache of one sequence, in the form of a module of another library; None at first."""

    states: Any = None


def visible_mask(
    positions: Tensor, num_positions: int, *, dtype: torch.dtype
) -> tuple[bool, Tensor | None]:
    """Tells whether positions (B, T) are the plain causal case, and returns the mask (B, 1, T, P)
    under which each sees those up to its own otherwise; None where one position sees all."""
    num_new = positions.shape[1]
    if num_new == num_positions:  # every row starts at 0: prefill
        return num_new > 1, None
    if positions.numel() == 1:
        return False, None
    # (B, T, P)
    seen = torch.arange(num_positions, device=positions.device) <= positions[:, :, None]
    mask = torch.zeros(seen.shape, dtype=dtype, device=positions.device)
    return False, mask.masked_fill(~seen, -math.inf)[:, None]


def for_each_head(values: Tensor, num_heads: int, *, dim: int) -> Tensor:
    """Returns keys or values, whose heads G are at `dim`, once for each of so many heads: neighbors
    share one."""
    times = num_heads // values.shape[dim]
    return values if times == 1 else values.repeat_interleave(times, dim)


class KVCache:
    """Keys and values (L, 1, G, max_len, D) of one sequence, and what the last `window` was asked
    for: one forward call's view, the same for every layer."""

    def __init__(
        self, config: GPTConfig, *, max_len: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (config.n_layer, 1, config.num_kv_heads, max_len, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)

    def window(self, positions: Tensor) -> Self:
        self._new = slice(int(positions[0, 0]), int(positions[0, -1]) + 1)
        self._is_causal, self._mask = visible_mask(positions, self._new.stop, dtype=self.keys.dtype)
        return self

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        self.keys[layer][:, :, self._new], self.values[layer][:, :, self._new] = keys, values
        # (1, G, P, D)
        seen = (pool[layer][:, :, : self._new.stop] for pool in (self.keys, self.values))
        seen_keys, seen_values = (for_each_head(values, queries.shape[1], dim=1) for values in seen)
        return F.scaled_dot_product_attention(
            queries, seen_keys, seen_values, attn_mask=self._mask, is_causal=self._is_causal
        )

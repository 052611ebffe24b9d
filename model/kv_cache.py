"""The keys and values of past tokens, in a fixed pool of slots: one sequence holds one slot.

Shapes: L layers, S slots, H heads, D = head width, B rows of a call, T new tokens of a row, P cached positions read.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import GPTConfig


class Window(Protocol):
    """What the rows of one forward call see of a cache."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Writes the new keys and values (B, H, T, D) of `layer`; returns what the queries (B, H, T, D) find in all
        that their rows may see, (B, H, T, D)."""


class Cache(Protocol):
    """Keys and values of past tokens, whoever keeps them."""

    def window(self, slots: Tensor, positions: Tensor) -> Window:
        """What the rows that `slots` names see from `positions` (B, T), which ascend by one within a row."""


def visible_mask(positions: Tensor, num_positions: int, *, dtype: torch.dtype) -> tuple[bool, Tensor | None]:
    """Whether positions (B, T) are the plain causal case, and else the mask (B, 1, T, P) under which each sees those up
    to its own; none where one position sees all."""
    num_new = positions.shape[1]
    if num_new == num_positions:  # every row starts at 0: prefill
        return num_new > 1, None
    if positions.numel() == 1:
        return False, None
    seen = torch.arange(num_positions, device=positions.device) <= positions[:, :, None]  # (B, T, P)
    mask = torch.zeros(seen.shape, dtype=dtype, device=positions.device)
    return False, mask.masked_fill(~seen, -math.inf)[:, None]


class KVCache:
    """Keys and values (L, S, H, max_len, D). A slot needs no clearing: a row only sees positions up to its own,
    and those its own sequence has written."""

    def __init__(
        self, config: GPTConfig, *, num_slots: int, max_len: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (config.n_layer, num_slots, config.n_head, max_len, config.head_dim)
        # Zeros, not empty memory: a masked position still meets its weight of 0, and 0 x NaN is NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @staticmethod
    def num_bytes(config: GPTConfig, *, num_slots: int, max_len: int, dtype: torch.dtype) -> int:
        return 2 * config.n_layer * num_slots * max_len * config.n_embd * dtype.itemsize

    def window(self, slots: Tensor, positions: Tensor) -> "SlotWindow":
        """What rows `slots` (B,) see from `positions` (B, T), which ascend by one within a row."""
        num_positions = int(positions.max()) + 1
        is_causal, mask = visible_mask(positions, num_positions, dtype=self.keys.dtype)
        slot_list = slots.tolist()
        first = slot_list[0]
        in_order = slot_list == list(range(first, first + len(slot_list)))
        return SlotWindow(
            cache=self,
            slots=slots,
            positions=positions,
            slot_range=slice(first, first + len(slot_list)) if in_order else None,
            num_positions=num_positions,
            mask=mask,
            is_causal=is_causal,
        )


@dataclass(frozen=True)
class SlotWindow:
    """One forward call's view of the cache, the same for every layer."""

    cache: KVCache
    slots: Tensor  # (B,)
    positions: Tensor  # (B, T)
    slot_range: slice | None  # consecutive slots are read in place, without the copy that gathering makes
    num_positions: int
    mask: Tensor | None  # (B, 1, T, P), added to the scores
    is_causal: bool

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        rows = self.slots if self.slot_range is None else self.slot_range
        pool_keys, pool_values = self.cache.keys[layer], self.cache.values[layer]  # (S, H, max_len, D)
        pool_keys[self.slots[:, None], :, self.positions] = keys.transpose(1, 2)  # (B, T, H, D)
        pool_values[self.slots[:, None], :, self.positions] = values.transpose(1, 2)
        seen_keys, seen_values = (pool[rows, :, : self.num_positions] for pool in (pool_keys, pool_values))
        return F.scaled_dot_product_attention(
            queries, seen_keys, seen_values, attn_mask=self.mask, is_causal=self.is_causal
        )

"""The decoder's step in PyTorch, on any device.

Shapes: B rows of a call, T new tokens of a row, P cached positions read, L layers, H heads of width D, W blocks of a
row, S = BLOCK_TOKENS.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import GPTConfig
from model.gpt import GPT
from model.kv_cache import visible_mask
from serving.block_pool import BLOCK_TOKENS, num_blocks_for
from serving.runner import Reading, Survey


class TorchRunner:
    """A `Runner`."""

    def __init__(self, model: GPT, *, num_blocks: int) -> None:
        self._model = model.eval()
        parameter = next(model.parameters())
        self._device = parameter.device
        self._cache = BlockCache(model.config, num_blocks=num_blocks, dtype=parameter.dtype, device=parameter.device)

    def forward(self, readings: Sequence[Reading]) -> Tensor:
        """Single tokens together, longer readings one by one: rows of a call have one length."""
        single = [i for i, reading in enumerate(readings) if len(reading.token_ids) == 1]
        hidden: list[Tensor | None] = [None] * len(readings)
        if single:
            for i, row in zip(single, self._read([readings[i] for i in single]), strict=True):
                hidden[i] = row
        return torch.cat([self._read([r])[0] if row is None else row for r, row in zip(readings, hidden, strict=True)])

    def logits(self, hidden: Tensor) -> Tensor:
        return self._model.logits(hidden)

    def survey(self, logits: Tensor) -> Survey:
        return Survey(logits.argmax(dim=-1), logits.isfinite().all(dim=-1))

    def clear(self, blocks: Sequence[int]) -> None:
        self._cache.keys[:, list(blocks)] = 0
        self._cache.values[:, list(blocks)] = 0

    def _read(self, readings: Sequence[Reading]) -> Tensor:
        """Hidden states (B, T, C) of readings of one length."""
        width = max(len(reading.blocks) for reading in readings)
        tables = [reading.blocks + [0] * (width - len(reading.blocks)) for reading in readings]
        num_tokens = len(readings[0].token_ids)
        first = torch.tensor([[reading.position] for reading in readings], device=self._device)  # (B, 1)
        return self._model(
            torch.tensor([reading.token_ids for reading in readings], device=self._device),  # (B, T)
            kv_cache=self._cache,
            slots=torch.tensor(tables, device=self._device),  # (B, W)
            positions=first + torch.arange(num_tokens, device=self._device),  # (B, T)
        )


class BlockCache:
    """Keys and values (L, blocks, H, S, D) of many sequences; a row is named by its blocks instead of a slot."""

    def __init__(self, config: GPTConfig, *, num_blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.n_layer, num_blocks, config.n_head, BLOCK_TOKENS, config.head_dim)
        # Zeros, not empty memory: a masked position still meets its weight of 0, and 0 x NaN is NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def window(self, slots: Tensor, positions: Tensor) -> "BlockWindow":
        """What rows with the blocks `slots` (B, W) see from `positions` (B, T), which ascend by one within a row."""
        num_positions = int(positions.max()) + 1
        is_causal, mask = visible_mask(positions, num_positions, dtype=self.keys.dtype)
        return BlockWindow(
            self, slots[:, : num_blocks_for(num_positions)], positions, num_positions, mask=mask, is_causal=is_causal
        )


@dataclass(frozen=True)
class BlockWindow:
    """One forward call's view of the cache, the same for every layer."""

    cache: BlockCache
    tables: Tensor  # (B, W)
    positions: Tensor  # (B, T)
    num_positions: int
    mask: Tensor | None  # (B, 1, T, P), added to the scores
    is_causal: bool

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new keys and values (B, H, T, D) of `layer`; returns all that the rows may see, (B, H, P, D)."""
        blocks = self.tables.gather(1, self.positions // BLOCK_TOKENS)  # (B, T)
        offsets = self.positions % BLOCK_TOKENS
        pool_keys, pool_values = self.cache.keys[layer], self.cache.values[layer]  # (blocks, H, S, D)
        pool_keys[blocks, :, offsets] = keys.transpose(1, 2)  # (B, T, H, D)
        pool_values[blocks, :, offsets] = values.transpose(1, 2)
        return self._gathered(pool_keys), self._gathered(pool_values)

    def _gathered(self, pool: Tensor) -> Tensor:
        rows = pool[self.tables].transpose(1, 2)  # (B, H, W, S, D)
        return rows.flatten(2, 3)[:, :, : self.num_positions]

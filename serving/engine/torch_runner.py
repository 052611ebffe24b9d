"""Computes the decoder's step in PyTorch, with one call of the model for all tokens of a step: the reference for the
native kernels, and the fallback where they cannot be compiled.

The projections see the tokens as one long row; in attention each reading is by itself.
Shapes: N tokens of a step, T of a reading, P cached positions that it sees, L layers, H heads of width D, G of keys and
values, S = BLOCK_TOKENS.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.gpt import GPT
from model.kv_cache import for_each_head, visible_mask
from serving.engine.block_pool import BLOCK_TOKENS, num_blocks_for
from serving.engine.runner import Reading, Survey


class TorchRunner:
    """The `Runner` of PyTorch."""

    def __init__(self, model: GPT, *, num_blocks: int) -> None:
        self._model = model.eval()
        shape = (model.config.n_layer, num_blocks, BLOCK_TOKENS, model.config.num_kv_heads, model.config.head_dim)
        self._keys = torch.empty(shape, dtype=next(model.parameters()).dtype)  # (L, blocks, S, G, D)
        self._values = torch.empty_like(self._keys)

    def forward(self, readings: Sequence[Reading]) -> Tensor:
        token_ids = [token_id for reading in readings for token_id in reading.token_ids]
        positions = [position for reading in readings for position in reading.positions]
        cache = StepCache(self._keys, self._values, readings)
        hidden: Tensor = self._model(torch.tensor([token_ids]), kv_cache=cache, positions=torch.tensor([positions]))
        return hidden[0]

    def logits(self, hidden: Tensor) -> Tensor:
        return self._model.logits(hidden)

    def survey(self, logits: Tensor) -> Survey:
        return Survey(logits.argmax(dim=-1), logits.isfinite().all(dim=-1))


@dataclass(frozen=True)
class StepCache:
    """The cache as one step sees it: its readings follow each other in one row."""

    keys: Tensor  # (L, blocks, S, G, D), as `values`
    values: Tensor
    readings: Sequence[Reading]

    def window(self, positions: Tensor) -> "StepWindow":
        """Returns what tokens at `positions` (1, N) see."""
        blocks = [r.blocks[position // BLOCK_TOKENS] for r in self.readings for position in r.positions]
        own = positions.split([len(r.token_ids) for r in self.readings], dim=1)  # (1, T) each
        sights = [
            visible_mask(of_reading, reading.positions.stop, dtype=self.keys.dtype)
            for of_reading, reading in zip(own, self.readings, strict=True)
        ]
        return StepWindow(self, torch.tensor(blocks), positions[0] % BLOCK_TOKENS, sights)


@dataclass(frozen=True)
class StepWindow:
    """One step's view of the cache, the same for every layer."""

    cache: StepCache
    blocks: Tensor  # (N,)
    offsets: Tensor  # (N,), within their blocks
    sights: list[tuple[bool, Tensor | None]]  # of each reading: `visible_mask`

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attends with queries (1, H, N, D), keys and values (1, G, N, D)."""
        pools = self.cache.keys[layer], self.cache.values[layer]  # (blocks, S, G, D)
        for pool, new in zip(pools, (keys, values), strict=True):
            pool[self.blocks, self.offsets] = new[0].transpose(0, 1)  # (N, G, D)
        readings, found = self.cache.readings, []
        rows = queries.split([len(reading.token_ids) for reading in readings], dim=2)  # (1, H, T, D) each
        for row, reading, (is_causal, mask) in zip(rows, readings, self.sights, strict=True):
            seen_keys, seen_values = (for_each_head(seen(pool, reading), row.shape[1], dim=1) for pool in pools)
            y = F.scaled_dot_product_attention(row, seen_keys, seen_values, attn_mask=mask, is_causal=is_causal)
            found.append(y)
        return torch.cat(found, dim=2)


def seen(pool: Tensor, reading: Reading) -> Tensor:
    """Returns the keys or values (1, G, P, D) that a reading sees of a layer's (blocks, S, G, D)."""
    end = reading.positions.stop
    return pool[reading.blocks[: num_blocks_for(end)]].flatten(0, 1)[:end].transpose(0, 1)[None]

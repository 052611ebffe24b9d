"""Computes the decoder's step in PyTorch, with one call of the model for all tokens of a step: the
reference for the native kernels, and the fallback where they cannot be compiled.

The projections see the tokens as one long row; in attention each reading is by itself. Shapes: N
tokens of a step, T of a reading, P cached positions that it sees, L layers, H heads of width D, G
of keys and values, S = BLOCK_TOKENS.
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

    is_portable = False

    def __init__(self, model: GPT, *, num_blocks: int) -> None:
        self._model = model.eval()
        config = model.config
        shape = (config.n_layer, num_blocks, BLOCK_TOKENS, config.num_kv_heads, config.head_dim)
        dtype = next(model.parameters()).dtype
        self._keys = torch.empty(shape, dtype=dtype)  # (L, blocks, S, G, D)
        self._values = torch.empty_like(self._keys)

    def forward(self, readings: Sequence[Reading]) -> Tensor:
        token_ids: list[int] = []
        positions: list[int] = []
        for reading in readings:
            token_ids += reading.token_ids
            positions += reading.positions
        hidden: Tensor = self._model(
            torch.tensor([token_ids]),
            kv_cache=StepCache(self._keys, self._values, readings),
            positions=torch.tensor([positions]),
        )
        return hidden[0]

    def logits(self, hidden: Tensor) -> Tensor:
        return self._model.logits(hidden)

    def survey(self, logits: Tensor) -> Survey:
        return Survey(logits.argmax(dim=-1), logits.isfinite().all(dim=-1))

    def exponentials(self, numbers: Tensor) -> Tensor:
        return numbers.exp_()

    def log_probabilities(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(dim=-1)


@dataclass(frozen=True)
class StepCache:
    """The cache as one step sees it: its readings follow each other in one row."""

    keys: Tensor  # (L, blocks, S, G, D), as `values`
    values: Tensor
    readings: Sequence[Reading]

    def window(self, positions: Tensor) -> "StepWindow":
        """Returns what tokens at `positions` (1, N) see."""
        blocks: list[int] = []
        sights = []
        # (1, T) each
        by_reading = positions.split([len(reading.token_ids) for reading in self.readings], dim=1)
        for reading, row in zip(self.readings, by_reading, strict=True):
            blocks += [reading.blocks[position // BLOCK_TOKENS] for position in reading.positions]
            sights.append(visible_mask(row, reading.positions.stop, dtype=self.keys.dtype))
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
        all_keys = self.cache.keys[layer]  # (blocks, S, G, D)
        all_values = self.cache.values[layer]
        all_keys[self.blocks, self.offsets] = keys[0].transpose(0, 1)  # (N, G, D)
        all_values[self.blocks, self.offsets] = values[0].transpose(0, 1)
        readings = self.cache.readings
        # (1, H, T, D) each
        rows = queries.split([len(reading.token_ids) for reading in readings], dim=2)
        outputs = []
        for row, reading, (is_causal, mask) in zip(rows, readings, self.sights, strict=True):
            num_heads = row.shape[1]
            output = F.scaled_dot_product_attention(
                row,
                for_each_head(seen(all_keys, reading), num_heads, dim=1),
                for_each_head(seen(all_values, reading), num_heads, dim=1),
                attn_mask=mask,
                is_causal=is_causal,
            )
            outputs.append(output)
        return torch.cat(outputs, dim=2)


def seen(pool: Tensor, reading: Reading) -> Tensor:
    """Returns the keys or values (1, G, P, D) that a reading sees of a layer's (blocks, S, G,
    D)."""
    end = reading.positions.stop
    blocks = reading.blocks[: num_blocks_for(end)]
    rows = pool[blocks].flatten(0, 1)[:end]  # (P, G, D)
    return rows.transpose(0, 1)[None]

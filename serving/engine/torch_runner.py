"""Computes the decoder's step in PyTorch, with one call of the model for all tokens of a step: the reference for the
native kernels, and the fallback where they cannot be compiled.

The projections see the tokens as one long row; attention takes the readings of one length at a time.
Shapes: N tokens of a step, B readings of one length T, P cached positions read, L layers, H heads of width D, W blocks
of a reading, S = BLOCK_TOKENS.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.gpt import GPT
from model.kv_cache import visible_mask
from serving.engine.block_pool import BLOCK_TOKENS, num_blocks_for
from serving.engine.runner import Reading, Survey


class TorchRunner:
    """The `Runner` of PyTorch."""

    def __init__(self, model: GPT, *, num_blocks: int) -> None:
        self._model = model.eval()
        shape = (model.config.n_layer, num_blocks, BLOCK_TOKENS, model.config.n_head, model.config.head_dim)
        # Zeros, not empty memory: a masked position is still multiplied by its weight of 0, and 0 x NaN is NaN.
        self._keys = torch.zeros(shape, dtype=next(model.parameters()).dtype)  # (L, blocks, S, H, D)
        self._values = torch.zeros_like(self._keys)

    def forward(self, readings: Sequence[Reading]) -> Tensor:
        lengths = [len(reading.token_ids) for reading in readings]
        order = sorted(range(len(readings)), key=lengths.__getitem__)
        ordered = [readings[i] for i in order]
        token_ids = [token_id for r in ordered for token_id in r.token_ids]
        positions = [position for r in ordered for position in r.positions]
        hidden = self._model(
            torch.tensor([token_ids]),  # (1, N)
            kv_cache=StepCache(self._keys, self._values, ordered),
            positions=torch.tensor([positions]),  # (1, N)
        )[0]
        if order == sorted(order):
            return hidden
        parts = dict(zip(order, hidden.split([lengths[i] for i in order]), strict=True))
        return torch.cat([parts[i] for i in range(len(readings))])

    def logits(self, hidden: Tensor) -> Tensor:
        return self._model.logits(hidden)

    def survey(self, logits: Tensor) -> Survey:
        return Survey(logits.argmax(dim=-1), logits.isfinite().all(dim=-1))

    def clear(self, blocks: Sequence[int]) -> None:
        self._keys[:, list(blocks)] = 0
        self._values[:, list(blocks)] = 0


@dataclass(frozen=True)
class StepCache:
    """The cache as one step sees it: its readings follow each other in one row, sorted by length."""

    keys: Tensor  # (L, blocks, S, H, D), as `values`
    values: Tensor
    readings: Sequence[Reading]

    def window(self, positions: Tensor) -> "StepWindow":
        """Returns what tokens at `positions` (1, N) see."""
        groups, start = [], 0
        for length, group in itertools.groupby(self.readings, key=lambda reading: len(reading.token_ids)):
            rows = list(group)
            end = start + length * len(rows)
            groups.append(Group.of(rows, positions[0, start:end].view(-1, length), first=start, dtype=self.keys.dtype))
            start = end
        blocks = [r.blocks[position // BLOCK_TOKENS] for r in self.readings for position in r.positions]
        return StepWindow(self, torch.tensor(blocks), positions[0] % BLOCK_TOKENS, groups)


@dataclass(frozen=True)
class Group:
    """Readings of one length, whose attention is one call."""

    tokens: slice  # of the step's
    num_rows: int
    tables: Tensor  # (B, W)
    num_positions: int
    mask: Tensor | None  # (B, 1, T, P), added to the scores
    is_causal: bool

    @classmethod
    def of(cls, rows: Sequence[Reading], positions: Tensor, *, first: int, dtype: torch.dtype) -> "Group":
        num_positions = max(r.positions.stop for r in rows)
        width = num_blocks_for(num_positions)
        tables = torch.tensor([(r.blocks + [0] * width)[:width] for r in rows])
        is_causal, mask = visible_mask(positions, num_positions, dtype=dtype)
        tokens = slice(first, first + positions.numel())
        return cls(tokens, len(rows), tables, num_positions, mask=mask, is_causal=is_causal)

    def seen(self, pool: Tensor) -> Tensor:
        """Returns the visible keys or values (B, H, P, D) of a layer (blocks, S, H, D)."""
        rows = pool.index_select(0, self.tables.flatten()).view(self.num_rows, -1, *pool.shape[2:])  # (B, W x S, H, D)
        return rows[:, : self.num_positions].transpose(1, 2)


@dataclass(frozen=True)
class StepWindow:
    """One step's view of the cache, the same for every layer."""

    cache: StepCache
    blocks: Tensor  # (N,)
    offsets: Tensor  # (N,), within their blocks
    groups: list[Group]

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attends with queries, keys and values of (1, H, N, D) each."""
        pool_keys, pool_values = self.cache.keys[layer], self.cache.values[layer]  # (blocks, S, H, D)
        pool_keys[self.blocks, self.offsets] = keys[0].transpose(0, 1)  # (N, H, D)
        pool_values[self.blocks, self.offsets] = values[0].transpose(0, 1)
        found = []
        for group in self.groups:
            rows = queries[0, :, group.tokens].unflatten(1, (group.num_rows, -1)).transpose(0, 1)  # (B, H, T, D)
            y = F.scaled_dot_product_attention(
                rows, group.seen(pool_keys), group.seen(pool_values), attn_mask=group.mask, is_causal=group.is_causal
            )  # (B, H, T, D)
            found.append(y.transpose(0, 1).flatten(1, 2))  # (H, B x T, D)
        return torch.cat(found, dim=1)[None]

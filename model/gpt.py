"""GPT-2 in order of composition: projection, attention, feed-forward, block, decoder, loss. What
Llama has in place of its blocks is in `model.llama`; what both share lies beside: what a token may
see (`attention`), keys and values of earlier tokens (`kv_cache`), the operations (`operations`).

Shapes: B sequences, T tokens of each, C = n_embd, H heads of width D = C / H, V vocabulary, N = B x
T.

Parameters have the names and the layout of Hugging Face's GPT2LMHeadModel, so that a checkpoint
needs no conversion.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.architecture import GPT2, LLAMA, Activation, Initial
from model.attention import Mask, attention
from model.body import Block, Body
from model.config import GPTConfig
from model.decoder import Decoder
from model.kv_cache import Cache, KVCache, ModuleCache, Window
from model.llama import Llama
from model.operations import PLAIN, Operations, embedding
from model.shapes import CHUNK_TOKENS, GPU_CHUNK_TOKENS, parameter_shapes, parameters

Normals = Callable[[Tensor, float], Tensor]
"""Fills a tensor with normal numbers of a deviation, and returns it."""


class Projection(nn.Module):
    """An affine map whose weight is stored (in, out), GPT-2's own layout (`Conv1D` in Hugging
    Face)."""

    ops: Operations = PLAIN

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_in, num_out))
        self.bias = nn.Parameter(torch.empty(num_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ops.affine(x.reshape(-1, x.shape[-1]), self.weight, self.bias)  # (N, out)
        return y.view(*x.shape[:-1], y.shape[-1])


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Projection(config.n_embd, 3 * config.n_embd)
        self.c_proj = Projection(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, window: Window | None, mask: Mask) -> Tensor:
        B, T, C = x.shape  # noqa: N806
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head)
            for part in self.c_attn(x).split(C, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        # (B, T, H, D)
        y = attention(q, k, v, layer=self.layer, window=window, mask=mask, dropout=dropout)
        return F.dropout(self.c_proj(y.reshape(B, T, C)), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation_function
        self.dropout = config.dropout
        self.c_fc = Projection(config.n_embd, config.ffn_width)
        self.c_proj = Projection(config.ffn_width, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = activated(self.c_fc(x), self.activation)  # (B, T, ffn_width)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


def activated(x: Tensor, activation: Activation) -> Tensor:
    """Returns the activation of each value of x."""
    match activation:
        case "gelu":
            return F.gelu(x, approximate="tanh")
        case "gelu_exact":
            return F.gelu(x)
        case "relu":
            return F.relu(x)
        case "swiglu":
            raise AssertionError(
                "SwiGLU is a gate between two projections, which GPT-2's blocks do not have"
            )
        case _:
            assert_never(activation)


class GPT2Block(Block):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, window: Window | None, mask: Mask) -> Tensor:
        return self.fed_forward(self.attended(x, window, mask))

    def attended(self, x: Tensor, window: Window | None, mask: Mask) -> Tensor:
        return x + self.attn(self.ln_1(x), window, mask)

    def fed_forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.ln_2(x))


class Transformer(Body):
    """All but the output head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.dropout = config.dropout
        self.is_tied = config.tie_word_embeddings
        self.wte = embedding(config.vocab_size, config.n_embd)
        self.wpe = embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(GPT2Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.wte

    @property
    def position_embedding(self) -> nn.Embedding:
        return self.wpe

    @property
    def blocks(self) -> nn.ModuleList:
        return self.h

    @property
    def last_norm(self) -> nn.Module:
        return self.ln_f

    def for_blocks(self, positions: Tensor) -> tuple[()]:
        return ()

    def forward(
        self, token_ids: Tensor, positions: Tensor, window: Window | None, mask: Mask
    ) -> Tensor:
        tokens = self.ops.embed(token_ids, self.wte.weight, shared=self.is_tied)
        x = F.dropout(
            tokens + self.ops.embed(positions, self.wpe.weight, shared=False),
            self.dropout,
            self.training,
        )
        for block in self.h:
            x = self.ops.block(block, x, window, mask)
        return self.ops.norm(self.ln_f, x)


def initial_weights(
    config: GPTConfig, seed: int, normals: Normals | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yields GPT-2's initial weights, one parameter after the other: normal, biases zero, and the
    projections that end in the residual stream scaled by 1 / sqrt(2 x n_layer); Llama's by the same
    rule. Without `normals` PyTorch draws them on the CPU, so a seed means the same on all that are
    alike."""
    normals = normals or partial(_normals, torch.Generator().manual_seed(seed))
    shapes, deviation = parameter_shapes(config), config.initializer_range
    for name, parameter in parameters(config).items():
        values = torch.empty(shapes[name])
        match parameter.initial:
            case Initial.ZEROS:
                yield name, values.zero_()
            case Initial.ONES:
                yield name, values.fill_(1.0)
            case Initial.NORMAL:
                yield name, normals(values, deviation)
            case Initial.INTO_THE_STREAM:
                yield name, normals(values, deviation / math.sqrt(2 * config.n_layer))
            case _:
                assert_never(parameter.initial)


def _normals(generator: torch.Generator, values: Tensor, deviation: float) -> Tensor:
    return values.normal_(0.0, deviation, generator=generator)


BODIES: dict[str, type[Body]] = {GPT2.name: Transformer, LLAMA.name: Llama}
"""The module of each architecture, between token ids and the output head."""


class GPT(Decoder):
    """The decoder, GPT-2 or Llama."""

    config: GPTConfig

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.add_module(config.network.parameters.prefix, BODIES[config.architecture](config))
        if not config.tie_word_embeddings:
            self.lm_head = embedding(config.vocab_size, config.n_embd)

    @property
    def body(self) -> Body:
        """All but the output head."""
        body = self.get_submodule(self.config.network.parameters.prefix)
        assert isinstance(body, Body)
        return body

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.body.token_embedding

    @property
    def blocks(self) -> nn.ModuleList:
        return self.body.blocks

    @property
    def last_norm(self) -> nn.Module:
        return self.body.last_norm

    @property
    def head_weight(self) -> Tensor:
        """The output head's weight (V, C), which is the token embedding itself when tied."""
        return (self.token_embedding if self.config.tie_word_embeddings else self.lm_head).weight

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draws the weights."""
        for name, values in initial_weights(self.config, seed):
            self.get_parameter(name).copy_(values)

    def new_cache(self, num_tokens: int) -> KVCache:
        weight = self.head_weight
        return KVCache(self.config, max_len=num_tokens, dtype=weight.dtype, device=weight.device)

    def forward(
        self,
        token_ids: Tensor,
        *,
        kv_cache: Cache | ModuleCache | None = None,
        positions: Tensor | None = None,
        mask: Mask = None,
    ) -> Tensor:
        """Returns hidden states (B, T, C) after the final norm, from token_ids (B, T).

        Without a cache each row attends to itself, causally or as `mask` says; `positions` then
        defaults to 0 … T-1. With a cache, the keys and values of the tokens are written at
        `positions` (B, T), and each token attends to all positions of its sequence up to its own.
        """
        if positions is None:
            positions = torch.arange(token_ids.shape[1], device=token_ids.device).expand_as(
                token_ids
            )
        window = None
        if kv_cache is not None:
            assert mask is None, "a KV cache makes its own mask"
            assert not isinstance(kv_cache, ModuleCache)
            window = kv_cache.window(positions)
        return self.body(token_ids, positions, window, mask)

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns logits (..., V), at least fp32, from hidden (..., C)."""
        logits = F.linear(hidden, self.head_weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def loss_of(self, hidden: Tensor, targets: Tensor, *, scale: float = 1.0) -> Tensor:
        """Returns `scale` times the loss of targets (B, T) from hidden (B, T, C), what `forward`
        returns."""
        rows, labels = hidden.flatten(0, 1), targets.flatten()  # (N, C), (N,)
        size = GPU_CHUNK_TOKENS if hidden.is_cuda else CHUNK_TOKENS
        return self.ops.cross_entropy(
            rows, self.head_weight, labels, scale=scale, chunk_tokens=size
        )

"""Llama's blocks, in order of composition: rotary positions, grouped-query attention, SwiGLU,
block, decoder.

(Touvron et al., arXiv 2302.13971; RMSNorm: Zhang and Sennrich, arXiv 1910.07467.) There are no
biases. Shapes: as in `model.gpt`, and G heads of keys and values, each shared by H / G neighboring
heads.

Parameters have the names and the layout of Hugging Face's LlamaForCausalLM.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Mask, attention
from model.body import Block, Body
from model.config import GPTConfig
from model.kv_cache import Window
from model.operations import PLAIN, Operations, embedding


class Rotation(NamedTuple):
    """Turns pairs of a head's values by angles that grow with the position (Su et al., arXiv
    2104.09864)."""

    cos: Tensor  # (B, T, 1, D / 2), fp32
    sin: Tensor

    def of_heads(self, x: Tensor) -> Tensor:
        """Returns x (B, T, heads, D) turned; a pair is a value of the first half and its
        counterpart in the second."""
        first, second = x.float().chunk(2, dim=-1)
        turned = first * self.cos - second * self.sin, second * self.cos + first * self.sin
        return torch.cat(turned, dim=-1).to(x.dtype)


class Linear(nn.Module):
    """A linear map whose weight is stored (out, in)."""

    ops: Operations = PLAIN

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ops.linear(x.reshape(-1, x.shape[-1]), self.weight)  # (N, out)
        return y.view(*x.shape[:-1], y.shape[-1])


class GroupedQueryAttention(nn.Module):
    """(Ainslie et al., arXiv 2305.13245.)"""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.dropout = layer, config.head_dim, config.dropout
        self.q_proj = Linear(config.n_embd, config.n_embd)
        self.k_proj = Linear(config.n_embd, config.kv_width)
        self.v_proj = Linear(config.n_embd, config.kv_width)
        self.o_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, window: Window | None, mask: Mask, rotation: Rotation) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)) for projection in projections)
        q, k = rotation.of_heads(q), rotation.of_heads(k)
        dropout = self.dropout if self.training else 0.0
        # (B, T, H, D)
        y = attention(q, k, v, layer=self.layer, window=window, mask=mask, dropout=dropout)
        return F.dropout(self.o_proj(y.flatten(2)), self.dropout, self.training)


class SwiGLU(nn.Module):
    """(Shazeer, arXiv 2002.05202.)"""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.gate_proj = Linear(config.n_embd, config.ffn_width)
        self.up_proj = Linear(config.n_embd, config.ffn_width)
        self.down_proj = Linear(config.ffn_width, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return F.dropout(y, self.dropout, self.training)


class LlamaBlock(Block):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.self_attn = GroupedQueryAttention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, window: Window | None, mask: Mask, rotation: Rotation) -> Tensor:
        return self.fed_forward(self.attended(x, window, mask, rotation))

    def attended(self, x: Tensor, window: Window | None, mask: Mask, rotation: Rotation) -> Tensor:
        return x + self.self_attn(self.input_layernorm(x), window, mask, rotation)

    def fed_forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(Body):
    """All but the output head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.config = config
        self.embed_tokens = embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(LlamaBlock(config, layer) for layer in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.layer_norm_epsilon)

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.embed_tokens

    @property
    def position_embedding(self) -> None:
        return None

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    @property
    def last_norm(self) -> nn.Module:
        return self.norm

    def for_blocks(self, positions: Tensor) -> tuple[Rotation]:
        return (Rotation(*self.ops.turns(self.config, positions)),)

    def forward(
        self, token_ids: Tensor, positions: Tensor, window: Window | None, mask: Mask
    ) -> Tensor:
        config, (rotation,) = self.config, self.for_blocks(positions)
        tokens = self.ops.embed(
            token_ids, self.embed_tokens.weight, shared=config.tie_word_embeddings
        )
        x = F.dropout(tokens, config.dropout, self.training)
        for block in self.layers:
            x = self.ops.block(block, x, window, mask, rotation)
        return self.ops.norm(self.norm, x)

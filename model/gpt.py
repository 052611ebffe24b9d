"""GPT-2 in one file, in order of composition: projection, attention, feed-forward, block, decoder, loss.

Shapes: B sequences, T tokens of each, C = n_embd, H heads of width D = C / H, V vocabulary, N = B x T.

Parameters have the names and the layout of Hugging Face's GPT2LMHeadModel, so that a checkpoint needs no conversion.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.autograd_ops import affine, cross_entropy, embed
from model.config import GPTConfig
from model.kv_cache import Cache, Window
from model.shapes import CHUNK_TOKENS


def document_mask(token_ids: Tensor, *, eot_id: int) -> tuple[Tensor, Tensor]:
    """Returns positions (B, T) for token_ids (B, T), which restart at 0 at each end-of-text token, and the attention
    mask (B, 1, T, T), true where a token sees another: in its own document, up to itself.

    An end-of-text token is the last target of its document and the first input of the next one: a document's first
    token is predicted from it alone, as in text generated without a prompt. A row may start in a document's middle.
    """
    places = torch.arange(token_ids.shape[1], device=token_ids.device)  # (T,)
    starts = torch.where(token_ids == eot_id, places, 0).cummax(dim=1).values  # (B, T), where its document starts
    same = starts[:, :, None] == starts[:, None, :]  # (B, T, T)
    return places - starts, (same & (places <= places[:, None]))[:, None]


class Projection(nn.Module):
    """An affine map whose weight is stored (in, out), GPT-2's own layout (`Conv1D` in Hugging Face)."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_in, num_out))
        self.bias = nn.Parameter(torch.empty(num_out))

    def forward(self, x: Tensor) -> Tensor:
        y = affine(x.reshape(-1, x.shape[-1]), self.weight, self.bias)  # (N, out)
        return y.view(*x.shape[:-1], y.shape[-1])


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Projection(config.n_embd, 3 * config.n_embd)
        self.c_proj = Projection(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, window: Window | None, mask: Tensor | None) -> Tensor:
        B, T, C = x.shape  # noqa: N806
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
            for part in self.c_attn(x).split(C, dim=2)
        )
        # Scores are scaled by 1 / sqrt(D).
        if window is not None:
            y = window.attend(self.layer, q, k, v)  # (B, H, T, D)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0, is_causal=mask is None
            )  # (B, H, T, D)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation_function
        self.dropout = config.dropout
        self.c_fc = Projection(config.n_embd, config.ffn_width)
        self.c_proj = Projection(config.ffn_width, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # (B, T, ffn_width)
        match self.activation:
            case "gelu":
                x = F.gelu(x, approximate="tanh")
            case "gelu_exact":
                x = F.gelu(x)
            case "relu":
                x = F.relu(x)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, window: Window | None, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), window, mask)
        return x + self.mlp(self.ln_2(x))


def embedding(num_rows: int, width: int) -> nn.Embedding:
    """Returns an uninitialized embedding; nn.Embedding's own constructor would draw random numbers."""
    return nn.Embedding.from_pretrained(torch.empty(num_rows, width), freeze=False)


class Transformer(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.is_tied = config.tie_word_embeddings
        self.wte = embedding(config.vocab_size, config.n_embd)
        self.wpe = embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, token_ids: Tensor, positions: Tensor, window: Window | None, mask: Tensor | None) -> Tensor:
        x = embed(token_ids, self.wte.weight, adds=self.is_tied) + embed(positions, self.wpe.weight, adds=False)
        x = F.dropout(x, self.dropout, self.training)
        for block in self.h:
            x = block(x, window, mask)
        return self.ln_f(x)


class GPT(nn.Module):
    """The decoder. Its weights are uninitialized memory until `init_weights` or `load_state_dict`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        if not config.tie_word_embeddings:
            self.lm_head = embedding(config.vocab_size, config.n_embd)

    @property
    def head_weight(self) -> Tensor:
        """The output head's weight (V, C), which is the token embedding itself when tied."""
        return (self.transformer.wte if self.config.tie_word_embeddings else self.lm_head).weight

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draws GPT-2's initial weights: normal, biases zero, and the projections that end in the residual stream
        scaled by 1 / sqrt(2 x n_layer). The random numbers come from the CPU, so a seed means the same anywhere."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
            elif ".ln_" in name:
                parameter.fill_(1.0)
            else:
                std = self.config.initializer_range
                if name.endswith("c_proj.weight"):
                    std /= math.sqrt(2 * self.config.n_layer)
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))

    def forward(
        self,
        token_ids: Tensor,
        *,
        kv_cache: Cache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Returns hidden states (B, T, C) after the final LayerNorm, from token_ids (B, T).

        Without a cache each row attends to itself, causally or where `mask` (B, 1, T, T) is true; `positions` then
        defaults to 0 … T-1. With a cache, the keys and values of the tokens are written at `positions` (B, T), and
        each token attends to all positions of its sequence up to its own.
        """
        if positions is None:
            positions = torch.arange(token_ids.shape[1], device=token_ids.device).expand_as(token_ids)
        window = None
        if kv_cache is not None:
            assert mask is None, "a KV cache makes its own mask"
            window = kv_cache.window(positions)
        return self.transformer(token_ids, positions, window, mask)

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns logits (..., V), at least fp32, from hidden (..., C)."""
        logits = F.linear(hidden, self.head_weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def loss(self, token_ids: Tensor, targets: Tensor, *, eot_id: int | None = None) -> Tensor:
        """Returns the summed cross-entropy (a scalar, at least fp32) of targets (B, T); IGNORE_INDEX is not counted.

        With `eot_id` the documents in a row see nothing of each other.
        """
        return self.loss_of(self.hidden(token_ids, eot_id=eot_id), targets)

    def hidden(self, token_ids: Tensor, *, eot_id: int | None = None) -> Tensor:
        """Returns the first half of `loss`, hidden states (B, T, C)."""
        positions, mask = (None, None) if eot_id is None else document_mask(token_ids, eot_id=eot_id)
        return self.forward(token_ids, positions=positions, mask=mask)

    def loss_of(self, hidden: Tensor, targets: Tensor, *, scale: float = 1.0) -> Tensor:
        """Returns the second half of `loss`, times `scale`, from hidden (B, T, C) and targets (B, T)."""
        rows, labels = hidden.flatten(0, 1), targets.flatten()  # (N, C), (N,)
        return cross_entropy(rows, self.head_weight, labels, scale=scale, chunk_tokens=CHUNK_TOKENS)

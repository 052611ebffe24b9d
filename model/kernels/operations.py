"""The operations of GPT-2 and Llama by portable kernels, with hand-written gradients: a run that
computes with them has the same bits on every processor, with any number of threads.

Shapes: as in `model.operations`; H heads of width D, G heads of keys and values.
"""

import hashlib
import math
from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from model.attention import Documents, Mask
from model.body import Block
from model.config import GPTConfig
from model.gpt import GPT2Block, initial_weights
from model.kernels import portable
from model.kv_cache import Window
from model.linear_cross_entropy import IGNORE_INDEX
from model.llama import LlamaBlock, Rotation
from model.operations import PLAIN
from model.rotary import exact_frequencies


class _PortableProduct(torch.autograd.Function):
    """x (N, in) times a weight (in, out) with a bias, or a weight (out, in) without one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.is_affine = bias is not None
        return portable.product(x, weight if ctx.is_affine else weight.T, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        outer = gradients[0].contiguous()
        inner = weight.T if ctx.is_affine else weight
        of_x = portable.product(outer, inner) if ctx.needs_input_grad[0] else None
        pair = (x.T, outer) if ctx.is_affine else (outer.T, x)
        of_bias = portable.column_sums(outer) if ctx.is_affine else None
        return of_x, portable.product(*pair), of_bias


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y: Tensor = _PortableProduct.apply(x.contiguous(), weight, bias)
    return y


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = _PortableProduct.apply(x.contiguous(), weight, None)
    return y


class _PortableEmbed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.shape = weight.shape
        return weight[indices]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        outer = gradients[0].reshape(-1, ctx.shape[1]).contiguous()
        of_weight = outer.new_zeros(ctx.shape)
        portable.add_rows(indices.flatten().contiguous(), outer, of_weight)
        return of_weight, None


def _embed(indices: Tensor, weight: Tensor, *, shared: bool) -> Tensor:
    rows: Tensor = _PortableEmbed.apply(weight, indices)
    return rows


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y, means, scales = portable.norm(rows, weight, bias, epsilon)
        ctx.save_for_backward(rows, weight, means, scales)
        ctx.has_bias = bias is not None
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        outer = gradients[0]
        rows = outer.reshape(-1, outer.shape[-1]).contiguous()
        found = portable.norm_backward(rows, *ctx.saved_tensors, has_bias=ctx.has_bias)
        return found[0].view(outer.shape), found[1], found[2], None


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    match module:
        case nn.LayerNorm():
            bias: Tensor | None = module.bias
            epsilon = module.eps
        case nn.RMSNorm():
            bias, epsilon = None, module.eps or torch.finfo(x.dtype).eps
        case _:
            raise TypeError(f"no portable kernel computes {type(module).__name__}")
    y: Tensor = _Norm.apply(x, module.weight, bias, epsilon)
    return y


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: Any) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.name = name
        return portable.activation(x, name)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return portable.activation_backward(gradients[0].contiguous(), x, ctx.name), None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return portable.gated(gate, up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return portable.gated_backward(gradients[0].contiguous(), *ctx.saved_tensors)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        turned = portable.rotated(x.flatten(0, 1).contiguous(), cosines, sines, back=False)
        return turned.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        outer = gradients[0]
        rows = outer.flatten(0, 1).contiguous()
        return portable.rotated(rows, *ctx.saved_tensors, back=True).view(outer.shape), None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
        y = portable.attention(q, k, v, starts)
        ctx.save_for_backward(y, q, k, v, starts)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *portable.attention_backward(gradients[0].contiguous(), *ctx.saved_tensors), None


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Returns what each token sees, as one row (B, T, C), from q (B, T, H, D), k and v (B, T, G, D)."""
    y: Tensor = _Attention.apply(q, k, v, _starts(q, mask))
    return y.flatten(2)


def _starts(q: Tensor, mask: Mask) -> Tensor:
    """Returns the first place of its row that each token sees, (B, T)."""
    assert not isinstance(mask, Documents), "they are of GPUs"
    if mask is None:
        return torch.zeros(q.shape[:2], dtype=torch.int32)
    return mask[:, 0].to(torch.uint8).argmax(dim=-1).int().contiguous()


def _gpt2_block(block: GPT2Block, x: Tensor, mask: Mask) -> Tensor:
    attention, mlp = block.attn, block.mlp
    heads = attention.c_attn(_norm(block.ln_1, x)).unflatten(-1, (3, attention.n_head, -1))
    q, k, v = heads.unbind(2)  # views: (B, T, H, D)
    x = x + attention.c_proj(_attended(q, k, v, mask))
    middle = mlp.c_fc(_norm(block.ln_2, x))
    y: Tensor = x + mlp.c_proj(_Activation.apply(middle, mlp.activation))
    return y


def _llama_block(block: LlamaBlock, x: Tensor, mask: Mask, rotation: Rotation) -> Tensor:
    attention, mlp = block.self_attn, block.mlp
    normed = _norm(block.input_layernorm, x)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (part(normed).unflatten(-1, (-1, attention.head_dim)) for part in projections)
    tables = [table.flatten(0, 2).contiguous() for table in rotation]  # (N, D / 2)
    q, k = (_Rotate.apply(part, *tables) for part in (q, k))
    x = x + attention.o_proj(_attended(q, k, v, mask))
    normed = _norm(block.post_attention_layernorm, x)
    y: Tensor = x + mlp.down_proj(_Gated.apply(mlp.gate_proj(normed), mlp.up_proj(normed)))
    return y


def _block(block: Block, x: Tensor, window: Window | None, mask: Mask, *rotation: Any) -> Tensor:
    if window is not None:  # it generates text, on which no weight depends
        y: Tensor = block(x, window, mask, *rotation)
        return y
    match block:
        case GPT2Block():
            return _gpt2_block(block, x, mask)
        case LlamaBlock():
            return _llama_block(block, x, mask, *rotation)
        case _:
            raise TypeError(f"no portable kernel computes {type(block).__name__}")


def _turns(config: GPTConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    found = portable.turns(positions.flatten().contiguous(), exact_frequencies(config))
    cosines, sines = (table.view(*positions.shape, 1, -1) for table in found)
    return cosines, sines


class _CrossEntropy(torch.autograd.Function):
    """Turns each chunk into its share of the gradients in the forward pass, as the gradient of the
    scores is known as soon as they are (Liger kernel, arXiv 2410.10989, section 3.2)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: float,
        chunk_tokens: int,
        with_grad: bool,
    ) -> Tensor:
        labels = targets.where(targets != IGNORE_INDEX, -1).contiguous()
        losses: list[float] = []
        of_hidden = torch.empty_like(hidden) if with_grad else None
        of_weight = torch.zeros_like(weight) if with_grad else None
        for start in range(0, len(labels), chunk_tokens):
            some = slice(start, start + chunk_tokens)
            h = hidden[some]
            scores = portable.product(h, weight.T)
            losses += portable.losses(scores, labels[some], factor=scale).tolist()
            if of_hidden is not None and of_weight is not None:
                of_hidden[some] = portable.product(scores, weight)
                portable.product(scores.T, h, added_to=of_weight)
        ctx.save_for_backward(of_hidden, of_weight)
        return hidden.new_tensor(math.fsum(losses) * scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight = ctx.saved_tensors
        if gradients[0] != 1:
            of_hidden, of_weight = of_hidden * gradients[0], of_weight * gradients[0]
        return of_hidden, of_weight, None, None, None, None


def _cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, scale: float, chunk_tokens: int
) -> Tensor:
    total: Tensor = _CrossEntropy.apply(
        hidden.contiguous(), weight, targets, scale, chunk_tokens, torch.is_grad_enabled()
    )
    return total


PORTABLE = PLAIN._replace(
    embed=_embed,
    affine=_affine,
    linear=_linear,
    block=_block,
    cross_entropy=_cross_entropy,
    norm=_norm,
    turns=_turns,
)


def portable_weights(config: GPTConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yields `initial_weights` by portable normal numbers, which are a function of the seed, the
    parameter's place and the value's."""
    places = count()

    def normals(values: Tensor, deviation: float) -> Tensor:
        found = portable.normals(values.numel(), _seed_of(seed, next(places)))
        return values.copy_(found.view(values.shape) * deviation)

    return initial_weights(config, seed, normals)


def _seed_of(seed: int, place: int) -> int:
    digest = hashlib.blake2b(f"weights:{seed}:{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest)

"""The loss of a linear output head without its scores in memory: they exist for a chunk of tokens
at a time.

Shapes: N tokens, C width, V vocabulary, K tokens of a chunk.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
"""The target of a position that the loss does not count."""

Chunk = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    scale: float,
    chunk_tokens: int,
    chunk: Chunk | None = None,
) -> Tensor:
    """Returns `scale` times the summed cross-entropy (a scalar, at least fp32) of hidden (N, C) @
    weight.T (C, V) and targets (N,). `chunk` computes the same as `losses_and_gradients`, compiled
    for example."""
    chunk = chunk or losses_and_gradients
    total: Tensor = _LinearCrossEntropy.apply(
        hidden, weight, targets, chunk_tokens, chunk, compute_dtype(hidden), torch.is_grad_enabled()
    )
    return total * scale


def compute_dtype(x: Tensor) -> torch.dtype:
    """Returns autocast's type where that is on, else the type of x."""
    device_type = x.device.type
    return (
        torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
    )


def losses_and_gradients(h: Tensor, w: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each token's loss (K,), at least fp32, and the gradient of the scores (K, V): softmax
    - one_hot."""
    scores = h @ w.T  # (K, V)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    counted = (targets != IGNORE_INDEX)[:, None]
    labels = targets[:, None].where(counted, 0)  # (K, 1)
    log_softmax = wide.log_softmax(1)
    losses = -log_softmax.gather(1, labels).where(counted, 0)
    # A comparison in place of a scatter, which no kernel can be fused with.
    is_label = torch.arange(len(w), device=w.device) == labels
    gradients = (log_softmax.exp() - is_label.to(wide.dtype)).where(counted, 0)
    return losses[:, 0], gradients.to(scores.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """Turns each chunk into its share of the gradients in the forward pass, as the gradient of the
    scores is known as soon as they are: none are kept or computed again (Liger kernel, arXiv
    2410.10989, section 3.2)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk_tokens: int,
        chunk: Chunk,
        dtype: torch.dtype,
        with_grad: bool,
    ) -> Tensor:
        w, losses, grads_hidden = weight.to(dtype), [], []
        grad_weight: Tensor | None = None
        for some, labels in zip(
            hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True
        ):
            h = some.to(dtype)  # (K, C)
            if not with_grad:  # the same bits of the losses alone
                scores = h @ w.T
                wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
                losses.append(
                    F.cross_entropy(wide, labels, ignore_index=IGNORE_INDEX, reduction="none")
                )
                continue
            chunk_losses, grad = chunk(h, w, labels)
            losses.append(chunk_losses)
            grads_hidden.append((grad @ w).to(hidden.dtype))
            product = grad.T @ h
            grad_weight = (
                product.to(weight.dtype) if grad_weight is None else grad_weight.add_(product)
            )
        if with_grad:
            ctx.save_for_backward(torch.cat(grads_hidden), grad_weight)
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0], grad_weight * grads[0], *[None] * 5

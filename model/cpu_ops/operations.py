"""The decoder's operations with hand-written gradients; autograd's own would allocate, convert or
compute more.

Shapes: N tokens, C width, V vocabulary, K tokens of a chunk. A weight that has a sink (`loans`)
gets its gradient written straight into it; the bits are the same with and without one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.linear_cross_entropy import IGNORE_INDEX, compute_dtype
from model.operations import PLAIN
from raymill.loans import gradient_sinks, scratch_memory

_BLOCK_VALUES = 1 << 18
"""How many scores are exponentiated together: in fp32 they take 1 MB, which stays in its cache."""


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns x @ weight + bias for x (N, in) and a weight (in, out), in autocast's type where that
    is on."""
    return _product(x, weight, bias) if torch.is_grad_enabled() else torch.addmm(bias, x, weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Returns x @ weight.T for x (N, in) and a weight (out, in), in autocast's type where that is
    on."""
    return _product(x, weight, None) if torch.is_grad_enabled() else F.linear(x, weight)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = compute_dtype(x)
    w = weight.detach().to(dtype)
    return _Product.apply(x.to(dtype), weight, bias, w, _sink_of(weight))


class _Product(torch.autograd.Function):
    """`affine` with a bias, `linear` without one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, w: Tensor, sink: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.sink, ctx.dtype, ctx.bias_dtype = (
            sink,
            weight.dtype,
            None if bias is None else bias.dtype,
        )
        return x @ w.T if bias is None else torch.addmm(bias.to(x.dtype), x, w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads  # (N, out)
        x, w = ctx.saved_tensors
        is_affine = ctx.bias_dtype is not None
        grad_x = grad @ (w.T if is_affine else w) if ctx.needs_input_grad[0] else None
        grad_weight = _Sum(w, ctx.sink, dtype=ctx.dtype)
        grad_weight.add_product(*((x.T, grad) if is_affine else (grad.T, x)))
        return (
            grad_x,
            grad_weight.result(),
            grad.sum(0, dtype=ctx.bias_dtype) if is_affine else None,
            None,
            None,
        )


def embed(indices: Tensor, weight: Tensor, *, shared: bool) -> Tensor:
    """Returns rows (..., C) of a weight (V, C). A `shared` one's sink holds the head's share before
    backward runs."""
    if not torch.is_grad_enabled():
        return F.embedding(indices, weight)
    return _Embed.apply(weight, indices, _sink_of(weight), shared)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, indices: Tensor, sink: Tensor | None, shared: bool
    ) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.shape, ctx.dtype, ctx.sink, ctx.shared = weight.shape, weight.dtype, sink, shared
        return F.embedding(indices, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (indices,) = ctx.saved_tensors
        grad = grads[0].reshape(-1, ctx.shape[1]).to(ctx.dtype)  # (N, C)
        # Rows are summed before they are added, as autograd sums two uses of a weight.
        rows, places = indices.flatten().unique(return_inverse=True)
        sums = grad.new_zeros(len(rows), ctx.shape[1]).index_add_(0, places, grad)
        if ctx.sink is not None and ctx.shared:
            ctx.sink.index_add_(0, rows, sums)
            return None, None, None, None
        whole = grad.new_empty(ctx.shape) if ctx.sink is None else ctx.sink.detach()
        return whole.zero_().index_copy_(0, rows, sums), None, None, None


def cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, scale: float, chunk_tokens: int
) -> Tensor:
    """Returns `scale` times the summed cross-entropy (a scalar, at least fp32) of hidden (N, C) @
    weight.T (C, V) and targets (N,). Only `chunk_tokens` rows of scores exist at a time."""
    w = _in_type(weight, compute_dtype(hidden))
    with_grad = torch.is_grad_enabled()
    return _ChunkedCrossEntropy.apply(
        hidden, weight, targets, w, _sink_of(weight), scale, chunk_tokens, with_grad
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Turns each chunk into its share of the gradients in the forward pass: the gradient of the
    scores, softmax - one_hot, is known as soon as they are, so none are kept or recomputed (Liger
    kernel, arXiv 2410.10989, section 3.2). The softmax is never divided by its sum; the small side
    of each product is."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        w: Tensor,
        sink: Tensor | None,
        scale: float,
        chunk_tokens: int,
        with_grad: bool,
    ) -> Tensor:
        counted = targets != IGNORE_INDEX
        labels = targets.where(counted, 0)
        losses = torch.empty(
            targets.shape, dtype=torch.promote_types(w.dtype, torch.float32), device=hidden.device
        )
        grad_hidden = torch.empty_like(hidden) if with_grad else None
        product = _scratch_like(w, "head gradient", w.shape) if w.dtype != weight.dtype else None
        grad_weight = _Sum(w, sink, dtype=weight.dtype, scratch=product) if with_grad else None
        for start in range(0, len(targets), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            h = hidden[rows].to(w.dtype)  # (K, C)
            # As (V, K), not (K, V): in bf16 on a CPU two of the three products then take half the
            # time.
            scores = torch.mm(w, h.T, out=_scratch_like(w, "scores", (len(w), len(h))))
            places = labels[rows], torch.arange(len(h), device=h.device)
            of_label = scores[places].to(losses.dtype)  # (K,)
            largest, total = _exponentiate(scores, losses.dtype)  # (K,) each
            losses[rows] = largest + total.log() - of_label
            if grad_hidden is None or grad_weight is None:
                continue
            # In the wider type: the two are almost equal where the model is almost certain.
            scores[places] = (of_label.sub_(largest).exp_() - total).to(w.dtype)
            factors = (counted[rows] * scale / total)[:, None]  # (K, 1)
            grad_hidden[rows] = torch.mm(scores.T, w) * factors
            grad_weight.add_product(scores, (h * factors).to(w.dtype))
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
            ctx.grad_weight = grad_weight
        return losses.where(counted, 0).sum() * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_loss,) = grads
        (grad_hidden,) = ctx.saved_tensors
        grad_weight = ctx.grad_weight.result()
        if grad_loss != 1:
            # In place for the weight: a tied embedding adds its rows to the sink, which must be
            # what autograd keeps.
            grad_hidden = grad_hidden * grad_loss
            grad_weight = grad_weight.mul_(grad_loss)
        return grad_hidden, grad_weight, *[None] * 6


def _exponentiate(scores: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Replaces scores (V, K) by exp(scores - largest). Returns the largest scores and the sums,
    (K,) each."""
    num_columns = scores.shape[1]
    num_rows = max(1, _BLOCK_VALUES // num_columns)
    blocks = scores.split(num_rows)
    scratch = (
        scores if scores.dtype == dtype else scores.new_empty(num_rows, num_columns, dtype=dtype)
    )

    def wide(block: Tensor) -> Tensor:
        return block if block.dtype == dtype else scratch[: len(block)].copy_(block)

    largest = wide(blocks[0]).amax(0)
    for block in blocks[1:]:
        torch.maximum(largest, wide(block).amax(0), out=largest)
    total = torch.zeros_like(largest)
    for block in blocks:
        values = wide(block).sub_(largest).exp_()
        total += values.sum(0)
        if values.dtype != block.dtype:
            block.copy_(values)
    return largest, total


class _Sum:
    """A sum of matrix products shaped like w, in a weight's own type, in its sink or in fresh
    memory.

    A product of another type is first written to `scratch`, if there is any.
    """

    def __init__(
        self, w: Tensor, sink: Tensor | None, *, dtype: torch.dtype, scratch: Tensor | None = None
    ) -> None:
        self._value = torch.empty_like(w, dtype=dtype) if sink is None else sink
        self._scratch, self._is_empty = scratch, True

    def add_product(self, left: Tensor, right: Tensor) -> None:
        if left.dtype != self._value.dtype:
            product = torch.mm(left, right, out=self._scratch)
            self._value.copy_(product) if self._is_empty else self._value.add_(product)
        elif self._is_empty:
            torch.mm(left, right, out=self._value)
        else:
            self._value.addmm_(left, right)
        self._is_empty = False

    def result(self) -> Tensor:
        """Returns a tensor of its own, so that autograd keeps it as the parameter's gradient and
        makes no copy."""
        return self._value.detach()


def _in_type(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a weight that no product keeps for backward: in scratch memory, if it has another
    type."""
    values = weight.detach()
    if values.dtype == dtype:
        return values
    scratch = _scratch_like(values.new_empty(0, dtype=dtype), "weight", values.shape)
    return values.to(dtype) if scratch is None else scratch.copy_(values)


CPU = PLAIN._replace(embed=embed, affine=affine, linear=linear, cross_entropy=cross_entropy)


def _sink_of(parameter: Tensor) -> Tensor | None:
    return gradient_sinks.get({}).get(parameter)  # type: ignore[call-overload]


def _scratch_like(x: Tensor, name: str, shape: tuple[int, ...]) -> Tensor | None:
    """Returns memory of x's type for an `out=`, or None, with which `out=` allocates its own."""
    scratch = scratch_memory.get(None)
    return (
        scratch.piece(name, shape, x.dtype)
        if scratch is not None and x.device.type == "cpu"
        else None
    )

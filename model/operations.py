"""The operations that the decoder is composed of, each of which can be computed in more than one
way.

PLAIN is PyTorch's own, on any device, and the truth that the others are held against: `compiled`
has the same ones as fused kernels, `model.cpu_ops` has some with hand-written gradients, for
training on a CPU.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.linear_cross_entropy import (
    IGNORE_INDEX,
    linear_cross_entropy,
    losses_and_gradients,
)
from model.numerics import Numerics
from model.rotary import turns

_COMPILER = ("torch._dynamo", "torch._inductor", "torch._functorch")

_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # PyTorch's words on a CPU

_MOST_GRAPHS = 64
"""Most graphs of one compiled function: two for each kind of layer, with a mask and without one, and
those of the self-test. PyTorch's own limit is 8."""


class Compilations:
    """Counts the graphs of operations that PyTorch has begun to compile in this process."""

    number = 0


compilations = Compilations()


class Operations(NamedTuple):
    """Shapes: N tokens, C width, V vocabulary."""

    embed: Callable[..., Tensor]
    """(indices, weight (V, C), shared): the rows (..., C); `shared` tells that the output head has
    the weight too."""
    affine: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(x (N, in), weight (in, out), bias): x @ weight + bias, in autocast's type where that is
    on."""
    linear: Callable[[Tensor, Tensor], Tensor]
    """(x (N, in), weight (out, in)): x @ weight.T, in autocast's type where that is on."""
    block: Callable[..., Tensor]
    """(block, x (B, T, C), window of a KV cache, mask, and what else its kind takes): what the
    block makes of x."""
    cross_entropy: Callable[..., Tensor]
    """As `linear_cross_entropy`."""
    head_losses: Callable[..., Tensor]
    """(decoder, h (K, C), targets (K,)): the loss of each token of a chunk (K,), by the code that the
    decoder's head has."""
    norm: Callable[[nn.Module, Tensor], Tensor]
    """(module, x (B, T, C)): x after the last norm."""
    turns: Callable[..., tuple[Tensor, Tensor]]
    """As `model.rotary.turns`."""


def _embed(indices: Tensor, weight: Tensor, *, shared: bool) -> Tensor:
    return F.embedding(indices, weight)


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, x, weight)


def _block(block: nn.Module, *values: Any) -> Tensor:
    y: Tensor = block(*values)
    return y


def _head_losses(decoder: Any, h: Tensor, targets: Tensor) -> Tensor:
    logits = decoder.logits(h)  # (K, V)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")


def _count_compilation() -> bool:
    """Counts one. The compiler takes what it returns for constant: so it calls it while it traces a
    graph, and compiled kernels never do."""
    compilations.number += 1
    return True


def _block_to_compile(block: nn.Module, *values: Any) -> Tensor:
    _count_compilation()
    return _block(block, *values)


def _chunk_to_compile(h: Tensor, w: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    _count_compilation()
    return losses_and_gradients(h, w, targets)


def _head_to_compile(decoder: Any, h: Tensor, targets: Tensor) -> Tensor:
    _count_compilation()
    return _head_losses(decoder, h, targets)


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = module(x)
    return y


PLAIN = Operations(
    _embed, _affine, F.linear, _block, linear_cross_entropy, _head_losses, _norm, turns
)


def recomputed(ops: Operations) -> Operations:
    """Returns operations that keep each block's input alone for its backward pass, which computes
    the rest again, with the same bits (Chen et al., arXiv 1604.06174)."""
    return ops._replace(block=partial(checkpoint, ops.block, use_reentrant=False))


@cache
def compiled(backend: "str | Callable[..., Any]" = "inductor") -> Operations:
    """Returns PLAIN with fused kernels for each block and for the head's loss, in a training step
    alone: its shapes are always the same, and each is compiled once. All blocks share one graph."""
    # The compiler, too, then chooses kernels by rule and not by timing, which would make bits
    # depend on the moment.
    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())
    torch.compiler.assume_constant_result(_count_compilation)
    torch.compiler.config.recompile_limit = _MOST_GRAPHS
    fused = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
    chunk = fused(_chunk_to_compile)
    return PLAIN._replace(
        block=_in_training(fused(_block_to_compile), _block),
        cross_entropy=partial(linear_cross_entropy, chunk=chunk),
        head_losses=_in_training(fused(_head_to_compile), _head_losses),
    )


def is_of_compiler(error: Exception) -> bool:
    """Reports whether PyTorch's compiler has raised it."""
    return type(error).__module__.startswith(_COMPILER)


def is_out_of_memory(error: Exception) -> bool:
    """Reports whether there was no memory left for what PyTorch wanted to make."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or _NO_MEMORY in str(error)


def _in_training(
    kernels: Callable[..., Tensor], plain: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Returns an operation that has fused kernels where gradients are wanted."""

    def computed(*values: Any) -> Tensor:
        return (kernels if torch.is_grad_enabled() else plain)(*values)

    return computed


def product_type(numerics: Numerics) -> torch.dtype:
    """Returns the type of products."""
    dtype = getattr(torch, numerics.torch_type)
    assert isinstance(dtype, torch.dtype)
    return dtype


def use_operations(model: nn.Module, ops: Operations) -> None:
    """Lets the model compute with these from now on."""
    for module in model.modules():
        if hasattr(module, "ops"):
            module.__dict__["ops"] = ops


def embedding(num_rows: int, width: int) -> nn.Embedding:
    """Returns an uninitialized embedding; nn.Embedding's own constructor would draw random
    numbers."""
    return nn.Embedding.from_pretrained(torch.empty(num_rows, width), freeze=False)

"""Calls the kernels of native/training.cpp on tensors: fp32, on a CPU, with PyTorch's number of
threads, on which no bit depends.

Shapes: as there.
"""

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from model.architecture import Activation
from model.kernels.native_library import ACTIVATIONS, load_library

_I, _N, _F = ctypes.c_int, ctypes.c_size_t, ctypes.c_float
_P, _B, _SEED = ctypes.c_void_p, ctypes.c_bool, ctypes.c_uint64
_FUNCTIONS = {
    "product": [*[_I] * 4, _P, _N, _N, _P, _N, _N, _P, _B, _P],
    "column_sums": [_I, _I, _I, _P, _P],
    "norm": [_I, _I, _I, _F, *[_P] * 6],
    "norm_backward": [_I, _I, _I, *[_P] * 8],
    "activation": [_I, _N, _I, _P, _P],
    "activation_backward": [_I, _N, _I, _P, _P, _P],
    "gated": [_I, _N, *[_P] * 3],
    "gated_backward": [_I, _N, *[_P] * 5],
    "turns": [_I, _I, _I, *[_P] * 4],
    "rotate": [*[_I] * 4, *[_P] * 3, _B, _P],
    "attention": [*[_I] * 6, *[_P] * 6],
    "attention_backward": [*[_I] * 6, *[_P] * 10],
    "add_rows": [_I, _I, _I, *[_P] * 3],
    "losses": [_I, _I, _I, _P, _F, _P, _P],
    "update_by_adamw": [_I, _N, *[_P] * 4, *[_F] * 6],
    "normals": [_I, _N, _SEED, _P],
    "square_sums": [_I, _N, _N, _P, _P],
}
"""The functions of training.cpp, with the types of their arguments; the first is the number of
threads."""


@cache
def _library() -> ctypes.CDLL:
    library = load_library()
    for name, arguments in _FUNCTIONS.items():
        function = getattr(library, f"raymill_{name}")
        function.argtypes, function.restype = arguments, None
    return library


def _call(name: str, *arguments: object) -> None:
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    getattr(_library(), f"raymill_{name}")(torch.get_num_threads(), *values)


def product(
    a: Tensor, b: Tensor, bias: Tensor | None = None, *, added_to: Tensor | None = None
) -> Tensor:
    """Returns a (M, K) @ b (K, N), plus bias (N,), or added to what is there."""
    (rows, depth), columns = a.shape, b.shape[1]
    to = a.new_empty(rows, columns) if added_to is None else added_to
    strides_a, strides_b = a.stride(), b.stride()
    adds = added_to is not None
    _call("product", rows, depth, columns, a, *strides_a, b, *strides_b, bias, adds, to)
    return to


def column_sums(x: Tensor) -> Tensor:
    """Returns the sums (C,) of x (N, C)."""
    sums = x.new_empty(x.shape[1])
    _call("column_sums", *x.shape, x, sums)
    return sums


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the LayerNorm of x (N, C), or without a bias its RMSNorm, and the mean and the scale
    of each token (N,)."""
    y, means, scales = torch.empty_like(x), x.new_empty(len(x)), x.new_empty(len(x))
    _call("norm", *x.shape, epsilon, x, weight, bias, y, means, scales)
    return y, means, scales


def norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, means: Tensor, scales: Tensor, *, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the gradients of x, the weight and the bias."""
    of_x, of_weight = torch.empty_like(x), torch.empty_like(weight)
    of_bias = torch.empty_like(weight) if has_bias else None
    inputs = (gradient, x, weight, means, scales)
    _call("norm_backward", *x.shape, *inputs, of_x, of_weight, of_bias)
    return of_x, of_weight, of_bias


def activation(x: Tensor, name: Activation) -> Tensor:
    y = torch.empty_like(x)
    _call("activation", x.numel(), ACTIVATIONS[name], x, y)
    return y


def activation_backward(gradient: Tensor, x: Tensor, name: Activation) -> Tensor:
    of_x = torch.empty_like(x)
    _call("activation_backward", x.numel(), ACTIVATIONS[name], gradient, x, of_x)
    return of_x


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Returns SwiGLU's middle, gate / (1 + exp(-gate)) * up."""
    y = torch.empty_like(gate)
    _call("gated", gate.numel(), gate, up, y)
    return y


def gated_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of both."""
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    _call("gated_backward", gate.numel(), gradient, gate, up, of_gate, of_up)
    return of_gate, of_up


def turns(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines (N, D / 2) of positions (N,), int64, times frequencies (D / 2,)."""
    cosines = frequencies.new_empty(len(positions), len(frequencies))
    sines = torch.empty_like(cosines)
    _call("turns", *cosines.shape, positions, frequencies, cosines, sines)
    return cosines, sines


def rotated(x: Tensor, cosines: Tensor, sines: Tensor, *, back: bool) -> Tensor:
    """Returns heads x (N, H, D) turned, or turned back."""
    y = torch.empty_like(x)
    _call("rotate", *x.shape, x, cosines, sines, back, y)
    return y


def attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    """Returns what tokens see, (B, T, H, D), from q (B, T, H, D), k and v (B, T, G, D): token i sees
    tokens starts (B, T)[i] to i of its row. Rows and tokens of the three may have gaps."""
    y = q.new_empty(q.shape)
    _call("attention", *_sizes(q, k), q, k, v, _strides(q, k, v), starts, y)
    return y


def attention_backward(
    gradient: Tensor, y: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v."""
    of_q, of_k, of_v = (part.new_empty(part.shape) for part in (q, k, v))
    inputs = (gradient, y, q, k, v, _strides(q, k, v), starts)
    _call("attention_backward", *_sizes(q, k), *inputs, of_q, of_k, of_v)
    return of_q, of_k, of_v


def _sizes(q: Tensor, k: Tensor) -> tuple[int, ...]:
    batch, tokens, heads, width = q.shape
    return batch, tokens, heads, k.shape[2], width


def _strides(*parts: Tensor) -> "ctypes.Array[ctypes.c_size_t]":
    """Returns by how many numbers neighboring tokens of each are apart."""
    for part in parts:
        row, token, head, number = part.stride()
        assert (row, head, number) == (part.shape[1] * token, part.shape[3], 1)
    return (_N * len(parts))(*(part.stride(1) for part in parts))


def add_rows(ids: Tensor, gradient: Tensor, of_weight: Tensor) -> None:
    """Adds rows (N, C), in order, to the rows of a weight's gradient (V, C) that ids (N,) name."""
    _call("add_rows", *gradient.shape, ids, gradient, of_weight)


def losses(scores: Tensor, labels: Tensor, *, factor: float) -> Tensor:
    """Returns the cross-entropy (K,) of scores (K, V) and labels (K,), 0 where a label is below 0.
    The scores become their gradients, times `factor`."""
    found = scores.new_empty(len(scores))
    _call("losses", *scores.shape, labels, factor, scores, found)
    return found


def adamw(
    values: Tensor, gradient: Tensor, moments: Sequence[Tensor], numbers: Sequence[float]
) -> None:
    """Updates values (n,) and both moments; see training.cpp for the six numbers."""
    _call("update_by_adamw", values.numel(), values, gradient, *moments, *numbers)


def normals(count: int, seed: int) -> Tensor:
    """Returns numbers (count,) of the standard normal distribution."""
    numbers = torch.empty(count)
    _call("normals", count, seed, numbers)
    return numbers


def square_sums(values: Tensor, block: int) -> Tensor:
    """Returns sums of squares, float64, of each `block` of values (n,); the last may be short."""
    sums = values.new_empty(-(-values.numel() // block), dtype=torch.float64)
    _call("square_sums", values.numel(), block, values, sums)
    return sums

"""Memory that training lends the model for the time of a step: where gradients go, copies of the weights, scratch.

Each loan lasts as long as its context, as autocast does. Outside of it, and for a parameter that a mapping does not
name, the model computes the same numbers in fresh memory.
"""

import ctypes
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor, nn

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
_MADV_HUGEPAGE = 14  # madvise(2)
_HUGE_PAGE_BYTES = 1 << 21
_CPU = torch.device("cpu")

Places = Mapping[nn.Parameter, Tensor]
_T = TypeVar("_T")

gradient_sinks: ContextVar[Places] = ContextVar("gradient sinks")
"""A loss whose forward pass runs meanwhile writes these parameters' gradients there, over the earlier values. Each
takes one forward and one backward pass; `parameter.grad` must be None and becomes the sink itself."""

weight_copies: ContextVar[Places] = ContextVar("weight copies")
"""Forward passes use these copies, in autocast's type, instead of converting the weights each time."""

scratch_memory: ContextVar["Scratch | None"] = ContextVar("scratch memory")
"""Operations on a CPU take memory from there."""


class Scratch:
    """Memory for large values that do not outlive the operation that makes them, kept from one step to the next.

    The system hands out a CPU's fresh memory page by page. For the head's scores in bf16 that took twice as long as
    the product that fills them. A GPU's allocator keeps its memory anyway.
    """

    def __init__(self) -> None:
        self._pieces: dict[tuple[str, torch.dtype], Tensor] = {}

    def piece(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns the same memory each time this name is asked for; its values are unknown."""
        size = math.prod(shape)
        flat = self._pieces.get((name, dtype))
        if flat is None or len(flat) < size:
            flat = self._pieces[name, dtype] = large_zeros(size, dtype=dtype)
        return flat[:size].view(shape)


def large_zeros(size: int, *, dtype: torch.dtype = torch.float32, device: torch.device = _CPU) -> Tensor:
    """Returns zeros (size,) for a long-lived buffer, on Linux in huge pages if the system grants them.

    Passes over 124M values (AdamW, norm, clipping, rounding) then took 15 to 35% less time on a virtual machine.
    """
    values = torch.empty(size, dtype=dtype, device=device)
    if device.type == "cpu" and sys.platform == "linux":
        start = -(-values.data_ptr() // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        num_bytes = (values.data_ptr() + values.nbytes) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES - start
        if num_bytes > 0:  # only advice: without it, or where it is refused, the same values lie in small pages
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(num_bytes), _MADV_HUGEPAGE)
    return values.zero_()


def keep_freed_memory() -> None:
    """Lets this process keep up to 1 GiB that it freed, in pieces of up to 32 MiB, the most that glibc allows.

    A step frees its activations and needs as many again; getting them back from the system, page by page, took 3 to
    7% of the step's time on a CPU.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 25)


@contextmanager
def lent(variable: ContextVar[_T], value: _T) -> Iterator[None]:
    """Lends the value to the model as one of the three above."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def sink_of(parameter: Tensor) -> Tensor | None:
    return gradient_sinks.get({}).get(parameter)  # type: ignore[call-overload]


def copy_of(parameter: Tensor) -> Tensor | None:
    return weight_copies.get({}).get(parameter)  # type: ignore[call-overload]


def scratch_like(x: Tensor, name: str, shape: tuple[int, ...]) -> Tensor | None:
    """Returns memory of x's type for an `out=`, or None, with which `out=` allocates its own."""
    scratch = scratch_memory.get(None)
    return scratch.piece(name, shape, x.dtype) if scratch is not None and x.device.type == "cpu" else None

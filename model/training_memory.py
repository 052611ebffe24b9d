"""Memory that training lends the model for the time of a step: where gradients go, copies of the weights, scratch.

Each holds within its context, as autocast does; the first two are found by the parameter itself. Outside of it, and for
a parameter that is not named, the model computes the same numbers in fresh memory.
"""

import ctypes
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
_MADV_HUGEPAGE = 14  # madvise(2)
_HUGE_PAGE_BYTES = 1 << 21
_CPU = torch.device("cpu")

Places = Mapping[nn.Parameter, Tensor]

_sinks: ContextVar[Places] = ContextVar("gradient sinks")
_copies: ContextVar[Places] = ContextVar("weight copies")
_scratch: ContextVar["Scratch | None"] = ContextVar("scratch")


class Scratch:
    """Memory for large values that do not outlive the operation that makes them, kept from one step to the next.

    The system hands a CPU's fresh memory over page by page. For the head's scores in bf16 that took twice as long as
    the product that fills them. A GPU's allocator keeps its memory anyway.
    """

    def __init__(self) -> None:
        self._pieces: dict[tuple[str, torch.dtype], Tensor] = {}

    def piece(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Of unknown values; it is the same memory each time that this name is asked for."""
        size = math.prod(shape)
        flat = self._pieces.get((name, dtype))
        if flat is None or len(flat) < size:
            flat = self._pieces[name, dtype] = large_zeros(size, dtype=dtype)
        return flat[:size].view(shape)


def large_zeros(size: int, *, dtype: torch.dtype = torch.float32, device: torch.device = _CPU) -> Tensor:
    """Zeros (size,) of a buffer that lives for long, on Linux in huge pages if the system grants them.

    Passes over 124M values (AdamW, norm, clipping, rounding) then took 15 to 35% less time on a virtual machine.
    """
    values = torch.empty(size, dtype=dtype, device=device)
    if device.type == "cpu" and sys.platform == "linux":
        start = -(-values.data_ptr() // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        num_bytes = (values.data_ptr() + values.nbytes) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES - start
        if num_bytes > 0:  # it is advice: without it, or where it is refused, the same values lie in small pages
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(num_bytes), _MADV_HUGEPAGE)
    return values.zero_()


def keep_freed_memory() -> None:
    """Lets this process keep up to 1 GiB that it freed, in pieces of up to 32 MiB, the most that glibc allows.

    A step frees its activations and wants as many again: to have them back from the system, page by page, took 3 to
    7% of the step's time on a CPU.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 25)


@contextmanager
def gradient_sinks(sinks: Places) -> Iterator[None]:
    """A loss whose forward pass runs within writes these parameters' gradients there, over what was there before.

    One forward and one backward pass each; `parameter.grad` must be None and becomes the sink itself.
    """
    token = _sinks.set(sinks)
    try:
        yield
    finally:
        _sinks.reset(token)


@contextmanager
def weight_copies(copies: Places) -> Iterator[None]:
    """Forward passes within take these copies, in autocast's type, instead of converting the weights each time."""
    token = _copies.set(copies)
    try:
        yield
    finally:
        _copies.reset(token)


@contextmanager
def scratch_memory(scratch: Scratch | None) -> Iterator[None]:
    """Operations within, on a CPU, take memory from there."""
    token = _scratch.set(scratch)
    try:
        yield
    finally:
        _scratch.reset(token)


def sink_of(parameter: Tensor) -> Tensor | None:
    return _sinks.get({}).get(parameter)  # type: ignore[call-overload]


def copy_of(parameter: Tensor) -> Tensor | None:
    return _copies.get({}).get(parameter)  # type: ignore[call-overload]


def scratch_like(x: Tensor, name: str, shape: tuple[int, ...]) -> Tensor | None:
    """Memory of x's type, for an `out=`; None where there is none to lend, so that `out=` makes its own."""
    scratch = _scratch.get(None)
    return scratch.piece(name, shape, x.dtype) if scratch is not None and x.device.type == "cpu" else None

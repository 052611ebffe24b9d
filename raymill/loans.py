"""Memory that training on a CPU lends the model for the time of a step: where gradients go, and
scratch.

Each loan lasts as long as its context, as autocast does. Outside of it, and for a parameter that a
mapping does not name, the operations compute the same numbers in fresh memory.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor, nn

from raymill.memory import large_zeros

Places = Mapping[nn.Parameter, Tensor]
_T = TypeVar("_T")

gradient_sinks: ContextVar[Places] = ContextVar("gradient sinks")
"""A loss whose forward pass runs meanwhile writes these parameters' gradients there, over the
earlier values. Each takes one forward and one backward pass; `parameter.grad` must be None and
becomes the sink itself."""

scratch_memory: ContextVar["Scratch | None"] = ContextVar("scratch memory")
"""Operations on a CPU take memory from there."""


class Scratch:
    """Memory for large values that do not outlive the operation that makes them, kept from one step
    to the next.

    The system hands out a CPU's fresh memory page by page. For the head's scores in bf16 that took
    twice as long as the product that fills them. A GPU's allocator keeps its memory anyway.
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


@contextmanager
def lent(variable: ContextVar[_T], value: _T) -> Iterator[None]:
    """Lends the value to the model as one of the two above."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)

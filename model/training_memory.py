"""Memory that training lends the model for the time of a step: where gradients go, and copies of the weights.

Both are found by the parameter itself and hold within their context, as autocast does: outside of it, and for a
parameter that is not named, the model computes the same numbers in fresh memory.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

Places = Mapping[nn.Parameter, Tensor]

_sinks: ContextVar[Places] = ContextVar("gradient sinks")
_copies: ContextVar[Places] = ContextVar("weight copies")


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


def sink_of(parameter: Tensor) -> Tensor | None:
    return _sinks.get({}).get(parameter)  # type: ignore[call-overload]


def copy_of(parameter: Tensor) -> Tensor | None:
    return _copies.get({}).get(parameter)  # type: ignore[call-overload]

"""One layer of a module of transformers, as the operations of a decoder compute it.

Shapes: B sequences, T tokens of each, C width.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_IN_BLOCK = re.compile(r"(\w+\.\d+\.\w+)\.")  # `layers.0.mlp` of a parameter's name


class Layer:
    """One decoder layer, which `ops.block` may compute in its own way."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        # Without itself and x
        self._names = [*inspect.signature(type(module).forward).parameters][2:]
        self._others: tuple[Any, ...] | None = None  # what it returned beside y, if a tuple

    def __call__(self, x: Tensor, named: Mapping[str, Any]) -> Tensor:
        """Returns what the layer makes of x (B, T, C)."""
        result = type(self.module).forward(self.module, x, **named)
        if not isinstance(result, tuple):
            self._others = None
            y: Tensor = result
            return y
        y, *others = result
        if torch.is_grad_enabled():
            others = [None if one is None else _HIDDEN_VALUE for one in others]
        self._others = tuple(others)
        return y

    def by_name(self, values: Sequence[Any]) -> dict[str, Any]:
        """Returns what follows x in a call by the names that `forward` has."""
        return dict(zip(self._names, values, strict=False))

    def as_returned(self, y: Tensor) -> Any:
        """Returns y as the layer itself would: some families have a tuple, with other values.

        Where a gradient is wanted, whoever reads one of those that are there is told that it must
        not: it would be a second way from layer to layer, which nothing gathers, recomputes or
        compiles.
        """
        return y if self._others is None else (y, *self._others)


class _HiddenValue:
    """Takes the place of a value, such as attention's scores, that a layer returns beside y."""

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Tensor:
        raise RuntimeError("its layers hand more than one tensor on, one to the next")


_HIDDEN_VALUE = _HiddenValue()


def layer_of(parameter: str) -> str:
    """Returns `layers.0.self_attn`, `layers.0.mlp` …, `embed_tokens`, `norm` or `lm_head`."""
    in_block = _IN_BLOCK.search(parameter)
    return in_block[1] if in_block else parameter.split(".")[-2]

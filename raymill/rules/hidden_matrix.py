"""The matrices inside a model's blocks, which a rule for matrices updates as such. This module does
not import PyTorch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_OF_LAYER = re.compile(r"(^|\.)\d+\.")  # of a parameter that lies in one of several layers


@dataclass(frozen=True)
class HiddenMatrix:
    """A parameter of a block that multiplies activations: one matrix, or several side by side."""

    shape: tuple[int, int]  # as it is stored, (in, out) or (out, in)
    axis: int  # along which it is cut
    sides: tuple[int, ...]  # of the matrices along that axis

    @property
    def piece_shapes(self) -> list[tuple[int, int]]:
        rows, columns = self.shape
        if self.axis == 0:
            return [(side, columns) for side in self.sides]
        return [(rows, side) for side in self.sides]

    def cut(self, values: "Tensor") -> "Sequence[Tensor]":
        """Returns each matrix as a view of the parameter's values (n,)."""
        return values.view(self.shape).split(self.sides, dim=self.axis)


def hidden_matrices_by_name(shapes: Mapping[str, Sequence[int]]) -> dict[str, HiddenMatrix]:
    """Returns the parameters of a module's layers that have two sides, from names and shapes alone.
    What it stores as one is taken for one matrix."""
    matrices: dict[str, HiddenMatrix] = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and _OF_LAYER.search(name):
            rows, columns = shape
            matrices[name] = HiddenMatrix((rows, columns), 0, (rows,))
    return matrices

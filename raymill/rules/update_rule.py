"""The interface of a rule that updates weights: what it keeps beside them, what its owner must
hold, what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Protocol

from raymill.rules.hidden_matrix import HiddenMatrix

if TYPE_CHECKING:
    from torch import Tensor


class Unit(Enum):
    """The smallest thing of which a rank must own all, to update it."""

    VALUE = "value"  # each value is updated by itself, so parts may end anywhere
    # The values of a hidden matrix are updated together, all others as above
    MATRIX = "matrix"


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighboring values of the flat buffers, as views (n,), which are updated alike. For a rule
    whose unit is a matrix, all values of a hidden matrix are one stretch."""

    values: "Tensor"
    gradient: "Tensor"
    vectors: Sequence["Tensor"]  # in the order of the rule's names
    count: "Tensor"  # (): updates so far, on the values' device
    decays: bool
    matrix: HiddenMatrix | None = None


class UpdateRule(Protocol):
    """Changes weights by their gradient. A new rule is a file with one class, a word of the setting
    `optimizer`, and a case in `jobs/exact/run_values.py`."""

    unit: ClassVar[Unit]

    vectors: ClassVar[tuple[str, ...]]
    """The names of what the rule keeps for each value that is updated by itself, as checkpoints
    have them too."""

    matrix_vectors: ClassVar[tuple[str, ...]]
    """The names of what it keeps for each value of a hidden matrix; none for a rule whose unit is a
    value."""

    def update(self, stretches: Sequence[Stretch], *, learning_rate: float) -> None:
        """Updates values, vectors and counts in place."""

    def flops(self, shape: Sequence[int], matrix: HiddenMatrix | None = None) -> float:
        """Returns the operations of the update of a parameter of this shape, which may be a hidden
        matrix."""

    def bytes_moved(self, shape: Sequence[int], matrix: HiddenMatrix | None = None) -> float:
        """Returns the bytes that this update reads and writes."""

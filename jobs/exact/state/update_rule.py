"""The interface of a rule that updates weights: what it keeps beside them, what its owner must
hold, what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Unit(Enum):
    """What a rank must own whole to update it."""

    VALUE = "value"  # each value is updated by itself, so parts may end anywhere
    MATRIX = "matrix"  # the values of a matrix are updated together


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighboring values of the flat buffers, as views (n,), which are updated alike."""

    values: "Tensor"
    gradient: "Tensor"
    vectors: Sequence["Tensor"]  # in the order of the rule's names
    count: "Tensor"  # (): updates so far, on the values' device
    decays: bool


class UpdateRule(Protocol):
    """Changes weights by their gradient. A new rule is a file with one class, a word of the setting
    `optimizer`, and a case in `rules`."""

    vectors: ClassVar[tuple[str, ...]]
    """The names of what the rule keeps for each value, as checkpoints have them too."""

    unit: ClassVar[Unit]

    bytes_per_value: ClassVar[int]
    """Bytes that an update reads and writes for each value."""

    def update(self, stretches: Sequence[Stretch], *, learning_rate: float) -> None:
        """Updates values, vectors and counts in place."""

    def flops(self, shape: Sequence[int]) -> float:
        """Returns the operations of the update of a parameter of this shape."""

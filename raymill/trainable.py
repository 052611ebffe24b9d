"""The interface of a model, as far as the training state knows it."""

from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor, nn

from raymill.rules.hidden_matrix import HiddenMatrix


class Trainable(Protocol):
    """A model, as a training state needs it."""

    rounds_matrices: bool
    """Whether products alone read the matrices of the blocks, which autocast rounds: in bf16, they
    may then travel as bf16 numbers, and their gradients are such numbers."""

    @property
    def hidden_matrices(self) -> Mapping[str, HiddenMatrix]:
        """The parameters that a rule for matrices updates as such, by name."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Returns the parameters that are trained, by name, in the model's order."""

    def parameters(self) -> Iterable[nn.Parameter]: ...

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """Makes the tensors themselves the parameters."""

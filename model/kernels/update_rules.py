"""Update rules and a gradient's norm with the same bits on every processor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raymill.rules.adamw import EPSILON, AdamW
from raymill.rules.hidden_matrix import HiddenMatrix
from raymill.rules.muon import LEAST_NORM, NUM_STEPS, A, B, C, Muon, scale_of
from raymill.rules.update_rule import Stretch

if TYPE_CHECKING:  # the planner asks a rule, and starts without PyTorch
    from torch import Tensor


@dataclass(frozen=True)
class PortableAdamW(AdamW):
    def update_alike(
        self, stretches: Sequence[Stretch], *, learning_rate: float, weight_decay: float
    ) -> None:
        from model.kernels import portable  # noqa: PLC0415 (PyTorch)

        for stretch in stretches:
            stretch.count.add_(1)
            count = int(stretch.count)
            first, second = (1 - power(beta, count) for beta in (self.beta1, self.beta2))
            numbers = (
                1 - learning_rate * weight_decay,
                learning_rate / first,
                self.beta1,
                self.beta2,
                math.sqrt(second),
                EPSILON,
            )
            portable.adamw(stretch.values, stretch.gradient, stretch.vectors, numbers)


@dataclass(frozen=True)
class PortableMuon(Muon):
    def update_matrix(
        self, stretch: Stretch, matrix: HiddenMatrix, *, learning_rate: float
    ) -> None:
        [average] = stretch.vectors
        average.mul_(self.momentum).add_(stretch.gradient * (1 - self.momentum))
        direction = stretch.gradient * (1 - self.momentum) + average * self.momentum
        if stretch.decays:
            stretch.values.mul_(1 - learning_rate * self.weight_decay)
        directions = matrix.cut(direction)
        for values, piece in zip(matrix.cut(stretch.values), directions, strict=True):
            values.sub_(orthogonalized(piece) * (learning_rate * scale_of(piece.shape)))
        stretch.count.add_(1)


def orthogonalized(matrix: "Tensor") -> "Tensor":
    """As `raymill.rules.muon.orthogonalized`, in fp32."""
    from model.kernels.portable import product  # noqa: PLC0415 (PyTorch)

    x = matrix / max(_length(matrix), LEAST_NORM)
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        x = x.T
    for _ in range(NUM_STEPS):
        gram = product(x, x.T)
        polynomial = gram * B + product(gram, gram) * C
        x = x * A + product(polynomial, x)
    return x.T if is_tall else x


def power(base: float, exponent: int) -> float:
    """Returns a power by products in one order: the powers of C libraries differ."""
    result = 1.0
    for digit in f"{exponent:b}":
        result *= result * base if digit == "1" else result
    return result


def _length(values: "Tensor") -> float:
    return math.sqrt(math.fsum(square_sums(values.contiguous().view(-1)).tolist()))


def square_sums(values: "Tensor") -> "Tensor":
    """Returns sums of squares, float64, of the blocks of values (n,); the last may be short."""
    from model.kernels import portable  # noqa: PLC0415 (PyTorch)
    from raymill.state.flat_layout import BLOCK  # noqa: PLC0415 (as above)

    return portable.square_sums(values, BLOCK)


def norm_of(block_sums: "Tensor") -> float:
    """Returns the Euclidean norm: the sum over blocks is exact, in any order."""
    return math.sqrt(math.fsum(block_sums.tolist()))

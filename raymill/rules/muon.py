"""Muon (Jordan, 2024: kellerjordan.github.io/posts/muon) as a rule for flat buffers: momentum, made
about orthogonal, for the hidden matrices, and AdamW for all else.

A hidden matrix multiplies activations inside a block. Embeddings, heads, biases and norms are none.
What is stored as one parameter but multiplies as several matrices, such as GPT-2's query, key and
value, is made orthogonal matrix by matrix. Moonlight (arXiv 2502.16982) scales the update so that
its root mean square is about AdamW's: one learning rate and one decay serve both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import TYPE_CHECKING, ClassVar, Literal

from raymill.rules.adamw import AdamW
from raymill.rules.hidden_matrix import HiddenMatrix
from raymill.rules.update_rule import Stretch, Unit

if TYPE_CHECKING:  # the planner asks this rule, and starts without PyTorch
    from torch import Tensor

ProductType = Literal["float32", "bfloat16"]
"""PyTorch's name of the type in which products are computed."""

_BYTES: dict[ProductType, int] = {"float32": 4, "bfloat16": 2}

NUM_STEPS = 5  # of Newton and Schulz

A, B, C = 3.4445, -4.7750, 2.0315
"""Jordan's coefficients of a x + b x³ + c x⁵, which in five steps takes singular values from about
0.003 up to between 0.7 and 1.2."""

LEAST_NORM = 1e-7

_RMS_OF_ADAMW = 0.2
"""The root mean square of AdamW's usual update over its learning rate (Moonlight, section 2.2)."""


@dataclass(frozen=True)
class Muon:
    unit: ClassVar[Unit] = Unit.MATRIX
    vectors: ClassVar[tuple[str, ...]] = AdamW.vectors
    matrix_vectors: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    momentum: float
    weight_decay: float
    others: AdamW  # for whatever is no hidden matrix
    products: ProductType = "float32"  # of Newton and Schulz

    def update(self, stretches: Sequence[Stretch], *, learning_rate: float) -> None:
        others: list[Stretch] = []
        for stretch in stretches:
            if stretch.matrix is None:
                others.append(stretch)
            else:
                self.update_matrix(stretch, stretch.matrix, learning_rate=learning_rate)
        self.others.update(others, learning_rate=learning_rate)

    def update_matrix(
        self, stretch: Stretch, matrix: HiddenMatrix, *, learning_rate: float
    ) -> None:
        [average] = stretch.vectors
        average.lerp_(stretch.gradient, 1 - self.momentum)
        direction = stretch.gradient.lerp(average, self.momentum)  # Nesterov's
        if stretch.decays:
            stretch.values.mul_(1 - learning_rate * self.weight_decay)
        values_of_pieces = matrix.cut(stretch.values)
        directions = matrix.cut(direction)
        for values, piece in zip(values_of_pieces, directions, strict=True):
            change = orthogonalized(piece, self.products)
            values.add_(change, alpha=-learning_rate * scale_of(piece.shape))
        stretch.count.add_(1)

    def flops(self, shape: Sequence[int], matrix: HiddenMatrix | None = None) -> float:
        """Returns 4 m² n + 2 m³ for each step of Newton and Schulz on a matrix (m, n), m <= n: two
        products with it and one of its Gram matrix."""
        if matrix is None:
            return self.others.flops(shape)
        total = 0.0
        for piece in matrix.piece_shapes:
            m, n = sorted(piece)
            total += NUM_STEPS * (4.0 * m * m * n + 2.0 * m**3)
        return total

    def bytes_moved(self, shape: Sequence[int], matrix: HiddenMatrix | None = None) -> float:
        """Counts what the momentum and the update read and write of each value, 14 numbers, and
        each step of Newton and Schulz, 4."""
        if matrix is None:
            return self.others.bytes_moved(shape)
        of_step = 14 * _BYTES["float32"] + 4 * NUM_STEPS * _BYTES[self.products]
        return float(of_step * prod(shape))


def scale_of(shape: Sequence[int]) -> float:
    """Returns the factor that gives an orthogonal matrix (m, n) the root mean square of AdamW's
    update."""
    return _RMS_OF_ADAMW * sqrt(max(shape))


def orthogonalized(matrix: "Tensor", products: ProductType = "float32") -> "Tensor":
    """Returns U S V of a matrix U Σ V (m, n), where S is about the identity: its singular values
    are between 0.7 and 1.2 or so. The result has the type of the products; `torch.optim.Muon` has
    the same bits in bf16.

    The bits depend on nothing but the type, the shape, the processor and its number of threads.
    """
    import torch  # noqa: PLC0415 (takes a second, as above)

    x = matrix.to(getattr(torch, products))
    # In new memory, which is aligned alike wherever the matrix lies
    x = x / x.norm().clamp(min=LEAST_NORM)
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        x = x.T  # the Gram matrix is the smaller one
    for _ in range(NUM_STEPS):
        gram = x @ x.T
        polynomial = gram.addmm(gram, gram, beta=B, alpha=C)
        x = x.addmm(polynomial, x, beta=A)
    return x.T if is_tall else x

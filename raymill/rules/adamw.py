"""AdamW (arXiv 1711.05101) as a rule for flat buffers, with PyTorch's fused kernel."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from raymill.rules.hidden_matrix import HiddenMatrix
from raymill.rules.update_rule import Stretch, Unit

EPSILON = 1e-8
"""Added to the root of the second moment."""

_FP32_BYTES = 4


@dataclass(frozen=True)
class AdamW:
    unit: ClassVar[Unit] = Unit.VALUE
    # The first and the second moment
    vectors: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    matrix_vectors: ClassVar[tuple[str, ...]] = ()

    beta1: float
    beta2: float
    weight_decay: float

    def update(self, stretches: Sequence[Stretch], *, learning_rate: float) -> None:
        for decays in (True, False):
            alike = [stretch for stretch in stretches if stretch.decays is decays]
            if alike:
                weight_decay = self.weight_decay if decays else 0.0
                self.update_alike(alike, learning_rate=learning_rate, weight_decay=weight_decay)

    def update_alike(
        self, stretches: Sequence[Stretch], *, learning_rate: float, weight_decay: float
    ) -> None:
        """Updates stretches of one weight decay."""
        # The planner asks this rule, and starts without PyTorch. The optimizer's class would import
        # torch._dynamo, which takes a second.
        from torch.optim.adamw import adamw

        first_moments, second_moments = zip(
            *(stretch.vectors for stretch in stretches), strict=True
        )
        adamw(
            [stretch.values for stretch in stretches],
            [stretch.gradient for stretch in stretches],
            [*first_moments],
            [*second_moments],
            [],
            [stretch.count for stretch in stretches],  # which the kernel counts up
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=learning_rate,
            weight_decay=weight_decay,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=EPSILON,
        )

    def flops(self, shape: Sequence[int], matrix: HiddenMatrix | None = None) -> float:
        """Returns 14 for each value: 3 for the first moment, 4 for the second, 1 for the decay, 6
        for the quotient."""
        return 14.0 * prod(shape)

    def bytes_moved(self, shape: Sequence[int], matrix: HiddenMatrix | None = None) -> float:
        """Counts value, gradient and moments, which are read, and all but the gradient, which are
        written."""
        return 7.0 * _FP32_BYTES * prod(shape)

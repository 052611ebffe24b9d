"""The numbers in which products are computed: one frozen record for each word of the setting
`precision`.

Weights, sums and the optimizer are fp32. What products of matrices compute in, and what follows
from that, a record tells; another type is a row here. This module does not import PyTorch.
"""

import math
from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "bf16"]

WEIGHT_BYTES = 4
"""Bytes of a weight, a gradient's sum, or one of the optimizer's values: fp32."""


@dataclass(frozen=True)
class Numerics:
    """The type of products, and the settings that it takes."""

    name: Precision
    torch_type: str  # PyTorch's name of the type
    # Of a weight as products read it, and of its gradient, which is a product: as both travel
    product_bytes: int
    has_flash_attention: bool  # on GPUs
    # Of a gradient's relative error in the self-test: a healthy device has a twentieth of it or
    # less
    tolerance: float
    needs_units: bool  # of a processor, which emulates it without them, and is slow
    # The loss is multiplied by it, so that small gradients are not rounded to zero in the type, and
    # the batch's gradient is divided by it. It never changes: the same steps have the same bits.
    loss_scale: float

    def __post_init__(self) -> None:
        # Any other number would round what it multiplies.
        if math.frexp(self.loss_scale)[0] != 0.5:
            raise ValueError(f"loss_scale is {self.loss_scale}, expected a power of two")

    @property
    def is_rounded(self) -> bool:
        """Whether weights and inputs are rounded for their products, which autocast does."""
        return self.product_bytes < WEIGHT_BYTES

    @property
    def rounded_bytes(self) -> int:
        """The bytes of the rounded copy of a value; 0 where none is made."""
        return self.product_bytes if self.is_rounded else 0


FP32 = Numerics(
    name="fp32",
    torch_type="float32",
    product_bytes=4,
    has_flash_attention=False,
    tolerance=1e-4,  # a healthy device: 2e-6
    needs_units=False,
    loss_scale=1.0,
)

BF16 = Numerics(
    name="bf16",
    torch_type="bfloat16",
    product_bytes=2,
    has_flash_attention=True,
    tolerance=5e-2,  # a healthy device: 2e-2
    needs_units=True,
    loss_scale=1.0,
)

NUMERICS: dict[str, Numerics] = {record.name: record for record in (FP32, BF16)}
"""By the word of the setting."""

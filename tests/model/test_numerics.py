"""Every word of the setting `precision` has a record, and a record says only what can be computed."""

from dataclasses import replace
from typing import get_args

import pytest

from model.numerics import BF16, NUMERICS, Precision


def test_every_word_of_the_setting_has_a_record() -> None:
    assert list(NUMERICS) == list(get_args(Precision))


@pytest.mark.parametrize("loss_scale", [0.0, -2.0, 3.0, 1000.0, float("inf"), float("nan")])
def test_loss_scale__that_would_round_a_gradient__is_refused(loss_scale: float) -> None:
    with pytest.raises(ValueError, match=f"loss_scale is {loss_scale}, expected a power of two"):
        replace(BF16, loss_scale=loss_scale)

"""The self-test passes on this processor in every way to compute, and names what a planted fault
breaks."""

import itertools
from typing import Any

import pytest
from torch import Tensor

from cluster.settings.run import RunConfig
from jobs.exact import compute
from jobs.exact.self_test import self_test
from model.errors import UserError
from model.operations import PLAIN, Operations
from tests.jobs.train_worlds import CPU


def config(**train: Any) -> RunConfig:
    model = {"preset": "tiny", "n_positions": 128, "dropout": 0.1}
    return RunConfig.model_validate({"model": model, "train": {"precision": "fp32"} | train})


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"precision": "bf16", "document_mask": True},
        {"compute": "plain", "recompute": True, "document_mask": True},
        {"compute": "plain", "precision": "bf16", "micro_batches_per_lane": 2},
        {"exact": False},
        pytest.param({"compute": "compiled", "precision": "bf16"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_healthy_processor_passes(train: dict[str, Any]) -> None:
    self_test(config(**train), CPU)


@pytest.mark.parametrize("preset", ["gpt2-124m", "gpt3-6.7b", "llama3.2-1b", "seed"])
def test_a_healthy_processor_passes_in_bf16_however_wide_the_heads_are(preset: str) -> None:
    """64, 128, 64 and 768 values: with logits that grow with the width, rounding would look like a
    fault."""
    train = {"precision": "bf16", "compute": "plain"}
    self_test(RunConfig.model_validate({"model": {"preset": preset}, "train": train}), CPU)


def wrong(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Has the value of a projection, and a gradient that is 1 % too long where it is C wide."""
    y = PLAIN.affine(x, weight, bias)
    longer = y * 1.01
    return y.detach() + longer - longer.detach() if weight.shape[1] == weight.shape[0] * 4 else y


CALLS = itertools.count()


def unsteady(hidden: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
    return PLAIN.cross_entropy(hidden * (1 + 2e-6 * next(CALLS)), weight, *rest, **options)


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        (
            PLAIN._replace(affine=wrong),
            "a feed-forward layer has a gradient of transformer.h.1.mlp.c_fc.bias that is 0.01",
        ),
        (PLAIN._replace(cross_entropy=unsteady), "another gradient each time"),
    ],
    ids=["wrong", "unsteady"],
)
def test_a_planted_fault_is_named(
    ops: Operations, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "PLAIN", ops)
    with pytest.raises(UserError, match=message):
        self_test(config(compute="plain"), CPU)

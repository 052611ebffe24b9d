"""What a worker's checks refuse of models of transformers before anything is trained, and what they
take."""

from typing import Any

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from cluster.settings.run import RunConfig
from jobs.exact.foreign_test import test_foreign as check_foreign
from jobs.exact.self_test import self_test
from model.foreign_config import ForeignConfig, ForeignModelError
from raymill.errors import UserError
from tests.foreign_models import ROFORMER, small
from tests.jobs.train_worlds import CPU, Case

RWKV = {"model_type": "rwkv", "vocab_size": 301, "hidden_size": 48, "num_hidden_layers": 2}
RWKV |= {"attention_hidden_size": 48, "intermediate_size": 80, "context_length": 64}
LFM2 = small("qwen3").values | {"model_type": "lfm2", "block_ff_dim": 80, "conv_L_cache": 3}
LFM2 |= {"layer_types": ["conv", "full_attention", "conv"]}


def config_of(values: dict[str, Any], *, documents: bool = False) -> RunConfig:
    config = Case(compute="plain", family="qwen3", documents=documents).config()
    return config.model_copy(update={"model": ForeignConfig.of(values)})


@pytest.mark.parametrize(
    "initializer_range", [0.1, pytest.param(0.02, id="its own"), pytest.param(0.002, id="narrow")]
)
def test_documents__that_see_one_another_a_little__are_refused_however_small_weights_begin(
    initializer_range: float,
) -> None:
    """At its own `initializer_range` a token of LFM2 changes by 2.5e-4 with the document before."""
    values = LFM2 | {"initializer_range": initializer_range}
    with pytest.raises(UserError, match="'lfm2' sees other documents in a row all the same"):
        check_foreign(config_of(values, documents=True), CPU)
    check_foreign(config_of(values), CPU)


def test_documents__of_experts__are_taken_though_they_compute_together() -> None:
    for family in ("qwen3_moe", "mixtral"):
        check_foreign(config_of(small(family).values, documents=True), CPU)


def test_the_checks__leave_the_weights_that_they_drew_as_they_were() -> None:
    """Gradients are compared with those of the weights that the model's own rule draws."""
    seen: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        forward = Qwen3Attention.forward

        def noting(self: Any, *values: Any, **named: Any) -> Any:
            seen.append(float(self.q_proj.weight.detach().std()))
            return forward(self, *values, **named)

        patch.setattr(Qwen3Attention, "forward", noting)
        check_foreign(config_of(small("qwen3").values), CPU)
    assert seen[0] == pytest.approx(48**-0.5, rel=0.1)
    assert seen[-1] == pytest.approx(0.1, rel=0.1)


def test_a_parameter__that_transformers_freezes__is_refused_by_name() -> None:
    expected = r"freezes roformer\.encoder\.embed_positions\.weight in a model of type 'roformer'"
    with pytest.raises(ForeignModelError, match=expected):
        check_foreign(config_of(ROFORMER), CPU)


def test_rwkv__without_rescaling__is_taken() -> None:
    self_test(config_of(RWKV | {"rescale_every": 0}), CPU)


def test_mamba__without_a_number_of_heads__is_taken() -> None:
    values = {"model_type": "mamba", "vocab_size": 301, "hidden_size": 48, "num_hidden_layers": 2}
    self_test(config_of(values | {"state_size": 8}), CPU)


@pytest.mark.parametrize("error", [KeyError("full_attention"), RuntimeError("sizes must match")])
def test_a_first_forward_pass__that_raises_anything__is_refused_with_the_models_type(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(self: Any, *values: Any, **named: Any) -> Any:
        raise error

    monkeypatch.setattr(Qwen3Attention, "forward", raising)
    with pytest.raises(ForeignModelError) as refusal:
        check_foreign(config_of(small("qwen3").values), CPU)
    assert "a model of type 'qwen3' cannot be computed with transformers" in str(refusal.value)
    assert str(error) in str(refusal.value)


def test_a_backward_pass__that_raises_anything__is_refused_with_the_models_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def raising(gradient: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("derivative is not implemented")

    forward = Qwen3Attention.forward

    def hooked(self: Any, *values: Any, **named: Any) -> Any:
        y, *rest = forward(self, *values, **named)
        if y.requires_grad:
            y.register_hook(raising)
        return y, *rest

    monkeypatch.setattr(Qwen3Attention, "forward", hooked)
    with pytest.raises(ForeignModelError, match=r"type 'qwen3' .*derivative is not implemented"):
        check_foreign(config_of(small("qwen3").values), CPU)

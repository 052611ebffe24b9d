"""An architecture is a record and its modules: what asks a record works for a third one too."""

import re
from typing import Any, cast, get_args

import pytest
import torch

from model.architecture import ARCHITECTURES, Activation, ArchitectureName
from model.config import GPTConfig
from model.files.hf_config import config_from_hf, config_to_hf
from model.gpt import BODIES, GPT, activated
from model.shapes import parameter_shapes, weights
from tests.gated_gpt2 import NAME, add_gated_gpt2, gated_config
from tests.repository import REPOSITORY


def test_every_word_of_the_setting_has_a_record_and_modules() -> None:
    assert list(ARCHITECTURES) == list(BODIES) == list(get_args(ArchitectureName))


@pytest.mark.parametrize("activation", get_args(Activation))
def test_each_activation_is_computed_or_refused(activation: Activation) -> None:
    x = torch.randn(8, generator=torch.Generator().manual_seed(1))
    if activation == "swiglu":
        with pytest.raises(AssertionError, match="SwiGLU is a gate"):
            activated(x, activation)
    else:
        assert not torch.equal(activated(x, activation), x), "no activation at all"


def test_activation__that_the_network_does_not_know__is_refused() -> None:
    with pytest.raises(AssertionError):
        activated(torch.ones(1), cast(Any, "relu2"))


def test_kernels__number_of_each_name__is_that_of_the_c_enum() -> None:
    from model.kernels.native_library import ACTIVATIONS

    source = (REPOSITORY / "model/kernels/native/shape.h").read_text(encoding="utf-8")

    def members(enum: str) -> list[str]:
        (listed,) = re.findall(rf"enum {enum} : int32_t {{ (.*) }};", source)
        return [name.lower() for name in listed.split(", ")]

    assert members("Activation") == sorted(ACTIVATIONS, key=lambda name: ACTIVATIONS[name])
    # Several architectures may have the same blocks, and so one number.
    numbers = {name: record.kernels.number for name, record in ARCHITECTURES.items()}
    known = members("Architecture")
    assert [numbers[name] for name in known] == [*range(len(known))] == sorted({*numbers.values()})


def test_third_architecture__is_a_record_and_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="architecture is 'gated', expected one of gpt2, llama"):
        gated_config()
    add_gated_gpt2(monkeypatch)
    config = gated_config(n_inner=70)
    model = GPT(config)
    model.init_weights(1)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert list(parameter_shapes(config).items()) == list(shapes.items())
    assert config.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert [stage.dims for stage in weights(config) if "c_up" in stage.name] == ["C F", "F"]
    assert config_from_hf(config_to_hf(config, start_id=0, end_ids=[0])) == config
    ids = torch.arange(40).reshape(2, 20)
    model.loss(ids, ids).backward()
    assert all(
        parameter.grad is not None and parameter.grad.any() for parameter in model.parameters()
    )


def test_settings_of_another_architecture_are_refused_for_a_third_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add_gated_gpt2(monkeypatch)
    with pytest.raises(
        ValueError, match="n_kv_head is a setting of architecture llama; gated has none"
    ):
        gated_config(n_kv_head=1)
    with pytest.raises(ValueError, match="expected for gated: swiglu"):
        GPTConfig(architecture=NAME)

"""A layer's norms are those of its parameters."""

import math

import pytest
import torch

from cluster.settings.train import TrainConfig
from jobs.exact.run_state import run_state
from jobs.training.layer_statistics import LayerStatistics, layer_of
from model.architecture import GPT2, LLAMA
from model.config import GPTConfig
from model.gpt import GPT
from raymill.step_timer import StepTimer
from raymill.workers.worker_group import WorkerGroup


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("transformer.wte.weight", "wte"),
        ("transformer.h.11.ln_1.bias", "h.11.attn"),
        ("transformer.h.0.attn.c_attn.weight", "h.0.attn"),
        ("transformer.h.0.ln_2.weight", "h.0.mlp"),
        ("transformer.h.0.mlp.c_proj.bias", "h.0.mlp"),
        ("transformer.ln_f.weight", "ln_f"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_layers_by_parameter(parameter: str, layer: str) -> None:
    assert layer_of(parameter, GPT2.parameters) == layer


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("model.embed_tokens.weight", "embed_tokens"),
        ("model.layers.11.input_layernorm.weight", "layers.11.self_attn"),
        ("model.layers.0.self_attn.q_proj.weight", "layers.0.self_attn"),
        ("model.layers.0.post_attention_layernorm.weight", "layers.0.mlp"),
        ("model.norm.weight", "norm"),
    ],
)
def test_layers_by_parameter_of_llama(parameter: str, layer: str) -> None:
    assert layer_of(parameter, LLAMA.parameters) == layer


def test_norms_are_those_of_the_parameters() -> None:
    model = GPT(GPTConfig(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    model.init_weights(0)
    state = run_state(model, TrainConfig(precision="fp32"), device=torch.device("cpu"))
    torch.manual_seed(0)
    model.loss(torch.randint(64, (2, 16)), torch.randint(64, (2, 16))).backward()
    before = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    gradients = {
        name: parameter.grad.double()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    statistics = LayerStatistics(state, WorkerGroup(0, 1), StepTimer(), every_steps=3)
    with statistics.around_update(2):
        pass
    assert statistics.fields is None
    with statistics.around_update(3):
        state.apply(norm=1e9, learning_rate=0.1)  # clipped: the gradient is measured before that
    fields = statistics.fields
    assert fields is not None
    assert fields["layers"] == ["wte", "wpe", "h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp", "ln_f"]
    after = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    for number, layer in enumerate(fields["layers"]):
        names = [name for name in before if layer_of(name, GPT2.parameters) == layer]

        def norm(tensors: dict[str, torch.Tensor], names: list[str] = names) -> float:
            return math.sqrt(sum(float(tensors[name].square().sum()) for name in names))

        change = norm({name: after[name] - before[name] for name in names})
        assert fields["gradient_norm"][number] == pytest.approx(norm(gradients), rel=1e-5)
        assert fields["weight_norm"][number] == pytest.approx(norm(before), rel=1e-5)
        assert fields["update_ratio"][number] == pytest.approx(change / norm(before), rel=1e-4)
        assert change > 0
    with statistics.around_update(4):
        pass
    assert statistics.fields is None, "a step that is not measured has none"


def test_zero_never_measures() -> None:
    model = GPT(GPTConfig(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    model.init_weights(0)
    state = run_state(model, TrainConfig(precision="fp32"), device=torch.device("cpu"))
    statistics = LayerStatistics(state, WorkerGroup(0, 1), StepTimer(), every_steps=0)
    with statistics.around_update(100):
        pass
    assert statistics.fields is None

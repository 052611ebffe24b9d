"""Hand-written gradients equal those of autograd in float64, in sinks or not, for any upstream gradient."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import model.autograd_ops as ops
from model import gpt
from model.gpt import GPT
from model.training_memory import gradient_sinks, lent
from tests.model.small_models import chunked_loss, small_model

TOKENS = torch.randint(97, (3, 21), generator=torch.Generator().manual_seed(1))
INPUTS, TARGETS = TOKENS[:, :-1], TOKENS[:, 1:]


def stock_gradients(model: GPT, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Returns gradients in float64, computed by none of the hand-written operations."""
    model = copy.deepcopy(model).double()
    with monkeypatch.context() as stock:
        stock.setattr(gpt, "affine", lambda x, weight, bias: x @ weight + bias)
        stock.setattr(gpt, "embed", lambda indices, weight, **_: F.embedding(indices, weight))
        logits = F.linear(model(INPUTS), model.head_weight)
    F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), reduction="sum").backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    ("upstream", "tied", "with_sinks", "on_gpu"),
    itertools.product([1.0, 2.0, 0.5], [True, False], [True, False], [True, False]),
)
def test_gradients_are_those_of_autograd(
    upstream: float, tied: bool, with_sinks: bool, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(tie_word_embeddings=tied)
    expected = stock_gradients(model, monkeypatch)
    if on_gpu:  # where the upstream gradient is not looked at
        monkeypatch.setattr(ops, "_is_known_to_be_one", lambda grad: False)
    sinks = {parameter: torch.full_like(parameter, 7.0) for parameter in model.parameters()} if with_sinks else {}
    with lent(gradient_sinks, sinks):
        chunked_loss(model, INPUTS, TARGETS, chunk_tokens=16).backward(torch.tensor(upstream))
    assert expected.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        error = (parameter.grad.double() / upstream - expected[name]).norm() / expected[name].norm()
        assert error < 2e-6, name
        if with_sinks and parameter.ndim == 2:
            assert parameter.grad.data_ptr() == sinks[parameter].data_ptr(), f"{name} is not in its sink"

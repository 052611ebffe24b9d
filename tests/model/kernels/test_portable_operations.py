"""Training by portable kernels: gradients as float64 has them, the same bits with any number of
threads."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention import document_mask, document_positions
from model.config import GPTConfig
from model.gpt import GPT
from model.kernels.operations import PORTABLE
from model.operations import use_operations

SHAPE: dict[str, Any] = {"vocab_size": 331, "n_positions": 80, "n_layer": 2}
GPT2 = SHAPE | {"n_head": 3, "n_embd": 66}
LLAMA = SHAPE | {"architecture": "llama", "activation_function": "swiglu", "n_head": 6}
CONFIGS = {
    "gelu": GPTConfig(**GPT2),
    "gelu_exact": GPTConfig(**GPT2, activation_function="gelu_exact"),
    "relu, untied": GPTConfig(**GPT2, activation_function="relu", tie_word_embeddings=False),
    "llama": GPTConfig(**LLAMA, n_embd=60, n_kv_head=2, n_inner=101),
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> GPT:
    model = GPT(CONFIGS[request.param])
    numbers = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            whole = torch.randint(-(2**14), 2**14, parameter.shape, generator=numbers)
            parameter.copy_(whole.float() / 2**16 + (parameter.dim() == 1))
    return model


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives PyTorch its number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def batch(*, documents: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns inputs, targets, positions and a mask; some targets are not counted."""
    ids = torch.arange(2 * 71).mul(37).remainder(331).view(2, 71)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].clone()
    targets[0, :9] = -100
    if not documents:
        return inputs, targets, None, None
    inputs[:, [0, 20, 21, 50]] = 0
    positions = document_positions(inputs, eot_id=0)
    return inputs, targets, positions, document_mask(positions)


def gradients(model: GPT, *, documents: bool) -> dict[str, Tensor]:
    """Returns the loss and the gradients of a batch."""
    inputs, targets, positions, mask = batch(documents=documents)
    model.zero_grad()
    hidden = model(inputs, positions=positions, mask=mask)
    loss = model.loss_of(hidden, targets, scale=0.125)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


@pytest.mark.parametrize("documents", [False, True])
def test_portable_operations__have_the_gradients_of_float64(model: GPT, documents: bool) -> None:
    expected = gradients(model.double(), documents=documents)
    use_operations(model.float(), PORTABLE)
    found = gradients(model, documents=documents)
    assert found.keys() == expected.keys() and len(found) > 20
    for name, values in expected.items():
        error = (found[name].double() - values).abs().max() / values.abs().max()
        assert error < 2e-5, (name, error)


def test_portable_operations__with_any_number_of_threads__have_the_same_bits(
    model: GPT, threads: None
) -> None:
    use_operations(model, PORTABLE)
    runs = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        runs.append(gradients(model, documents=True))
    for name, values in runs[0].items():
        assert all(torch.equal(values, other[name]) for other in runs[1:]), name

"""Every way to compute gives the gradients of autograd in float64, and recomputing changes no
bit."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import Documents, document_mask, document_positions, packed_documents
from model.cpu_ops.operations import CPU
from model.gpt import GPT
from model.linear_cross_entropy import IGNORE_INDEX
from model.operations import (
    PLAIN,
    Operations,
    compilations,
    compiled,
    recomputed,
    use_operations,
)
from raymill.loans import gradient_sinks, lent
from tests.model.small_models import chunked_loss, small_model

TOKENS = torch.randint(97, (3, 21), generator=torch.Generator().manual_seed(1))
INPUTS, TARGETS = TOKENS[:, :-1], TOKENS[:, 1:].clone()
TARGETS[1, 3] = IGNORE_INDEX
EOT = 5


def with_operations(ops: Operations, **changes: object) -> GPT:
    model = small_model(**changes)
    use_operations(model, ops)
    return model


def stock_gradients(model: GPT) -> dict[str, Tensor]:
    """Returns gradients in float64, of the whole scores."""
    model = copy.deepcopy(model).double()
    use_operations(model, PLAIN)
    logits = F.linear(model(INPUTS), model.head_weight)
    F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), reduction="sum").backward()
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def check_gradients(model: GPT, *, upstream: float, within: float) -> None:
    expected = stock_gradients(model)
    assert expected.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        error = (parameter.grad.double() / upstream - expected[name]).norm() / expected[name].norm()
        assert error < within, name


@pytest.mark.parametrize(
    ("upstream", "tied", "ops"),
    itertools.product([1.0, 2.0, 0.5], [True, False], [PLAIN, CPU, recomputed(PLAIN)]),
)
def test_gradients_are_those_of_autograd(upstream: float, tied: bool, ops: Operations) -> None:
    model = with_operations(ops, tie_word_embeddings=tied)
    chunked_loss(model, INPUTS, TARGETS, chunk_tokens=16).backward(torch.tensor(upstream))
    check_gradients(model, upstream=upstream, within=2e-6)


@pytest.mark.parametrize(("upstream", "tied"), itertools.product([1.0, 2.0], [True, False]))
def test_gradients_in_sinks_are_those_of_autograd(upstream: float, tied: bool) -> None:
    model = with_operations(CPU, tie_word_embeddings=tied)
    sinks = {parameter: torch.full_like(parameter, 7.0) for parameter in model.parameters()}
    with lent(gradient_sinks, sinks):
        chunked_loss(model, INPUTS, TARGETS, chunk_tokens=16).backward(torch.tensor(upstream))
    check_gradients(model, upstream=upstream, within=2e-6)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert parameter.grad is not None
            assert parameter.grad.data_ptr() == sinks[parameter].data_ptr(), (
                f"{name} is not in its sink"
            )


@pytest.mark.parametrize("ops", [PLAIN, CPU], ids=["plain", "cpu"])
def test_gradients_in_bf16_are_near_those_of_autograd(ops: Operations) -> None:
    model = with_operations(ops)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_loss(model, INPUTS, TARGETS, chunk_tokens=16)
    loss.backward()
    check_gradients(model, upstream=1.0, within=5e-2)


def test_a_loss_keeps_its_gradient_for_a_second_backward() -> None:
    model = with_operations(PLAIN)
    loss = model.loss(INPUTS, TARGETS)
    first = torch.autograd.grad(
        loss, list(model.parameters()), torch.tensor(3.0), retain_graph=True
    )
    second = torch.autograd.grad(loss, list(model.parameters()), torch.tensor(3.0))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_loss_has_the_same_bits_without_gradients(autocast: bool) -> None:
    model = with_operations(PLAIN)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        with_gradients = model.loss(INPUTS, TARGETS)
        with torch.no_grad():
            assert torch.equal(model.loss(INPUTS, TARGETS), with_gradients.detach())


@pytest.mark.parametrize("ops", [PLAIN, CPU], ids=["plain", "cpu"])
def test_recomputing_changes_no_bit(ops: Operations) -> None:
    positions = document_positions(INPUTS, eot_id=EOT)

    def gradients(ops: Operations) -> list[Tensor]:
        model = with_operations(ops, dropout=0.3).train()
        torch.manual_seed(4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.loss(INPUTS, TARGETS, positions, document_mask(positions))
        return [*torch.autograd.grad(loss, list(model.parameters())), loss.detach()]

    assert all(
        torch.equal(a, b) for a, b in zip(gradients(ops), gradients(recomputed(ops)), strict=True)
    )


def test_packed_documents_are_those_of_the_mask() -> None:
    tokens = torch.randint(9, (3, 40), generator=torch.Generator().manual_seed(2))
    tokens[0, -1] = EOT  # a document of one token, at a row's end
    positions = document_positions(tokens, eot_id=EOT)
    documents = packed_documents(positions)
    begins = documents.starts.tolist()
    assert len(begins) == 65 and documents.longest == 40
    assert begins == sorted(begins) and begins[0] == 0 and begins[-1] == tokens.numel()
    seen = torch.zeros(tokens.numel(), tokens.numel(), dtype=torch.bool)
    for start, stop in itertools.pairwise(begins):
        seen[start:stop, start:stop] = torch.ones(
            stop - start, stop - start, dtype=torch.bool
        ).tril()
    assert torch.equal(seen, torch.block_diag(*document_mask(positions)[:, 0]).bool())


@pytest.mark.slow  # imports the compiler
def test_all_blocks_are_one_graph_whatever_else_is_computed_between() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model = with_operations(compiled(backend), n_layer=12)
    before = compilations.number
    for _ in range(2):
        model.loss(INPUTS, TARGETS).backward()
        with torch.no_grad():
            model.loss(INPUTS[:2, :7], TARGETS[:2, :7])
    assert len(graphs) == 2  # the block's, and the head's loss
    assert compilations.number - before == 2
    model.zero_grad()
    model.loss(INPUTS, TARGETS).backward()
    check_gradients(model, upstream=1.0, within=2e-6)


def attend_by_borders(documents: Documents, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Does what the attention of CUDA does, which CPUs do not have."""
    shape = q.shape  # (B, T, H, D)
    places = torch.arange(shape[0] * shape[1])
    numbers = torch.searchsorted(documents.starts, places, right=True)
    seen = (numbers[:, None] == numbers[None, :]) & (places <= places[:, None])
    q, k, v = (part.flatten(0, 1).transpose(0, 1) for part in (q, k, v))  # (H, B x T, D)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    return y.transpose(0, 1).reshape(shape)


@pytest.mark.slow  # imports the compiler
def test_documents_of_any_usual_number_are_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(Documents, "attend", attend_by_borders)
    model = with_operations(compiled(backend))
    plain = with_operations(PLAIN)
    for num_documents in (1, 2, 7, 30, len(INPUTS.flatten())):
        tokens = INPUTS.clone()
        tokens.view(-1)[:: len(INPUTS.flatten()) // num_documents] = EOT
        positions = document_positions(tokens, eot_id=EOT)
        documents = packed_documents(positions)
        loss = model.loss(tokens, TARGETS, positions, documents)
        expected = plain.loss(tokens, TARGETS, positions, document_mask(positions))
        torch.testing.assert_close(loss, expected)
    assert len(graphs) == 2


@pytest.mark.parametrize("num_rows", [1, 8])
def test_borders_of_documents_are_padded_to_few_sizes(num_rows: int) -> None:
    """However many documents there are: a compiled graph is compiled again for each size."""
    length = 2048
    sizes: dict[int, int] = {}
    for num_tokens in (1, 2, 5, 30, 128, 500, length):  # of a document
        positions = torch.arange(length).expand(num_rows, length) % num_tokens
        starts = packed_documents(positions).starts
        assert starts[-1] == num_rows * length
        sizes[num_tokens] = len(starts)
    assert len({sizes[num_tokens] for num_tokens in (128, 500, length)}) == 1
    assert len(set(sizes.values())) <= 5


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("recomputes", [False, True])
def test_compiled_blocks_give_the_gradients_of_autograd(recomputes: bool) -> None:
    ops = recomputed(compiled()) if recomputes else compiled()
    model = with_operations(ops)
    model.loss(INPUTS, TARGETS).backward()
    check_gradients(model, upstream=1.0, within=2e-6)

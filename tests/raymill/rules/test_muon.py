"""Muon against PyTorch's own, on matrices as they multiply, and its state in checkpoints."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.config import GPTConfig
from model.gpt import GPT
from model.numerics import BF16, FP32, Numerics
from model.shapes import hidden_matrices
from raymill.files.safetensors_file import parameter_hash
from raymill.rules.hidden_matrix import HiddenMatrix
from raymill.rules.muon import Muon, orthogonalized
from raymill.rules.update_rule import Stretch
from raymill.state.stored_state import restore
from tests.gated_gpt2 import add_gated_gpt2, gated_config
from tests.jobs.train_states import (
    RATE,
    apply,
    gradients,
    make_model,
    make_state,
    moments,
    stored,
)

LLAMA = {
    "architecture": "llama",
    "activation_function": "swiglu",
    "n_kv_head": 2,
    "n_embd": 24,
    "n_head": 4,
}


class PlainLoop:
    """`torch.optim.Muon` and `torch.optim.AdamW` on parameters of their own: GPT-2's query, key and
    value are three, and all are stored as they multiply."""

    def __init__(self, model: GPT, *, learning_rate: float) -> None:
        self._matrices = hidden_matrices(model.config)
        self._parameters: dict[str, list[nn.Parameter]] = {}
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        matrices: list[nn.Parameter] = []
        for name, values in model.named_parameters():
            pieces = [nn.Parameter(piece) for piece in self._pieces(name, values)]
            self._parameters[name] = pieces
            if name in self._matrices:
                matrices += pieces
            else:
                (decayed if values.dim() == 2 else others).extend(pieces)
        self.num_matrices = len(matrices)
        muon = {"weight_decay": 0.3, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
        groups = [
            {"params": decayed, "weight_decay": 0.3},
            {"params": others, "weight_decay": 0.0},
        ]
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=learning_rate, **muon),
            torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95)),
        ]

    def _pieces(self, name: str, values: Tensor) -> list[Tensor]:
        matrix = self._matrices.get(name)
        pieces = [*matrix.cut(values.detach().flatten())] if matrix else [values.detach()]
        return [piece.clone() for piece in pieces]

    def step(self, gradients: dict[str, Tensor]) -> None:
        for name, parameters in self._parameters.items():
            for parameter, piece in zip(
                parameters, self._pieces(name, gradients[name]), strict=True
            ):
                parameter.grad = piece
        for optimizer in self._optimizers:
            optimizer.step()

    def difference(self, name: str, values: Tensor) -> float:
        """Returns the largest difference of a parameter's values."""
        pieces = zip(self._parameters[name], self._pieces(name, values), strict=True)
        return max(float((parameter.detach() - piece).abs().max()) for parameter, piece in pieces)


@pytest.fixture(params=["gpt2", "llama", "gated"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> GPT:
    match request.param:
        case "gpt2":
            return make_model()
        case "llama":
            return make_model(**LLAMA)
    add_gated_gpt2(monkeypatch)
    sizes = {"n_layer": 2, "n_embd": 18, "n_inner": 31, "n_positions": 9, "vocab_size": 301}
    gated = GPT(gated_config(n_head=2, **sizes))
    gated.init_weights(0)
    return gated


@pytest.mark.parametrize("numerics", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_step_is_torchs_muon_for_matrices_and_torchs_adamw_for_the_rest(
    model: GPT, numerics: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    if numerics is FP32:  # PyTorch's orthogonalizes in bf16 alone
        monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    plain = PlainLoop(model, learning_rate=RATE)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    state = make_state(model, optimizer="muon")
    assert isinstance(state.rule, Muon)
    state.rule = replace(state.rule, products=numerics.torch_type)
    per_block = {"gpt2": 6, "llama": 7, "gated": 7}[model.config.architecture]
    assert plain.num_matrices == per_block * model.config.n_layer
    for gradient in gradients(state, 5):
        by_name = {name: values.clone() for name, values in state.by_parameter(gradient).items()}
        apply(state, gradient, learning_rate=RATE)
        plain.step(by_name)
        for name, values in state.model.named_parameters():
            assert plain.difference(name, values) < 1e-6, name
    for name, values in state.model.named_parameters():
        assert float((values.detach() - before[name]).abs().max()) > 1e-3, f"{name} has not moved"


@pytest.mark.parametrize("shape", [(18, 18), (18, 31), (31, 18), (1, 7), (1, 1)])
def test_an_orthogonalized_matrix__has_singular_values_of_about_one(shape: tuple[int, int]) -> None:
    matrix = 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, sizes, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalized(matrix)
    turned = u.T @ result @ v.T  # diagonal in the same basis
    assert torch.allclose(turned, turned.diag().diag(), atol=1e-4)
    well_conditioned = sizes > 0.05 * sizes.norm()
    assert ((turned.diag() > 0.6) & (turned.diag() < 1.3))[well_conditioned].all()


def test_a_matrix_of_zeros_stays_one() -> None:
    assert torch.equal(orthogonalized(torch.zeros(3, 5)), torch.zeros(3, 5))


def test_a_tiny_matrix_is_made_orthogonal_too() -> None:
    matrix = torch.zeros(3, 5)
    matrix[0, 0] = matrix[1, 1] = 1.0
    assert torch.equal(orthogonalized(matrix * 2**-23), orthogonalized(matrix))  # norm 1.7e-7


def test_an_update_of_a_matrix_is_counted_once() -> None:
    rule: Any = make_state(optimizer="muon").rule
    matrix = HiddenMatrix((3, 5), 0, (3,))
    buffers = torch.ones(15), torch.ones(15), [torch.zeros(15)]
    stretch = Stretch(*buffers, count=torch.zeros(()), decays=True, matrix=matrix)
    for _ in range(2):
        rule.update([stretch], learning_rate=RATE)
    assert stretch.count == 2


def test_query_key_and_value__of_gpt2__are_three_matrices() -> None:
    matrix = hidden_matrices(make_model().config)["transformer.h.0.attn.c_attn.weight"]
    assert matrix.piece_shapes == [(18, 18)] * 3
    values = torch.arange(18.0 * 54)
    assert torch.equal(torch.cat([*matrix.cut(values)], dim=1).flatten(), values)


def test_the_state__has_a_momentum_of_matrices_and_adamws_moments_of_the_rest() -> None:
    """So it is smaller than AdamW's, in memory and in checkpoints."""
    state = make_state(optimizer="muon")
    matrices = set(hidden_matrices(state.model.config))
    expected = {"step"}
    for name, _ in state.model.named_parameters():
        vectors = Muon.matrix_vectors if name in matrices else Muon.vectors
        expected |= {f"{vector}.{name}" for vector in vectors}
    assert set(moments(state)) == expected
    assert sum(map(len, state.vectors.values())) < 2 * state.layout.size


@pytest.mark.parametrize("num_before", [0, 3])
def test_a_restored_state_goes_on_with_the_same_bits(num_before: int) -> None:
    whole = make_state(optimizer="muon")
    steps = [*gradients(whole, 6)]
    for gradient in steps[:num_before]:
        apply(whole, gradient, learning_rate=RATE)
    resumed = make_state(optimizer="muon")
    restore(resumed, stored(moments(whole), dict(whole.model.state_dict())))
    for state in (whole, resumed):
        for gradient in steps[num_before:]:
            apply(state, gradient, learning_rate=RATE)
    assert parameter_hash(resumed.model.state_dict()) == parameter_hash(whole.model.state_dict())
    again, first = moments(resumed), moments(whole)
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_operations_and_bytes__are_counted_by_matrix() -> None:
    """Of GPT-2's 124M parameters: about 1% of a step of 0.15M tokens' 6 N D."""
    rule: Any = make_state(optimizer="muon").rule
    matrices = hidden_matrices(GPTConfig())
    total = sum(rule.flops(matrix.shape, matrix) for matrix in matrices.values())
    width = 768
    assert total == 12 * 5 * (4 * 6 * width**3 + 2 * 18 * width**3)
    assert total / (6 * 124e6 * 150_000) == pytest.approx(0.0146, rel=0.01)
    name, matrix = next(iter(matrices.items()))
    assert name.endswith("c_attn.weight")
    assert rule.bytes_moved(matrix.shape, matrix) == 34 * 4 * 3 * width**2
    in_bf16 = replace(rule, products="bfloat16").bytes_moved(matrix.shape, matrix)
    assert in_bf16 == (14 * 4 + 20 * 2) * 3 * width**2

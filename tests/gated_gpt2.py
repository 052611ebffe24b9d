"""A third architecture, for tests: GPT-2's blocks with SwiGLU, whose middle has two projections
side by side."""

from dataclasses import replace
from typing import cast

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from model.architecture import (
    ARCHITECTURES,
    GPT2,
    Architecture,
    ArchitectureName,
    Initial,
    Parameter,
)
from model.config import GPTConfig
from model.gpt import BODIES, Projection, Transformer

NAME = cast(ArchitectureName, "gated")


def _block() -> dict[str, Parameter]:
    named: dict[str, Parameter] = {}
    for name, parameter in GPT2.parameters.block.items():
        if ".c_fc." in name:
            continue
        if name == "mlp.c_proj.weight":
            for part in ("mlp.c_gate", "mlp.c_up"):
                named[f"{part}.weight"] = Parameter(("C", "F"), Initial.NORMAL)
                named[f"{part}.bias"] = Parameter(("F",), Initial.ZEROS)
        named[name] = parameter
    return named


GATED_GPT2: Architecture = replace(
    GPT2,
    name=NAME,
    activations=("swiglu",),
    parameters=replace(GPT2.parameters, prefix="decoder", block=_block()),
    stages=replace(GPT2.stages, has_gate=True),
    hf=replace(
        GPT2.hf,
        class_name="GatedGPT2LMHeadModel",
        names={name: ours for name, ours in GPT2.hf.names.items() if name != "activation_function"},
        defaults={"dropout": 0.1, "activation_function": "swiglu"},
    ),
    kernels=replace(
        GPT2.kernels,
        matrices=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_gate", "mlp.c_up"), ("mlp.c_proj",)),
    ),
)


class _GatedMLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_gate = Projection(config.n_embd, config.ffn_width)
        self.c_up = Projection(config.n_embd, config.ffn_width)
        self.c_proj = Projection(config.ffn_width, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c_proj(F.silu(self.c_gate(x)) * self.c_up(x))
        return y


class _GatedTransformer(Transformer):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        for block in self.h:
            block.mlp = _GatedMLP(config)


def add_gated_gpt2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds it to the architectures for the time of a test: its record, and its modules."""
    monkeypatch.setitem(ARCHITECTURES, NAME, GATED_GPT2)
    monkeypatch.setitem(BODIES, NAME, _GatedTransformer)


def gated_config(**values: int) -> GPTConfig:
    shape = {"vocab_size": 211, "n_positions": 64, "n_layer": 2, "n_head": 3, "n_embd": 48} | values
    return GPTConfig(
        architecture=NAME, activation_function="swiglu", initializer_range=0.1, **shape
    )

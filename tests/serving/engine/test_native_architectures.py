"""The kernels are told the architecture: a gate in the middle does not turn GPT-2's blocks into
Llama's."""

import pytest
import torch

from model.gpt import GPT
from serving.engine.native_runner import NativeRunner
from serving.engine.runner import Reading
from tests.gated_gpt2 import add_gated_gpt2, gated_config


def test_native_runner__for_gpt2s_blocks_with_swiglu__computes_the_models_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add_gated_gpt2(monkeypatch)
    model = GPT(gated_config(n_inner=70))
    model.init_weights(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    runner = NativeRunner(model.eval(), dtype="float32", num_blocks=4, threads=2)
    token_ids = [(5 * i * i + 3) % 211 for i in range(40)]
    with torch.inference_mode():
        logits = runner.logits(runner.forward([Reading(token_ids, 0, [2, 0, 3])]))
        expected = model.logits(model(torch.tensor([token_ids]))[0])
    assert (logits - expected).std() / expected.std() <= 1e-5

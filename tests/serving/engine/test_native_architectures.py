"""The kernels are told the architecture: a gate in the middle does not turn GPT-2's blocks into
Llama's. What they would leave out or do not know they refuse."""

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from cluster.settings.serve import EngineConfig
from model.architecture import ARCHITECTURES, LLAMA
from model.config import GPTConfig
from model.gpt import GPT
from model.kernels.native_library import NoNativeLibraryError
from raymill.errors import UserError
from serving.engine import native_runner
from serving.engine.native_runner import NativeRunner
from serving.engine.runner import Reading
from serving.engine_process.run_engine import build_engine
from tests.gated_gpt2 import add_gated_gpt2, gated_config


def tiny_llama() -> GPT:
    config = GPTConfig(
        architecture="llama",
        activation_function="swiglu",
        vocab_size=211,
        n_positions=64,
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        n_embd=48,
        initializer_range=0.1,
    )
    model = GPT(config)
    model.init_weights(3)
    return model.eval()


def tiny_gpt2() -> GPT:
    config = GPTConfig(vocab_size=211, n_positions=64, n_layer=2, n_head=4, n_embd=48)
    model = GPT(config)
    model.init_weights(3)
    return model.eval()


def replace_in_attention(model: GPT, name: str, *, bias: bool) -> None:
    """Replaces a projection of each block by PyTorch's own module, with widely spread biases."""
    for number, block in enumerate(model.blocks):
        attention = block.get_submodule("self_attn")
        num_out, num_in = attention.get_submodule(name).get_parameter("weight").shape
        generator = torch.Generator().manual_seed(number)
        linear = nn.Linear(num_in, num_out, bias=bias)
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.normal_(0.0, 0.3, generator=generator)
        attention.add_module(name, linear)


def error_of_logits(model: GPT) -> float:
    """Returns how far the kernels' logits are from the model's, as a share of their spread."""
    runner = NativeRunner(model, dtype="float32", num_blocks=4, threads=2)
    token_ids = [(5 * i * i + 3) % 211 for i in range(40)]
    with torch.inference_mode():
        logits = runner.logits(runner.forward([Reading(token_ids, 0, [2, 0, 3])]))
        expected = model.logits(model(torch.tensor([token_ids]))[0])
    return float((logits - expected).std() / expected.std())


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
    assert error_of_logits(model.eval()) <= 1e-5


@pytest.mark.parametrize("biased", ["q k v", "q v", "k", "o"])
def test_native_runner__for_biases_of_pytorchs_own_modules__computes_with_them(biased: str) -> None:
    model = tiny_llama()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        replace_in_attention(model, name, bias=name[0] in biased)
    assert error_of_logits(model) <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("model_of", [tiny_llama, tiny_gpt2])
def test_native_runner__for_many_tokens__has_the_bits_of_few(
    model_of: Callable[[], GPT], dtype: str
) -> None:
    """Threads share each product of few tokens, and divide many tokens among themselves."""
    runner = NativeRunner(model_of(), dtype=dtype, num_blocks=48, threads=2)
    readings = []
    for number in range(12):
        token_ids = [(5 * i * i + 3 * number) % 211 for i in range(60)]
        readings.append(Reading(token_ids, 0, list(range(4 * number, 4 * number + 4))))
    together = runner.forward(readings).clone()  # (720, C)
    alone = [runner.forward([reading]).clone() for reading in readings]
    assert torch.equal(together, torch.cat(alone))
    assert len({tuple(row) for row in together.tolist()}) > 700


def test_native_runner__for_a_parameter_that_the_kernels_do_not_read__names_it() -> None:
    model = tiny_llama()
    model.blocks[1].get_submodule("self_attn").add_module("q_norm", nn.RMSNorm(12))
    with pytest.raises(
        NoNativeLibraryError,
        match=r"cannot compute llama: they do not read model\.layers\.1\.self_attn\.q_norm\.weight",
    ):
        NativeRunner(model, dtype="float32", num_blocks=1, threads=1)


def test_native_runner__for_a_projection_of_an_unknown_class__names_it() -> None:
    """Its matrix is square: no size tells which side is which."""
    model = tiny_llama()
    model.blocks[0].get_submodule("self_attn").add_module("o_proj", nn.Embedding(48, 48))
    with pytest.raises(NoNativeLibraryError, match="do not know how Embedding stores its weight"):
        NativeRunner(model, dtype="float32", num_blocks=1, threads=1)


@pytest.mark.parametrize("kind", ["architecture", "activation", "type"])
def test_kernels__for_a_number_that_they_do_not_know__refuse_it_in_words(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    match kind:
        case "architecture":
            kernels = replace(LLAMA.kernels, number=77)
            monkeypatch.setitem(ARCHITECTURES, "llama", replace(LLAMA, kernels=kernels))
        case "activation":
            monkeypatch.setitem(native_runner.ACTIVATIONS, "swiglu", 77)
        case "type":
            monkeypatch.setitem(native_runner.KINDS, "float32", 77)
    model = tiny_llama()
    words = f"the kernels cannot compute llama: they know no {kind} of number 77"
    with pytest.raises(NoNativeLibraryError, match=words):
        NativeRunner(model, dtype="float32", num_blocks=1, threads=1)
    with pytest.raises(UserError, match=f"engine.kernels=native, but {words}"):
        build_engine(model, EngineConfig(kernels="native"), eos_id=None, threads=1)
    with caplog.at_level(logging.WARNING):
        build_engine(model, EngineConfig(), eos_id=None, threads=1)
    assert f"PyTorch computes, which is slower than the native kernels: {words}" in caplog.messages

"""Stages and weights on paper equal those of a real forward pass, and GPT-2 small is pinned."""

import math
from functools import partial

import torch

from model.config import GPTConfig, preset_fields
from model.gpt import GPT
from model.shapes import parameter_shapes, stages, weights
from tests.model.small_models import small_model

MODULES = {
    "block: LayerNorm 1": "transformer.h.0.ln_1",
    "block: query, key, value": "transformer.h.0.attn.c_attn",
    "block: projection": "transformer.h.0.attn.c_proj",
    "block: LayerNorm 2": "transformer.h.0.ln_2",
    "block: feed-forward, up": "transformer.h.0.mlp.c_fc",
    "block: feed-forward, down": "transformer.h.0.mlp.c_proj",
    "last LayerNorm": "transformer.ln_f",
}


def test_gpt2_small_is_pinned() -> None:
    found = {stage.name: stage for stage in stages(GPTConfig(), batch_size=8, seq_len=1024)}
    assert {name: (stage.shape, stage.num_bytes) for name, stage in found.items()} == {
        "token ids": ((8, 1024), 65_536),
        "embeddings": ((8, 1024, 768), 25_165_824),
        "block: LayerNorm 1": ((8, 1024, 768), 25_165_824),
        "block: query, key, value": ((8, 1024, 2304), 75_497_472),
        "block: each in heads": ((8, 12, 1024, 64), 25_165_824),
        "block: scores": ((8, 12, 1024, 1024), 402_653_184),
        "block: attention": ((8, 12, 1024, 64), 25_165_824),
        "block: projection": ((8, 1024, 768), 25_165_824),
        "block: LayerNorm 2": ((8, 1024, 768), 25_165_824),
        "block: feed-forward, up": ((8, 1024, 3072), 100_663_296),
        "block: gelu": ((8, 1024, 3072), 100_663_296),
        "block: feed-forward, down": ((8, 1024, 768), 25_165_824),
        "last LayerNorm": ((8, 1024, 768), 25_165_824),
        "logits": ((8, 1024, 50257), 1_646_821_376),
        "logits, a chunk": ((50257, 1024), 205_852_672),
        "loss": ((), 4),
    }
    assert found["block: scores"].times == 12
    assert found["logits, a chunk"].times == 8
    assert (
        sum(stage.times * math.prod(stage.shape) for stage in weights(GPTConfig())) == 124_439_808
    )


def test_whole_logits_would_take_13_gb() -> None:
    config = GPTConfig(**preset_fields({"preset": "seed"}))
    (logits,) = [s for s in stages(config, batch_size=32, seq_len=2048) if s.name == "logits"]
    assert logits.num_bytes == 32 * 2048 * 50257 * 4 > 13e9
    (scores,) = [s for s in stages(config, batch_size=1, seq_len=8) if s.name == "block: scores"]
    assert "sqrt(768)" in scores.note, "one head, as in the preset's paper"


def test_a_real_forward_pass_has_these_shapes() -> None:
    model = small_model(n_layer=2)
    seen: dict[str, tuple[int, ...]] = {}

    def note(name: str, module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        seen[name] = tuple(output.shape)

    for name, path in MODULES.items():
        model.get_submodule(path).register_forward_hook(partial(note, name))
    token_ids = torch.zeros(3, 16, dtype=torch.long)
    hidden = model.forward(token_ids)
    found = {stage.name: stage.shape for stage in stages(model.config, batch_size=3, seq_len=16)}
    assert seen == {name: found[name] for name in MODULES}
    assert found["logits"] == tuple(model.logits(hidden).shape)


def test_weights_are_the_models() -> None:
    for tied in (True, False):
        model = small_model(tie_word_embeddings=tied)
        planned = sorted(stage.shape for stage in weights(model.config) for _ in range(stage.times))
        assert planned == sorted(tuple(parameter.shape) for parameter in model.parameters())
        assert model.config.num_parameters == sum(math.prod(shape) for shape in planned)


def test_parameter_shapes_are_the_models_in_its_order() -> None:
    untied = {"preset": "tiny", "tie_word_embeddings": False, "n_inner": 100}
    for values in ({"preset": "gpt2-124m"}, {"preset": "seed"}, untied):
        config = GPTConfig(**preset_fields(values))
        with torch.device("meta"):
            named = [
                (name, tuple(parameter.shape)) for name, parameter in GPT(config).named_parameters()
            ]
        assert list(parameter_shapes(config).items()) == named

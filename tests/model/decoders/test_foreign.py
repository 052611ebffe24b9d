"""Models of transformers as decoders: loss and gradient are transformers' own, weights come from the
seed alone, and what cannot be trained exactly is refused by name."""

import json
import pickle
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from model.attention import document_positions
from model.config import shape_differences
from model.decoders.foreign import ForeignModel
from model.decoders.foreign_layer import Layer, layer_of
from model.decoders.make import initial_weights, new_decoder
from model.foreign_config import ForeignConfig, ForeignModelError
from model.generation.generate import generate
from model.generation.sampling_params import SamplingParams
from model.linear_cross_entropy import IGNORE_INDEX
from model.shapes import CHUNK_TOKENS, stages, weights
from tests.foreign_models import (
    FAMILIES,
    ON_CPUS_ALONE,
    QUICK,
    ROFORMER,
    VOCAB,
    WITHOUT_DOCUMENTS,
    small,
)

GREEDY = SamplingParams(temperature=0.0)


def each_family() -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "family",
        [
            pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
            for name in [*FAMILIES, *ON_CPUS_ALONE]
        ],
    )


def made(config: ForeignConfig, *, seed: int = 3) -> ForeignModel:
    model = ForeignModel(config)
    model.init_weights(seed)
    return model


def theirs(model: ForeignModel) -> Any:
    """Returns transformers' model with the same weights, made as its users make it."""
    values = model.config.values
    config = transformers.CONFIG_MAPPING[values["model_type"]].from_dict(values)
    twin = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = twin.load_state_dict(dict(model.named_parameters()), strict=False)
    assert set(missing) <= {"lm_head.weight"}, "a tied head has no weights of its own"
    assert not unexpected
    return twin.eval()


def rows(num_tokens: int = 17) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (2, num_tokens), generator=generator)
    return ids[:, :-1], ids[:, 1:].contiguous()


@each_family()
def test_loss_and_gradient__of_a_family__are_those_of_transformers(family: str) -> None:
    model = made(small(family)).eval()
    inputs, targets = rows()
    targets[0, :5] = IGNORE_INDEX
    loss = model.loss(inputs, targets, scale=1 / 27)
    loss.backward()

    twin = theirs(model)
    expected = F.cross_entropy(twin(input_ids=inputs).logits.flatten(0, 1), targets.flatten())
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    whole = torch.cat([parameter.grad.flatten() for parameter in twin.parameters()]).norm()
    gradients = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        difference = (parameter.grad - gradients[name].grad).norm()
        assert difference <= 1e-5 * max(gradients[name].grad.norm(), 1e-3 * whole), name


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_loss__in_chunks__is_that_of_all_logits(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(small(family)).eval()
    inputs, targets = rows()
    whole = model.loss(inputs, targets)
    whole.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr("model.decoders.foreign.CHUNK_TOKENS", 5)
    assert inputs.numel() < CHUNK_TOKENS
    in_chunks = model.loss(inputs, targets)
    in_chunks.backward()
    assert in_chunks.item() == pytest.approx(whole.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name]).norm() <= 1e-5 * gradients[name].norm(), name
    with torch.no_grad():
        assert model.loss(inputs, targets).item() == pytest.approx(whole.item(), rel=1e-6)


def test_loss__of_a_head_whose_weights_share_a_gradient__scales_each_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = made(small("qwen3"))
    head = model.lm_head
    assert isinstance(head, torch.nn.Linear)
    head.added = torch.nn.Parameter(torch.zeros(*head.weight.shape))
    monkeypatch.setattr(head, "forward", lambda x: F.linear(x, head.weight + head.added))
    inputs, targets = rows()
    model.loss(inputs, targets, scale=0.25).backward()

    weight = head.weight.detach().requires_grad_()
    logits = F.linear(model(inputs).detach(), weight)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    (expected,) = torch.autograd.grad(0.25 * loss, weight)
    for parameter in (head.weight, head.added):
        assert (parameter.grad - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("family", QUICK)
def test_initial_weights__of_a_seed__depend_on_nothing_else(family: str) -> None:
    config = small(family)
    torch.manual_seed(1)
    first = {name: values.clone() for name, values in initial_weights(config, 5)}
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = {name: values.clone() for name, values in initial_weights(config, 5)}
    assert torch.equal(torch.get_rng_state(), before), "the process's generator is as it was"
    assert first.keys() == again.keys() == config.parameter_shapes.keys()
    others = dict(initial_weights(config, 6))
    for name, values in first.items():
        assert torch.equal(values, again[name]), name
        assert values.shape == config.parameter_shapes[name]
    drawn = [name for name in first if not torch.equal(first[name], others[name])]
    assert any("embed_tokens" in name for name in drawn)
    layers = [first[f"model.layers.{number}.self_attn.q_proj.weight"] for number in range(2)]
    assert not torch.equal(*layers)
    assert layers[0].std() == pytest.approx(0.1, rel=0.1), "the model's own initializer_range"


def test_initial_weights__of_norms__are_what_the_family_says() -> None:
    assert (made(small("qwen3")).get_parameter("model.norm.weight") == 1).all()
    assert (made(small("gemma3_text")).get_parameter("model.norm.weight") == 0).all()


@each_family()
def test_documents_in_a_row__see_nothing_of_each_other(family: str) -> None:
    if family in WITHOUT_DOCUMENTS:
        return
    model = made(small(family)).eval()
    assert model.takes_positions
    inputs, _ = rows(41)
    end = 7
    inputs = inputs.masked_fill(inputs == end, 8)
    inputs[:, 22] = end
    positions = document_positions(inputs, eot_id=end)
    with torch.no_grad():
        packed = model(inputs, positions=positions)
        alone = model(inputs[:, 22:].contiguous())
    assert packed[:, 22:] == pytest.approx(alone, abs=1e-5)


def test_tied_parameters__are_adopted_in_all_places() -> None:
    model = made(small("gemma3_text"))
    assert model.lm_head.weight is model.get_parameter("model.embed_tokens.weight")
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_a_model__that_was_pickled__computes_the_same() -> None:
    model = made(small("qwen3_moe")).eval()
    inputs, targets = rows()
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied.loss(inputs, targets), model.loss(inputs, targets))


def test_generate__of_a_foreign_model__continues_as_transformers_does() -> None:
    model = made(small("qwen3")).eval()
    prompt = [5, 9, 300, 17]
    expected = theirs(model).generate(
        torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert generate(model, prompt, max_tokens=8, params=GREEDY) == expected[0, 4:].tolist()


@each_family()
def test_generate__with_the_modules_own_cache__reads_each_token_once(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(small(family)).eval()
    prompt = [5, 9, 300, 17, 8, 8, 21, 40, 3, 77]  # longer than a window of 8
    num_read: list[int] = []
    forward = ForeignModel.forward

    def counted(self: ForeignModel, token_ids: Tensor, **named: Any) -> Tensor:
        num_read.append(token_ids.shape[1])
        return forward(self, token_ids, **named)

    monkeypatch.setattr(ForeignModel, "forward", counted)
    cached = generate(model, prompt, max_tokens=12, params=GREEDY)
    assert num_read == [10] + 11 * [1]
    monkeypatch.setattr(ForeignModel, "new_cache", lambda self, num_tokens: None)
    assert generate(model, prompt, max_tokens=12, params=GREEDY) == cached
    assert num_read[12:] == [*range(10, 22)]


def test_active_parameters__of_experts__are_those_of_a_token() -> None:
    config = small("qwen3_moe")
    of_experts = sum(
        torch.Size(shape).numel()
        for name, shape in config.parameter_shapes.items()
        if ".experts." in name
    )
    assert of_experts == 3 * 4 * 3 * 32 * 48
    assert config.num_active_parameters == config.num_parameters - of_experts // 2
    embedding, attention = 301 * 48, 12 * 3 * 4 * 16 * 64
    expected = 6 * (config.num_active_parameters - embedding) + attention
    assert config.flops_per_token(64) == expected


def test_weights_and_stages__of_a_foreign_model__are_listed() -> None:
    config = small("qwen3")
    listed = weights(config)
    assert sum(row.times * row.num_bytes for row in listed) == 4 * config.num_parameters
    assert [row.times for row in listed if row.name == "model.layers.*.mlp.up_proj.weight"] == [3]
    [logits] = [
        stage for stage in stages(config, batch_size=2, seq_len=16) if stage.name == "logits"
    ]
    assert logits.shape == (2, 16, VOCAB)


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "layers.3.self_attn"),
        ("gpt_neox.layers.0.input_layernorm.bias", "layers.0.input_layernorm"),
        ("transformer.h.11.mlp.dense_h_to_4h.weight", "h.11.mlp"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("model.norm.weight", "norm"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_layer_of__a_parameter(parameter: str, layer: str) -> None:
    assert layer_of(parameter) == layer


def test_shape_differences__of_two_config_files__leave_out_what_is_not_the_models() -> None:
    config = small("qwen3")
    stored = ForeignConfig.of(config.values | {"dtype": "float32", "eos_token_id": 9})
    assert shape_differences(config, stored) == {}
    other = small("qwen3", rms_norm_eps=1e-3)
    assert shape_differences(config, other) == {"rms_norm_eps": (None, 1e-3)}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"model_type": "t5"}, "'t5' is not a decoder of text alone"),
        ({"model_type": "gemma3"}, "'gemma3' is not a decoder of text alone"),
        ({"model_type": "nope"}, "model_type is 'nope', of which transformers"),
        ({"model_type": ["qwen3"]}, "model_type is ['qwen3']"),
        ({}, "model_type is None"),
        (
            small("mixtral").values | {"output_router_logits": True},
            "output_router_logits adds a loss",
        ),
        (
            small("qwen3").values | {"quantization_config": {"bits": 4}},
            "quantization_config is set",
        ),
        ({"model_type": "opt", "layerdrop": 0.1}, "'opt': layerdrop leaves layers out at random"),
        ({"model_type": "rwkv"}, "'rwkv': rescale_every divides the stored weights too"),
        ({"model_type": "qwen3", "hidden_size": "wide"}, "config.json: "),
    ],
)
def test_a_config_file__that_cannot_be_trained_exactly__is_refused_by_name(
    values: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ForeignModelError) as refused:
        ForeignConfig.of(values)
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"model_type": "vit"}, "model_type is 'vit', of which transformers"),
        (
            small("opt").values | {"word_embed_proj_dim": 32},
            "the head of model_type 'opt' cannot be computed alone",
        ),
        (
            {"model_type": "reformer"},
            "a model of type 'reformer' cannot be made with transformers "
            f"{transformers.__version__} (AssertionError: If you want to use",
        ),
    ],
)
def test_a_module__that_raymill_cannot_take_apart__is_refused_by_name(
    values: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ForeignModelError) as refused:
        new_decoder(ForeignConfig.of(values))
    assert problem in str(refused.value)


XLSTM = {"model_type": "xlstm", "hidden_size": 48, "num_hidden_layers": 2, "num_heads": 4}


def test_new_weights__that_transformers_rule_cannot_draw__are_refused_by_name() -> None:
    """xLSTM's rule asks its head for an embedding."""
    model = ForeignModel(ForeignConfig.of(XLSTM | {"vocab_size": VOCAB}))
    with pytest.raises(ForeignModelError, match=r"'xlstm' cannot be given new weights.*embed"):
        model.init_weights(0)


def test_the_first_forward_pass__that_raises_anything__refuses_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, (inputs, targets) = made(small("qwen3")), rows()
    forward = Qwen3MLP.forward

    def raising(self: Any, x: Tensor) -> Tensor:
        raise KeyError("full_attention")

    monkeypatch.setattr(Qwen3MLP, "forward", raising)
    with pytest.raises(ForeignModelError, match=r"'qwen3' cannot be computed .*KeyError: 'full_at"):
        model.loss(inputs, targets)
    monkeypatch.setattr(Qwen3MLP, "forward", forward)
    model.loss(inputs, targets)
    monkeypatch.setattr(Qwen3MLP, "forward", raising)
    with pytest.raises(KeyError):  # of a model that has computed, it is no refusal
        model.loss(inputs, targets)


class _Several(torch.nn.Module):
    """Returns three values, as several families do."""

    def forward(self, x: Tensor, scale: float) -> tuple[Tensor, Tensor, None]:
        return scale * x, x.mean(), None


def test_a_layer__that_returns_several_values__keeps_their_places() -> None:
    layer, x = Layer(_Several()), torch.ones(2)
    y, scores, nothing = layer.as_returned(layer(x, {"scale": 3.0}))
    assert torch.equal(y, 3 * x)
    assert nothing is None
    with pytest.raises(RuntimeError, match="hand more than one tensor on"):
        y + scores
    with torch.no_grad():
        _, scores, _ = layer.as_returned(layer(x, {"scale": 3.0}))
    assert scores == 1, "without a gradient it is the value itself"


def test_what_transformers_freezes__stays_frozen() -> None:
    model = made(ForeignConfig.of(ROFORMER))
    frozen = [name for name, one in model.named_parameters() if not one.requires_grad]
    assert frozen == ["roformer.encoder.embed_positions.weight"]


def test_a_model_without_attention__has_no_heads() -> None:
    config = ForeignConfig.of({"model_type": "mamba", "num_hidden_layers": 2, "hidden_size": 48})
    assert (config.n_head, config.head_dim, config.kv_width) == (0, 0, 0)
    assert config.flops_per_token(64) > 0


def test_without_transformers__what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    values = small("qwen3", rope_theta=12345.0).values
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ForeignModelError, match=r"pip install 'transformers>="):
        ForeignConfig.of(values | {"rope_theta": 12346.0})


def test_another_version_of_transformers__is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.foreign_config.FIRST_VERSION", (5, 99))
    with pytest.raises(
        ForeignModelError, match=r"is installed, expected at least 5\.99 and below 6"
    ):
        ForeignModel(small("qwen3"))


def test_content__of_a_config_file__is_kept_as_it_is() -> None:
    values = {"model_type": "qwen3", "hidden_size": 64, "unknown": {"a": [1]}}
    config = ForeignConfig.of(values)
    assert config.values == values
    assert json.loads(config.content) == values

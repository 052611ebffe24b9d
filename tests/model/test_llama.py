"""Llama's shape: the logits and the text of transformers' LlamaForCausalLM, in folders that both
read and write."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from model.attention import attention, document_mask, document_positions
from model.config import GPTConfig
from model.cpu_ops.operations import CPU
from model.files.checkpoint import load_model
from model.files.checkpoint_folder import Metadata
from model.files.hf_config import UnsupportedModelError, config_from_hf
from model.generation.generate import generate
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from model.insight.xray import run_query
from model.operations import use_operations
from model.shapes import parameter_shapes
from model.text.tokenizer import train_bpe
from tests.checkpoints import save_model
from tests.model.small_models import small_model

LLAMA3 = {"rope_factor": 8.0, "rope_original_positions": 16, "rope_theta": 500.0}
SHAPES: list[dict[str, Any]] = [
    {},
    {"n_kv_head": 2},
    {"n_kv_head": 1, "tie_word_embeddings": False},
    {"n_kv_head": 2, "rope_factor": 4.0},
    {"n_kv_head": 2, "n_inner": 72, **LLAMA3},
    {
        "n_head": 2,
        "n_embd": 40,
        "n_layer": 3,
        "tie_word_embeddings": False,
        "layer_norm_epsilon": 1e-6,
        **LLAMA3,
    },
]
METADATA = Metadata(
    run_id="r", step=1, tokens_seen=1, data_manifest_hash="0" * 64, code_version="v"
)
GREEDY = SamplingParams(temperature=0)


def small_llama(**changes: Any) -> GPT:
    shape = {"architecture": "llama", "activation_function": "swiglu", "n_positions": 96}
    model = small_model(**(shape | changes))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):  # ones would hide a weight that is left out
            parameter.data.normal_(1.0, 0.2, generator=generator)
    return model


def check_equal(ours: GPT, theirs: LlamaForCausalLM) -> None:
    """Compares logits of whole rows, and greedy text over 64 tokens."""
    ids = torch.randint(ours.config.vocab_size, (3, 96), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, rtol=0, atol=1e-4)
    prompt = ids[:1, :9]
    text = theirs.generate(
        prompt, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, 9:]
    assert generate(ours, prompt[0].tolist(), max_tokens=64, params=GREEDY) == text.tolist()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transformers_reads_a_checkpoint_as_it_is(tmp_path: Path, shape: dict[str, Any]) -> None:
    tokenizer = train_bpe(["to be or not to be"], vocab_size=257)
    ours = small_llama(vocab_size=tokenizer.vocab_size, **shape)
    save_model(tmp_path / "c", model=ours, tokenizer=tokenizer, metadata=METADATA)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "c").eval()
    assert isinstance(theirs, LlamaForCausalLM)
    assert theirs.config.eos_token_id == tokenizer.eot_id
    check_equal(ours, theirs)
    assert load_model(tmp_path / "c").config == ours.config


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_folder_of_transformers_is_read_as_it_is(tmp_path: Path, shape: dict[str, Any]) -> None:
    config = GPTConfig(**small_llama(**shape).config.__dict__)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_factor != 1:
        rope |= {"rope_type": "linear", "factor": config.rope_factor}
    if config.rope_original_positions:
        original = config.rope_original_positions
        rope |= {"rope_type": "llama3", "original_max_position_embeddings": original}
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.n_embd,
            intermediate_size=config.ffn_width,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.n_positions,
            rms_norm_eps=config.layer_norm_epsilon,
            tie_word_embeddings=config.tie_word_embeddings,
            rope_parameters=rope,
            initializer_range=0.2,
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert ours.config.rope_factor == config.rope_factor
    check_equal(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "rope_type is yarn",
        ),
        ({"head_dim": 64}, "head_dim is 64"),
        ({"num_key_value_heads": 5}, "n_kv_head=5"),
        ({"model_type": "mistral"}, "expected 'gpt2' or 'llama'"),
    ],
)
def test_what_would_compute_something_else_is_refused_by_name(
    changes: dict[str, Any], word: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=word):
        config_from_hf(LlamaConfig().to_dict() | changes)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"activation_function": "gelu"}, "expected for llama: swiglu"),
        ({"architecture": "gpt2"}, "expected for gpt2: gelu"),
        (
            {"architecture": "gpt2", "activation_function": "relu", "n_kv_head": 2},
            "n_kv_head is a setting of",
        ),
        ({"n_kv_head": 3}, "does not divide n_head=4"),
        ({"n_head": 4, "n_embd": 36}, "even number"),
    ],
)
def test_a_shape_that_does_not_fit_together_is_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        small_llama(**changes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_counts_are_those_of_the_model(shape: dict[str, Any]) -> None:
    model = small_llama(**shape)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert list(shapes.items()) == list(parameter_shapes(model.config).items())
    assert model.config.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    multiplied = sum(
        p.numel()
        for n, p in model.named_parameters()
        if model.config.tie_word_embeddings or "embed" not in n
    )
    attention = 12 * model.config.n_layer * model.config.n_embd * 8
    assert model.config.flops_per_token(8) == 6 * multiplied + attention


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_operations_for_cpus_give_the_gradients_of_plain_ones(shape: dict[str, Any]) -> None:
    model = small_llama(**shape)
    rows = torch.randint(97, (2, 49), generator=torch.Generator().manual_seed(3))
    positions = document_positions(rows[:, :-1], eot_id=5)
    found = []
    for ops in (model.ops, CPU):
        use_operations(model, ops)
        model.zero_grad()
        model.loss(rows[:, :-1], rows[:, 1:], positions, document_mask(positions)).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-4, msg=name)


def test_an_xray_draws_the_tokens_of_generate_and_shows_each_heads_weights() -> None:
    model = small_llama(n_kv_head=2)
    query = run_query(model, [1, 2, 3, 4], max_tokens=8, params=GREEDY)
    assert query.token_ids[4:] == generate(model, [1, 2, 3, 4], max_tokens=8, params=GREEDY)
    names = {stage.name for stage in query.readings[0].stages}
    assert "token embedding" in names
    assert "position embedding" not in names
    for head in range(4):
        for length, row in enumerate(query.attention_rows(layer=1, head=head), start=1):
            assert len(row) == length
            assert float(row.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_shared_heads_on_a_cpu__have_the_bits_of_repeated_ones(
    dtype: torch.dtype, masked: bool
) -> None:
    """PyTorch's own way to share heads sums the gradients of keys and values in another order
    there."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, w = (
        torch.randn(2, 33, heads, 9, generator=generator).to(dtype) for heads in (6, 1, 1, 6)
    )
    mask = document_mask(torch.arange(33).remainder(10).expand(2, 33)) if masked else None

    def shared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, layer=0, window=None, mask=mask, dropout=0.0)

    def repeated(*values: Tensor) -> Tensor:
        parts = (part.repeat_interleave(6 // part.shape[2], 2).transpose(1, 2) for part in values)
        return F.scaled_dot_product_attention(
            *parts, attn_mask=mask, is_causal=not masked
        ).transpose(1, 2)

    results = []
    for attend in (shared, repeated):
        leaves = [part.clone().requires_grad_() for part in (q, k, v)]
        y = attend(*leaves)
        results.append([y, *torch.autograd.grad((y * w).sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

"""This package and transformers read each other's folders and compute the same logits."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
)

from model.config import GPTConfig
from model.files.checkpoint import load_decoder, load_model
from model.files.checkpoint_folder import Metadata
from model.files.hf import load_hf
from model.files.hf_config import UnsupportedModelError, read_shape, shape_from_hf
from model.files.stored_tokenizer import load_tokenizer
from model.foreign_config import ForeignConfig, ForeignModelError
from model.text.tokenizer import Tokenizer, train_bpe
from tests.checkpoints import save_model
from tests.model.small_models import small_model

METADATA = Metadata(
    run_id="r", step=1, tokens_seen=1, data_manifest_hash="0" * 64, code_version="v"
)
ACTIVATIONS = {"gelu_new": "gelu", "gelu": "gelu_exact", "relu": "relu"}


def random_hf_model(**changes: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 97,
        "n_positions": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        "initializer_range": 0.2,
    }
    model = GPT2LMHeadModel(GPT2Config(**(shape | changes))).eval()
    for parameter in model.parameters():
        # Biases and LayerNorms are constant at first
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@torch.no_grad()
def test_a_model_saved_by_transformers_gives_its_logits(
    tmp_path: Path, activation: str, *, tied: bool
) -> None:
    theirs = random_hf_model(activation_function=activation, tie_word_embeddings=tied, n_inner=80)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    token_ids = torch.randint(0, 97, (3, 48))
    torch.testing.assert_close(
        ours.logits(ours(token_ids)), theirs(token_ids).logits, rtol=0, atol=1e-4
    )
    assert ours.config.activation_function == ACTIVATIONS[activation]
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS.values())
@torch.no_grad()
def test_transformers_reads_a_checkpoint_as_it_is(
    tmp_path: Path, tokenizer: Tokenizer, activation: str, *, tied: bool
) -> None:
    ours = small_model(
        activation_function=activation,
        tie_word_embeddings=tied,
        n_inner=80,
        vocab_size=tokenizer.vocab_size,
    )
    save_model(
        tmp_path / "c",
        model=ours,
        tokenizer=tokenizer,
        metadata=METADATA,
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "c").eval()
    token_ids = torch.randint(0, tokenizer.vocab_size, (3, 48))
    torch.testing.assert_close(
        theirs(token_ids).logits, ours.logits(ours(token_ids)), rtol=0, atol=1e-4
    )
    assert theirs.config.eos_token_id == tokenizer.eot_id
    assert (theirs.lm_head.weight is theirs.transformer.wte.weight) == tied


@pytest.mark.parametrize("normalize", [(), ("lowercase", "collapse_spaces")])
def test_transformers_reads_the_tokenizer_as_it_is(
    tmp_path: Path, corpus: list[str], normalize: tuple[str, ...]
) -> None:
    tokenizer = train_bpe(corpus[:3], vocab_size=400, normalize=normalize)
    model = small_model(vocab_size=tokenizer.vocab_size)
    save_model(
        tmp_path / "c",
        model=model,
        tokenizer=tokenizer,
        metadata=METADATA,
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path / "c")
    for text in ("Hello  World, naïve 東京", corpus[4]):
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert theirs.eos_token_id == tokenizer.eot_id
    assert theirs.model_max_length == model.config.n_positions


@torch.no_grad()
def test_older_files_without_prefix_and_with_mask_buffers_load(tmp_path: Path) -> None:
    theirs = random_hf_model()
    theirs.save_pretrained(tmp_path)
    bare = {
        name.removeprefix("transformer."): tensor
        for name, tensor in theirs.transformer.state_dict().items()
    }
    bare["h.0.attn.bias"] = torch.ones(1, 1, 48, 48)
    bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    bare["lm_head.weight"] = bare["wte.weight"].clone()
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, token_ids = load_hf(tmp_path), torch.randint(0, 97, (1, 20))
    torch.testing.assert_close(
        ours.logits(ours(token_ids)), theirs(token_ids).logits, rtol=0, atol=1e-4
    )
    bare["lm_head.weight"] += 1
    save_file(bare, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"lm_head\.weight differs"):
        load_hf(tmp_path)


@torch.no_grad()
def test_sharded_weights_load(tmp_path: Path) -> None:
    theirs = random_hf_model()
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours, token_ids = load_hf(tmp_path), torch.randint(0, 97, (1, 20))
    torch.testing.assert_close(
        ours.logits(ours(token_ids)), theirs(token_ids).logits, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"activation_function": "silu"}, "activation_function is 'silu'"),
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"n_head": 5}, "n_head=5 does not divide n_embd=32"),
        ({"n_inner": 64}, r"c_fc\.bias has shape \(128,\), config\.json makes it \(64,\)"),
        ({"n_layer": 3}, r"transformer\.h\.2\.attn\.c_attn\.bias has shape none \(it is missing\)"),
        ({"n_layer": 1}, r"transformer\.h\.1\.attn\.c_attn\.bias .* none \(it is unknown\)"),
    ],
)
def test_what_would_compute_something_else_is_refused_by_name(
    tmp_path: Path, change: dict[str, object], named: str
) -> None:
    random_hf_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnsupportedModelError, match=named):
        load_model(tmp_path)


LLAMA_BEYOND_OURS = [
    ({"attention_bias": True}, "attention_bias is True"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"hidden_act": "gelu"}, "hidden_act is gelu"),
    (
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        "rope_type is yarn",
    ),
]


@pytest.mark.parametrize(("changes", "named"), LLAMA_BEYOND_OURS)
@torch.no_grad()
def test_a_llama_that_our_own_code_does_not_compute_is_transformers(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    size |= {"intermediate_size": 48, "vocab_size": 97, "max_position_embeddings": 64}
    theirs = AutoModelForCausalLM.from_config(LlamaConfig(**size, **changes)).eval()
    theirs.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    assert isinstance(shape, ForeignConfig) and shape.model_type == "llama"
    model, token_ids = load_decoder(tmp_path), torch.randint(0, 97, (2, 40))
    torch.testing.assert_close(
        model.logits(model(token_ids)), theirs(token_ids).logits, rtol=0, atol=1e-5
    )
    with pytest.raises(UnsupportedModelError, match=rf"{named}.*set engine\.backend to vllm"):
        load_model(tmp_path)


def test_a_llama_that_our_own_code_computes_stays_ours(tmp_path: Path) -> None:
    plain = LlamaConfig(num_hidden_layers=2).to_dict()
    assert isinstance(shape_from_hf(plain), GPTConfig)
    with pytest.raises(UnsupportedModelError, match="n_head=5 does not divide"):
        shape_from_hf(
            plain | {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": None}
        )


def test_without_transformers_such_a_llama_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = LlamaConfig().to_dict() | {"attention_bias": True, "rope_theta": 12345.0}
    monkeypatch.setitem(sys.modules, "transformers", None)
    expected = r"attention_bias is True, .* only False; .*pip install 'transformers>="
    with pytest.raises(ForeignModelError, match=expected):
        shape_from_hf(values)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    random_hf_model().save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match=r"pytorch_model\.bin is a pickle"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_cut_short_is_said(tmp_path: Path, name: str) -> None:
    random_hf_model().save_pretrained(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UnsupportedModelError, match="damaged"):
        load_model(tmp_path)

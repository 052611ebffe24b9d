"""Hugging Face's GPT-2 format: config.json to and from `GPTConfig`, and loading a folder that transformers saved."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.config import Activation, GPTConfig
from model.errors import UserError
from model.gpt import GPT
from model.tokenizer import END_OF_TEXT

_SIZES = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd", "n_inner")
_SAME_NAMES = (*_SIZES, "tie_word_embeddings", "layer_norm_epsilon", "initializer_range")

# `gelu_new` and `gelu_pytorch_tanh` are two names of one formula.
ACTIVATION_FROM_HF: dict[str, Activation] = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
}
ACTIVATION_TO_HF: dict[Activation, str] = {"gelu": "gelu_new", "gelu_exact": "gelu", "relu": "relu"}

# Settings that change what the network computes and that `GPT` does not have, with the only value that fits it.
FIXED_SETTINGS: dict[str, Any] = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


class UnsupportedModelError(UserError):
    """A Hugging Face folder holds no GPT-2 that this package can compute exactly."""


def config_to_hf(config: GPTConfig, *, eot_id: int) -> dict[str, Any]:
    """Returns the content of config.json."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{name: getattr(config, name) for name in _SIZES},
        "activation_function": ACTIVATION_TO_HF[config.activation_function],
        "tie_word_embeddings": config.tie_word_embeddings,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_range": config.initializer_range,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "dtype": "float32",
        **FIXED_SETTINGS,
    }


def tokenizer_config_to_hf(config: GPTConfig) -> dict[str, Any]:
    """Returns the content of tokenizer_config.json: use tokenizer.json as it is, normalizer included."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.n_positions,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }


def config_from_hf(values: dict[str, Any]) -> GPTConfig:
    """Returns the `GPTConfig` of a config.json. Missing keys have GPT-2's defaults on both sides, except dropout: there
    it is three settings, 0.1 by default; ours is `resid_pdrop`, which only further training would use.

    Raises `UnsupportedModelError`, naming the setting, where `GPT` would compute something else.
    """
    if values.get("model_type") != "gpt2":
        raise UnsupportedModelError(f"config.json: model_type is {values.get('model_type')!r}, expected 'gpt2'")
    for name, expected in FIXED_SETTINGS.items():
        if values.get(name, expected) != expected:
            raise UnsupportedModelError(
                f"config.json: {name} is {values[name]}, only {expected} is supported: the logits would be wrong"
            )
    activation = values.get("activation_function", "gelu_new")
    if activation not in ACTIVATION_FROM_HF:
        raise UnsupportedModelError(
            f"config.json: activation_function is {activation!r}, expected one of {', '.join(ACTIVATION_FROM_HF)}"
        )
    try:
        return GPTConfig(
            activation_function=ACTIVATION_FROM_HF[activation],
            dropout=values.get("resid_pdrop", 0.1),
            **{name: values[name] for name in _SAME_NAMES if name in values},
        )
    except ValueError as error:
        raise UnsupportedModelError(f"config.json: {error}") from error


def load_hf(folder: Path) -> GPT:
    """Returns the model of a folder that `save_pretrained` wrote, in evaluation mode and in the stored dtype.

    Raises `UnsupportedModelError` for another architecture, pickled weights, missing or unexpected parameters.
    """
    try:
        config = config_from_hf(json.loads((folder / "config.json").read_bytes()))
        weights = read_weights(folder)
    except (ValueError, SafetensorError) as error:
        raise UnsupportedModelError(f"{folder}: config.json or the weights are damaged: {error}") from error
    return build_model(config, normalize_names(weights, config), source=folder)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Returns every tensor of model.safetensors, or of the shards that its index names."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return load_file(whole)
    if index.exists():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return {name: tensor for shard in shards for name, tensor in load_file(folder / shard).items()}
    if pickled := sorted(path.name for path in folder.glob("*.bin")):
        raise UnsupportedModelError(
            f"{folder}: {pickled[0]} is a pickle, which can run code when it is loaded; "
            "save the model with transformers' save_pretrained(…, safe_serialization=True) and use that folder"
        )
    raise UnsupportedModelError(f"{folder}: has neither model.safetensors nor model.safetensors.index.json")


def normalize_names(weights: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Returns the weights under `GPT`'s names: older files lack the prefix `transformer.`, store the causal mask as a
    buffer (`attn.bias`, `attn.masked_bias`), and repeat a tied head."""
    named = {
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
        for name, tensor in weights.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    if config.tie_word_embeddings:
        head = named.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, named["transformer.wte.weight"]):
            raise UnsupportedModelError(
                "lm_head.weight differs from transformer.wte.weight, but config.json says tie_word_embeddings: true; "
                "set it to false"
            )
    return named


def build_model(config: GPTConfig, weights: dict[str, Tensor], *, source: Path) -> GPT:
    """Returns a `GPT` that adopts the tensors themselves, so that they are in memory only once."""
    with torch.device("meta"):
        model = GPT(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UnsupportedModelError(
                f"{source}: parameter {name} has shape {found.get(name, 'none (it is missing)')}, "
                f"config.json makes it {expected.get(name, 'none (it is unknown)')}"
            )
    model.load_state_dict(weights, assign=True)
    # Adopted tensors require no gradient; a parameter of the model does.
    return model.requires_grad_(True).eval()

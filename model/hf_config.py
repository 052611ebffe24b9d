"""Hugging Face's config.json of a GPT-2 or a Llama, to and from `GPTConfig`. This module does not import PyTorch."""

from pathlib import Path
from typing import Any

from model.checkpoint_folder import read_json
from model.config import Activation, GPTConfig
from model.errors import UserError
from model.tables import read_table

_TABLE = read_table(__file__, "hf_config")
_GPT2, _LLAMA = _TABLE["gpt2"], _TABLE["llama"]
ACTIVATION_FROM_HF: dict[str, Activation] = _TABLE["activation"]
ACTIVATION_TO_HF: dict[Activation, str] = {ours: name for name, ours in reversed(ACTIVATION_FROM_HF.items())}


class UnsupportedModelError(UserError):
    """A Hugging Face folder holds no GPT-2 and no Llama that this package can compute exactly."""


def config_to_hf(config: GPTConfig, *, start_id: int, end_ids: list[int]) -> dict[str, Any]:
    """Returns the content of config.json; `end_ids` end what is generated."""
    ends = {"bos_token_id": start_id, "eos_token_id": end_ids[0] if len(end_ids) == 1 else end_ids}
    if config.architecture == "llama":
        same = {name: getattr(config, ours) for name, ours in _LLAMA["names"].items()}
        sizes = {"intermediate_size": config.ffn_width, "num_key_value_heads": config.num_kv_heads}
        return _LLAMA["config"] | same | sizes | _rope_to_hf(config) | ends | _LLAMA["fixed"]
    return {
        **_GPT2["config"],
        **{name: getattr(config, name) for name in _GPT2["same_names"]},
        "activation_function": ACTIVATION_TO_HF[config.activation_function],
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        **ends,
        **_GPT2["fixed"],
    }


def _rope_to_hf(config: GPTConfig) -> dict[str, Any]:
    scaling: dict[str, Any] | None = None
    if config.rope_original_positions is not None:
        original = {"original_max_position_embeddings": config.rope_original_positions}
        scaling = {"rope_type": "llama3", "factor": config.rope_factor} | original | _LLAMA["rope"]
    elif config.rope_factor != 1.0:
        scaling = {"rope_type": "linear", "factor": config.rope_factor}
    return {"head_dim": config.head_dim, "rope_theta": config.rope_theta, "rope_scaling": scaling}


def tokenizer_config_to_hf(config: GPTConfig, **tokens: str | None) -> dict[str, Any]:
    """Returns the content of tokenizer_config.json, with its special `tokens` and perhaps a chat template."""
    return {**_TABLE["tokenizer"], "model_max_length": config.n_positions, **tokens}


def config_from_hf(values: dict[str, Any]) -> GPTConfig:
    """Returns the `GPTConfig` of a config.json. Missing keys have Hugging Face's defaults. GPT-2's dropout is three
    settings there, 0.1 by default; ours is `resid_pdrop`, which only further training would use.

    Raises `UnsupportedModelError`, naming the setting, where `GPT` would compute something else.
    """
    kind = values.get("model_type")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(f"config.json: model_type is {kind!r}, expected 'gpt2' or 'llama'")
    for name, expected in _TABLE[kind]["fixed"].items():
        _expect(name, values.get(name, expected), expected)
    try:
        return _gpt2_from_hf(values) if kind == "gpt2" else _llama_from_hf(values)
    except ValueError as error:
        raise UnsupportedModelError(f"config.json: {error}") from error


def _expect(name: str, value: Any, *expected: Any) -> None:
    if value not in expected:
        only = " or ".join(map(str, expected))
        raise UnsupportedModelError(
            f"config.json: {name} is {value}, only {only} is supported: the logits would be wrong"
        )


def _gpt2_from_hf(values: dict[str, Any]) -> GPTConfig:
    activation = values.get("activation_function", "gelu_new")
    if activation not in ACTIVATION_FROM_HF:
        raise UnsupportedModelError(
            f"config.json: activation_function is {activation!r}, expected one of {', '.join(ACTIVATION_FROM_HF)}"
        )
    return GPTConfig(
        activation_function=ACTIVATION_FROM_HF[activation],
        dropout=values.get("resid_pdrop", 0.1),
        **{name: values[name] for name in _GPT2["same_names"] if name in values},
    )


def _llama_from_hf(values: dict[str, Any]) -> GPTConfig:
    found = {ours: values[name] for name, ours in _LLAMA["names"].items() if name in values}
    rope = values.get("rope_scaling") or {}
    rope = {"rope_theta": values.get("rope_theta", 10000.0)} | rope | (values.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    _expect("rope_type", kind, "default", "linear", "llama3")
    found["rope_theta"], found["rope_factor"] = rope["rope_theta"], 1.0 if kind == "default" else rope["factor"]
    if kind == "llama3":
        for name, expected in _LLAMA["rope"].items():
            _expect(name, rope.get(name), expected)
        found["rope_original_positions"] = rope["original_max_position_embeddings"]
    config = GPTConfig(architecture="llama", activation_function="swiglu", **(_LLAMA["defaults"] | found))
    _expect("head_dim", values.get("head_dim") or config.head_dim, config.head_dim)
    return config


def read_config(folder: Path) -> GPTConfig:
    return config_from_hf(read_json(folder / "config.json"))

"""Hugging Face's config.json of a GPT-2, to and from `GPTConfig`. This module does not import PyTorch."""

from pathlib import Path
from typing import Any

from model.checkpoint_folder import read_json
from model.config import Activation, GPTConfig
from model.errors import UserError
from model.tables import read_table
from model.tokenizer import END_OF_TEXT

_TABLE = read_table(__file__, "hf_config")
_SAME_NAMES: list[str] = _TABLE["same_names"]
ACTIVATION_FROM_HF: dict[str, Activation] = _TABLE["activation"]
ACTIVATION_TO_HF: dict[Activation, str] = {ours: name for name, ours in reversed(ACTIVATION_FROM_HF.items())}
FIXED_SETTINGS: dict[str, Any] = _TABLE["fixed"]


class UnsupportedModelError(UserError):
    """A Hugging Face folder holds no GPT-2 that this package can compute exactly."""


def config_to_hf(config: GPTConfig, *, eot_id: int) -> dict[str, Any]:
    """Returns the content of config.json."""
    return {
        **_TABLE["config"],
        **{name: getattr(config, name) for name in _SAME_NAMES},
        "activation_function": ACTIVATION_TO_HF[config.activation_function],
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), eot_id),
        **FIXED_SETTINGS,
    }


def tokenizer_config_to_hf(config: GPTConfig) -> dict[str, Any]:
    """Returns the content of tokenizer_config.json."""
    ends = dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT)
    return {**_TABLE["tokenizer"], "model_max_length": config.n_positions, **ends}


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


def read_config(folder: Path) -> GPTConfig:
    return config_from_hf(read_json(folder / "config.json"))

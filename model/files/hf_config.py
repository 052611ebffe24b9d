"""Hugging Face's config.json, to and from the shape of a model. This module does not import
PyTorch."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, assert_never

from model.adapters.lora import Adapter
from model.architecture import ARCHITECTURES, Activation, Architecture
from model.config import GPTConfig, Shape
from model.files.checkpoint_folder import ADAPTER_CONFIG, StoredModel, read_json
from model.foreign_config import ForeignConfig, ForeignModelError
from raymill.errors import CheckpointError, UserError

_ACTIVATIONS: tuple[tuple[str, Activation], ...] = (
    ("gelu_new", "gelu"),
    ("gelu_pytorch_tanh", "gelu"),
    ("gelu", "gelu_exact"),
    ("relu", "relu"),
)
"""Ours by Hugging Face's name; of two names of one formula first the one that we write."""

ACTIVATION_FROM_HF: dict[str, Activation] = dict(_ACTIVATIONS)
ACTIVATION_TO_HF: dict[Activation, str] = {ours: name for name, ours in reversed(_ACTIVATIONS)}

_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""The values of Llama 3's scaling of positions, which has no others."""


class UnsupportedModelError(UserError):
    """A Hugging Face folder holds no GPT-2 and no Llama that this package can compute exactly."""


class OtherShapeError(UnsupportedModelError):
    """A GPT-2 or a Llama has a setting that `GPT` does not compute, and transformers does."""


def config_to_hf(config: Shape, *, start_id: int, end_ids: list[int]) -> dict[str, Any]:
    """Returns the content of config.json; `end_ids` end an answer. A model of transformers keeps
    its own content, with the module's name, the tokenizer's ids and the type in which weights are
    stored."""
    ends = end_ids[0] if len(end_ids) == 1 else end_ids
    match config:
        case GPTConfig():
            return _own_config_to_hf(config, start_id=start_id, ends=ends)
        case ForeignConfig():
            values = {"architectures": [config.class_name]} | config.values
            values.pop("torch_dtype", None)  # as the type was called
            return values | {"dtype": "float32", "bos_token_id": start_id, "eos_token_id": ends}
        case _:
            assert_never(config)


def _own_config_to_hf(config: GPTConfig, *, start_id: int, ends: int | list[int]) -> dict[str, Any]:
    hf = config.network.hf
    values: dict[str, Any] = {
        "architectures": [hf.class_name],
        "model_type": config.architecture,
        "dtype": "float32",
    }
    values |= {name: _value_to_hf(config, ours) for name, ours in (hf.names | hf.copies).items()}
    if config.network.has_rotation:
        values |= _rope_to_hf(config)
    values |= {"bos_token_id": start_id, "eos_token_id": ends}
    return values | hf.fixed


def _value_to_hf(config: GPTConfig, name: str) -> Any:
    value = getattr(config, name)
    return ACTIVATION_TO_HF[value] if name == "activation_function" else value


def _rope_to_hf(config: GPTConfig) -> dict[str, Any]:
    scaling: dict[str, Any] | None = None
    if config.rope_original_positions is not None:
        original = {"original_max_position_embeddings": config.rope_original_positions}
        scaling = {"rope_type": "llama3", "factor": config.rope_factor} | original | _LLAMA3_ROPE
    elif config.rope_factor != 1.0:
        scaling = {"rope_type": "linear", "factor": config.rope_factor}
    return {"head_dim": config.head_dim, "rope_theta": config.rope_theta, "rope_scaling": scaling}


def tokenizer_config_to_hf(config: Shape, **tokens: str | None) -> dict[str, Any]:
    """Returns the content of tokenizer_config.json, with its special `tokens` and perhaps a chat
    template."""
    return {
        # Uses tokenizer.json as it is, normalizer included
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.n_positions,
        **tokens,
    }


def config_from_hf(values: dict[str, Any]) -> GPTConfig:
    """Returns the `GPTConfig` of a config.json. Missing keys have Hugging Face's defaults. GPT-2's
    dropout is three settings there, 0.1 by default; ours is `resid_pdrop`, which only further
    training would use.

    Raises `OtherShapeError`, naming the setting, where `GPT` would compute something else, and
    `UnsupportedModelError` for what is no model.
    """
    kind = values.get("model_type")
    if kind not in list(ARCHITECTURES):  # a file may hold a list, which has no hash
        expected = " or ".join(map(repr, ARCHITECTURES))
        raise UnsupportedModelError(f"config.json: model_type is {kind!r}, expected {expected}")
    network = ARCHITECTURES[kind]
    for name, fixed in network.hf.fixed.items():
        _expect(name, values.get(name, fixed), fixed)
    try:
        return _from_hf(values, network)
    except ValueError as error:
        raise UnsupportedModelError(f"config.json: {error}") from error


def _expect(name: str, value: Any, *expected: Any) -> None:
    if value not in expected:
        only = " or ".join(map(str, expected))
        raise OtherShapeError(
            f"config.json: {name} is {value}, raymill's own code computes only {only}"
        )


def _from_hf(values: dict[str, Any], network: Architecture) -> GPTConfig:
    settings = dict(network.hf.defaults)
    for name, ours in network.hf.names.items():
        if name in values:
            settings[ours] = values[name]
    if "activation_function" in network.hf.names:
        settings["activation_function"] = _activation_from_hf(
            values.get("activation_function", "gelu_new")
        )
    if network.has_rotation:
        settings |= _rope_from_hf(values)
    config = GPTConfig(architecture=network.name, **settings)
    if network.has_rotation:
        _expect("head_dim", values.get("head_dim") or config.head_dim, config.head_dim)
    return config


def _activation_from_hf(name: Any) -> Activation:
    if name not in list(ACTIVATION_FROM_HF):
        raise OtherShapeError(
            f"config.json: activation_function is {name!r}, raymill's own code computes only "
            f"{', '.join(ACTIVATION_FROM_HF)}"
        )
    return ACTIVATION_FROM_HF[name]


def _rope_from_hf(values: dict[str, Any]) -> dict[str, Any]:
    rope = values.get("rope_scaling") or {}
    rope = (
        {"rope_theta": values.get("rope_theta", 10000.0)}
        | rope
        | (values.get("rope_parameters") or {})
    )
    kind = rope.get("rope_type", rope.get("type", "default"))
    _expect("rope_type", kind, "default", "linear", "llama3")
    settings = {
        "rope_theta": rope["rope_theta"],
        "rope_factor": 1.0 if kind == "default" else rope["factor"],
    }
    if kind == "llama3":
        for name, expected in _LLAMA3_ROPE.items():
            _expect(name, rope.get(name), expected)
        settings["rope_original_positions"] = rope["original_max_position_embeddings"]
    return settings


def read_config(folder: Path) -> GPTConfig:
    """Returns the shape of a GPT-2 or a Llama. Raises `UnsupportedModelError` for others."""
    return config_from_hf(read_json(folder / "config.json"))


def require_own_shape(folder: Path) -> None:
    """Raises `UnsupportedModelError` for a model that transformers computes and `GPT` does not. What
    else is wrong with the folder is said when it is loaded."""
    if StoredModel(folder).is_adapter:
        raise UnsupportedModelError(
            f"{folder} is an adapter, and raymill's own engine computes whole models: `raymill export --merge` makes "
            "one; vLLM serves adapters beside their base (engine.backend vllm)"
        )
    with suppress(CheckpointError):
        if reason := _why_not_own(read_json(folder / "config.json")):
            raise UnsupportedModelError(
                f"{reason}. vLLM serves others: set engine.backend to vllm, and engine.vllm_python to the Python of an "
                "environment that has it (pip install vllm)"
            )


def _why_not_own(values: dict[str, Any]) -> str:
    """Returns why `GPT` does not compute a config.json; empty where it does, or nobody would."""
    kind = values.get("model_type")
    if kind not in list(ARCHITECTURES):
        expected = " or ".join(map(repr, ARCHITECTURES))
        return f"config.json: model_type is {kind!r}, raymill's own code computes {expected}"
    with suppress(UnsupportedModelError):
        try:
            config_from_hf(values)
        except OtherShapeError as error:
            return str(error)
    return ""


def shape_from_hf(values: dict[str, Any]) -> Shape:
    """Returns the shape of any config.json: `GPTConfig` where `GPT` computes it, else the shape of
    transformers' module. Raises `UnsupportedModelError` or `ForeignModelError`."""
    if values.get("model_type") not in list(ARCHITECTURES):
        return ForeignConfig.of(values)
    try:
        return config_from_hf(values)
    except OtherShapeError as other:
        try:
            return ForeignConfig.of(values)
        except ForeignModelError as error:
            raise ForeignModelError(f"{other}; transformers instead: {error}") from None


def linear_layer_names(folder: Path) -> tuple[str, ...]:
    """Returns the last names of the linear layers in the blocks of the model in a folder, as an
    adapter has them. Needs transformers."""
    shape = ForeignConfig.of(read_json(folder / "config.json"))
    adapter = shape.with_adapter(Adapter(1, 1, ())).adapter
    assert adapter is not None
    return adapter.targets


def read_shape(folder: Path) -> Shape:
    """Returns the shape of the model in a folder, as `shape_from_hf` does; with an adapter, the
    shape of transformers' module for it."""
    values = read_json(folder / "config.json")
    if not StoredModel(folder).is_adapter:
        return shape_from_hf(values)
    adapter = Adapter.from_peft(read_json(folder / ADAPTER_CONFIG))
    return replace(ForeignConfig.of(values), adapter=adapter)

"""Writes a model as one GGUF file, the format of llama.cpp and of the tools built on it.

The library `gguf` has the names. How weights lie in the file is llama.cpp's: matrices are
(out, in), and where rotary positions turn neighbors instead of halves, the rows of
queries and keys are interleaved. Values stay fp32; `llama-quantize` makes smaller ones.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import numpy.typing as npt
from torch import Tensor

from model.architecture import GgufLayout
from model.config import GPTConfig, Shape
from model.files.hf_config import config_to_hf
from model.foreign_config import ForeignConfig
from model.tables import pip_line
from model.text.bulk_encoder import known_pieces
from model.text.tokenizer import Tokenizer
from raymill.errors import UserError

Array = npt.NDArray[np.float32]


class GgufError(UserError):
    """The library is missing, or GGUF has no place for something of this model."""


_OF_TRANSFORMERS = {"qwen2": GgufLayout(), "qwen3": GgufLayout()}
"""By model_type."""

_PIECES = {"gpt-2": "gpt-2", "qwen": "qwen2", "gpt-4": "llama-bpe", "gpt-4o": "gpt-4o"}
"""llama.cpp's word for a tokenizer's pattern."""


def write_gguf(
    path: Path, *, name: str, shape: Shape, weights: Mapping[str, Tensor], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Writes the file, reads it back, and returns its figures. Raises `GgufError`."""
    gguf = _library()
    kind, values, layout = _described(shape)
    tensors = {
        _name_in(gguf, kind, parameter, num_layers=shape.n_layer): _laid_out(
            parameter, tensor, layout, shape
        )
        for parameter, tensor in weights.items()
    }
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_shape(writer, shape, values, layout)
    _add_tokenizer(gguf, writer, tokenizer, num_rows=shape.vocab_size)
    for tensor_name, array in tensors.items():
        writer.add_tensor(tensor_name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _check(gguf, path, tensors)
    return {"architecture": kind, "tensors": len(tensors), "bytes": path.stat().st_size}


def _library() -> Any:
    try:
        import gguf  # noqa: PLC0415 (optional)
    except ImportError as error:
        raise GgufError(
            f"GGUF is written by the library gguf, which is not installed ({error}): `{pip_line('gguf')}`"
        ) from None
    return gguf


def _described(shape: Shape) -> tuple[str, dict[str, Any], GgufLayout]:
    """Returns the model_type, what config.json says with all defaults, and how it is stored. Raises
    `GgufError`."""
    match shape:
        case GPTConfig():
            kind: str = shape.architecture
            values, layout = config_to_hf(shape, start_id=0, end_ids=[0]), shape.network.gguf
            if shape.activation_function != layout.activation:
                raise GgufError(
                    f"activation_function is {shape.activation_function}, llama.cpp computes this architecture with "
                    f"{layout.activation} alone"
                )
        case ForeignConfig():
            kind, values = shape.model_type, shape.hf.to_dict()
            if kind not in _OF_TRANSFORMERS:
                raise GgufError(
                    f"a model of type {kind!r} is not written as GGUF where transformers computes it; expected one of "
                    f"{', '.join(_OF_TRANSFORMERS)}, or a shape of raymill's own code"
                )
            layout = _OF_TRANSFORMERS[kind]
        case _:
            assert_never(shape)
    _refuse(values, layout)
    return kind, values, layout


def _refuse(values: Mapping[str, Any], layout: GgufLayout) -> None:
    """Raises `GgufError` for what llama.cpp would compute otherwise."""
    if values.get("use_sliding_window"):
        raise GgufError("use_sliding_window is set, which llama.cpp does not compute here")
    turning = _rotation(values).get("rope_type", "default")
    if layout.has_rotation and turning not in ("default", "linear"):
        raise GgufError(f"rope_type is {turning}, written as GGUF are default and linear")


def _rotation(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope_theta": values.get("rope_theta")} | (
        values.get("rope_parameters") or values.get("rope_scaling") or {}
    )


def _name_in(gguf: Any, kind: str, parameter: str, *, num_layers: int) -> str:
    """Returns llama.cpp's name of a parameter. Raises `GgufError`."""
    architectures = {word: number for number, word in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[kind], num_layers)
    name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise GgufError(f"GGUF has no place for the parameter {parameter} of a {kind}")
    return str(name)


def _laid_out(parameter: str, tensor: Tensor, layout: GgufLayout, shape: Shape) -> Array:
    array: Array = tensor.detach().float().numpy()
    if layout.transposed and parameter.endswith(layout.transposed):
        return np.ascontiguousarray(array.T)
    if not layout.turns_neighbors:
        return array
    if parameter.endswith("q_proj.weight"):
        return _neighbors(array, num_heads=shape.n_head)
    if parameter.endswith("k_proj.weight"):
        return _neighbors(array, num_heads=shape.num_kv_heads)
    return array


def _neighbors(rows: Array, *, num_heads: int) -> Array:
    """Returns the rows of a projection (H x D, C) so that those which rotary positions turn
    together, at distance D / 2 here, are neighbors."""
    halves = rows.reshape(num_heads, 2, -1, rows.shape[-1])  # (H, 2, D / 2, C)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _add_shape(writer: Any, shape: Shape, values: Mapping[str, Any], layout: GgufLayout) -> None:
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(shape.n_positions)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.ffn_width)
    writer.add_head_count(shape.n_head)
    if not layout.has_rotation:
        writer.add_layer_norm_eps(values["layer_norm_epsilon"])
        return
    turning = _rotation(values)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(float(turning["rope_theta"]))
    if turning.get("rope_type") == "linear":
        writer.add_rope_scaling_type(_library().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(turning["factor"]))
    writer.add_layer_norm_rms_eps(values["rms_norm_eps"])


def _add_tokenizer(gguf: Any, writer: Any, tokenizer: Tokenizer, *, num_rows: int) -> None:
    """Writes the vocabulary, with names for rows of the embedding that have no token. Raises
    `GgufError` for a tokenizer whose ids llama.cpp would not make."""
    content = json.loads(tokenizer.backend.to_str())
    pieces = known_pieces(content["pre_tokenizer"]) if tokenizer.is_byte_level else None
    normalizer = (content["normalizer"] or {}).get("type", "NFC")
    if pieces is None or content["model"]["type"] != "BPE" or normalizer != "NFC":
        raise GgufError(
            "the tokenizer is not byte-level BPE with GPT-2's, GPT-4's, GPT-4o's or Qwen's pattern, of which alone "
            "llama.cpp makes the same ids"
        )
    added = {token["id"]: token["special"] for token in content["added_tokens"]}
    tokens: list[str] = []
    kinds: list[Any] = []
    for token_id in range(num_rows):
        token = tokenizer.backend.id_to_token(token_id)
        tokens.append(f"[PAD{token_id}]" if token is None else token)
        if token is None:
            kinds.append(gguf.TokenType.UNUSED)
        elif token_id in added:
            is_special = added[token_id]
            kinds.append(gguf.TokenType.CONTROL if is_special else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_PIECES[pieces])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.start_id)
    writer.add_eos_token_id(tokenizer.eot_id)
    writer.add_add_bos_token(tokenizer.bos_id is not None)
    if tokenizer.chat is not None:
        writer.add_chat_template(tokenizer.chat.chat_template)


def _check(gguf: Any, path: Path, tensors: Mapping[str, Array]) -> None:
    """Reads the file back. Raises `GgufError` where it does not hold what was written."""
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    for name in stored.keys() | tensors.keys():
        if name not in stored or not np.array_equal(stored[name], tensors[name]):
            raise GgufError(
                f"{path}: {name} is not what was written; check the disk, and export again"
            )

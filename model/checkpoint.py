"""The checkpoint format: one folder, hashed, complete or absent, which Hugging Face's transformers can read.

The folder is written beside its final place and renamed into it. Nothing is pickled. README.md lists its files.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.checkpoint_folder import (
    FORMAT_VERSION,
    MANIFEST,
    TRAIN_STATE,
    CheckpointError,
    Metadata,
    is_hf_folder,
    verify_checkpoint,
)
from model.config import GPTConfig
from model.durable_files import move_into_place, sync, write_file
from model.failpoints import failpoint
from model.gpt import GPT
from model.hf import build_model, load_hf
from model.hf_config import config_to_hf, read_config, tokenizer_config_to_hf
from model.tokenizer import Tokenizer

_PIECE_BYTES = 8 << 20
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}


class NotFiniteError(CheckpointError):
    """Weights or moments are not finite. They are never written, as no training recovers from them."""


def parameter_hash(state: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256, in hex, over the parameters in the order of their names.

    Each adds `name \\0 dtype \\0 d0,d1,… \\0` in UTF-8 (dtype as torch prints it, without `torch.`) and then its
    elements, row-major and little-endian.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name}\0{dtype}\0{','.join(map(str, tensor.shape))}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_checkpoint(
    folder: Path,
    *,
    config: GPTConfig,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    metadata: Metadata,
    train_state: Mapping[str, Tensor] | None,
) -> Metadata:
    """Writes the checkpoint and returns its metadata with the parameter hash set.

    A crash at any point leaves `folder` absent or whole; an existing one is replaced by `move_into_place`. Raises
    `NotFiniteError` before anything is written, and `OSError`, after which nothing is left either.
    """
    if damaged := not_finite(state) + not_finite(train_state or {}):
        raise NotFiniteError(
            f"step {metadata.step} is not saved: {len(damaged)} tensors hold NaN or infinity, the first is "
            f"{damaged[0]}; lower train.learning_rate"
        )
    metadata = dataclasses.replace(metadata, parameter_hash=parameter_hash(state))
    staging = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)  # what a crash left
    staging.mkdir(parents=True)
    contents: dict[str, Iterable[bytes | memoryview]] = {
        "config.json": [_json(config_to_hf(config, eot_id=tokenizer.eot_id))],
        "model.safetensors": safetensors_pieces(state),
        "tokenizer.json": [tokenizer.to_json()],
        "tokenizer_config.json": [_json(tokenizer_config_to_hf(config))],
        "raymill.json": [_json(dataclasses.asdict(metadata))],
    }
    if train_state is not None:
        contents[TRAIN_STATE] = safetensors_pieces(train_state)
    try:
        files = {name: write_file(staging / name, pieces) for name, pieces in contents.items()}
        manifest = _json({"format_version": FORMAT_VERSION, "files": files})
        failpoint("before_manifest")
        with (staging / MANIFEST).open("wb") as file:
            file.write(manifest[: len(manifest) // 2])
            file.flush()
            failpoint("mid_manifest")
            file.write(manifest[len(manifest) // 2 :])
        sync(staging / MANIFEST)
        sync(staging)
        failpoint("after_manifest")
        move_into_place(staging, folder)
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)  # a full disk gets its space back
        raise
    return metadata


def safetensors_pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yields a safetensors file in version 0.8's layout: the header, then the widest types first, by name.

    Tensors on the CPU are written from where they are: they must not change meanwhile.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    yield len(encoded).to_bytes(8, "little") + encoded
    for name in names:
        content = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(content), _PIECE_BYTES):
            yield content[start : start + _PIECE_BYTES]


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of the tensors that hold a NaN or an infinity."""

    def is_finite(tensor: Tensor) -> bool:
        # By numpy, as torch would use threads of its own beside the training's.
        parts = tensor.detach().cpu().float().reshape(-1).split(1 << 20)
        return all(np.isfinite(part.numpy()).all() for part in parts)

    return [name for name, tensor in tensors.items() if tensor.is_floating_point() and not is_finite(tensor)]


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32, verify: bool = True) -> GPT:
    """Returns the model in evaluation mode. A folder that transformers saved, without manifest, is not verified.

    Raises `CheckpointError` naming what is wrong, `UnsupportedModelError` for a model that `GPT` can't compute.
    """
    if is_hf_folder(folder):
        return load_hf(folder).to(dtype)
    if verify and (problems := verify_checkpoint(folder, to_train=False)):
        raise CheckpointError(f"checkpoint {folder} is not valid: {'; '.join(problems)}. Use another checkpoint")
    return build_model(read_config(folder), load_file(folder / "model.safetensors"), source=folder).to(dtype)


def read_train_state(folder: Path) -> dict[str, Tensor]:
    if not (folder / TRAIN_STATE).exists():
        raise CheckpointError(f"checkpoint {folder} has no {TRAIN_STATE}: training can't continue from it")
    return load_file(folder / TRAIN_STATE)


def _json(value: Any) -> bytes:
    # No newline at the end, so that JSON cut short anywhere is not JSON.
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode()

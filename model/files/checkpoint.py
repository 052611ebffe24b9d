"""The checkpoint format: one folder, hashed, complete or absent, which Hugging Face's transformers
can read.

The folder is written beside its final place and renamed into it. Nothing is pickled.
docs/explanation/model.md lists its files.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.config import Shape
from model.decoder import Decoder
from model.decoders.adapted import AdaptedModel
from model.files import checkpoint_folder
from model.files.durable_files import move_into_place, sync, write_file
from model.files.failpoints import failpoint
from model.files.hf import build_model, load_hf
from model.files.hf_config import (
    config_to_hf,
    read_shape,
    require_own_shape,
    tokenizer_config_to_hf,
)
from model.files.tensor_contents import TensorContents, contents_in
from model.foreign_config import ForeignConfig
from model.gpt import GPT
from model.shapes import parameter_shapes
from model.text.chat import Chat
from model.text.tokenizer import Tokenizer
from raymill.errors import CheckpointError
from raymill.files.safetensors_file import parameter_hash, safetensors_pieces


class NotFiniteError(CheckpointError):
    """Weights or moments are not finite. They are never written, as no training recovers from
    them."""


def write_checkpoint(
    folder: Path,
    *,
    config: Shape,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    metadata: checkpoint_folder.Metadata,
    train_state: Mapping[str, Tensor] | None,
    alignment: int = 8,
) -> checkpoint_folder.Metadata:
    """Writes the checkpoint and returns its metadata with the parameter hash set. The first tensor
    of a file begins at a multiple of `alignment` bytes.

    A crash at any point leaves `folder` absent or whole; an existing one is replaced by
    `move_into_place`. Raises `NotFiniteError` before anything is written, and `OSError`, after
    which nothing is left either.
    """
    check_finite(state, train_state or {}, step=metadata.step)
    metadata = dataclasses.replace(metadata, parameter_hash=parameter_hash(state))
    staging = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)  # what a crash left
    staging.mkdir(parents=True)
    described = descriptions(config, tokenizer, metadata)
    [weights] = checkpoint_folder.tensor_files(checkpoint_folder.WEIGHTS, described)
    contents: dict[str, Iterable[bytes | memoryview]] = {
        weights: safetensors_pieces(state, alignment)
    }
    contents |= {name: [content] for name, content in described.items()}
    if train_state is not None:
        contents[checkpoint_folder.TRAIN_STATE] = safetensors_pieces(train_state)
    try:
        files = {name: write_file(staging / name, pieces) for name, pieces in contents.items()}
        manifest = manifest_of(files, version=checkpoint_folder.FORMAT_VERSION)
        failpoint("before_manifest")
        with (staging / checkpoint_folder.MANIFEST).open("wb") as file:
            file.write(manifest[: len(manifest) // 2])
            file.flush()
            failpoint("mid_manifest")
            file.write(manifest[len(manifest) // 2 :])
        sync(staging / checkpoint_folder.MANIFEST)
        sync(staging)
        failpoint("after_manifest")
        move_into_place(staging, folder)
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)  # a full disk gets its space back
        raise
    return metadata


def descriptions(
    config: Shape, tokenizer: Tokenizer, metadata: checkpoint_folder.Metadata
) -> dict[str, bytes]:
    """Returns the files that tell what a checkpoint's weights are."""
    start, chat, ends = (
        tokenizer.token_bytes(tokenizer.start_id).decode(),
        tokenizer.chat,
        [tokenizer.eot_id],
    )
    tokens: dict[str, str | None] = {"bos_token": start, "eos_token": tokenizer.end_of_text}
    if chat is not None:
        tokens = {name: value or None for name, value in dataclasses.asdict(chat).items()}
        ends = [*dict.fromkeys([Chat(tokenizer).end_of_turn or tokenizer.eot_id, tokenizer.eot_id])]
    files = {
        "config.json": _json(config_to_hf(config, start_id=tokenizer.start_id, end_ids=ends)),
        "tokenizer.json": tokenizer.to_json(),
        "tokenizer_config.json": _json(tokenizer_config_to_hf(config, **tokens)),
        "raymill.json": _json(metadata.fields),
    }
    if config.adapter is not None:
        base = metadata.base_source or metadata.base
        files[checkpoint_folder.ADAPTER_CONFIG] = _json(config.adapter.to_peft(base))
    return files


def manifest_of(files: Mapping[str, Mapping[str, Any]], *, version: int) -> bytes:
    return _json({"format_version": version, "files": files})


def check_finite(*states: Mapping[str, Tensor], step: int) -> None:
    """Raises `NotFiniteError` if a tensor holds a NaN or an infinity."""

    def is_finite(tensor: Tensor) -> bool:
        # By numpy, as torch would use threads of its own beside the training's.
        parts = tensor.detach().cpu().float().reshape(-1).split(1 << 20)
        return all(np.isfinite(part.numpy()).all() for part in parts)

    # One at a time, as a mapping may read each from a file
    tensors = chain.from_iterable(state.items() for state in states)
    if damaged := [
        name for name, tensor in tensors if tensor.is_floating_point() and not is_finite(tensor)
    ]:
        raise NotFiniteError(
            f"step {step} is not saved: {len(damaged)} tensors hold NaN or infinity, the first is {damaged[0]}; lower "
            "train.learning_rate"
        )


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32, verify: bool = True) -> GPT:
    """Returns a `GPT` as `load_decoder` does. Raises `UnsupportedModelError` for a model that it
    can't compute."""
    require_own_shape(folder)
    model = load_decoder(folder, dtype=dtype, verify=verify)
    assert isinstance(model, GPT)
    return model


def load_decoder(
    folder: Path,
    *,
    base: Path | None = None,
    dtype: torch.dtype = torch.float32,
    verify: bool = True,
) -> Decoder:
    """Returns the model in evaluation mode. A folder that transformers saved, without manifest, is
    not verified. An adapter needs the checkpoint of its `base`, and is merged with that.

    Raises `CheckpointError` naming what is wrong, `UnsupportedModelError` or `ForeignModelError` for
    a model that can't be computed.
    """
    if checkpoint_folder.StoredModel(folder).is_of_transformers:
        return load_hf(folder).to(dtype)
    if verify and (problems := checkpoint_folder.verify_checkpoint(folder, to_train=False)):
        raise CheckpointError(
            f"checkpoint {folder} is not valid: {'; '.join(problems)}. Use another checkpoint"
        )
    config, weights = read_shape(folder), stored_weights(folder)
    if isinstance(config, ForeignConfig) and config.adapter is not None:
        if base is None:
            raise CheckpointError(
                f"{folder} is an adapter, which computes nothing without its base: merge it (`raymill export --merge`)"
            )
        beneath = stored_weights(base)
        _require_base(folder, base, beneath)
        weights = _merged(AdaptedModel(config), weights, beneath)
        config = read_shape(base)
    return build_model(config, weights, source=folder).to(dtype)


def _require_base(folder: Path, base: Path, weights: Mapping[str, Tensor]) -> None:
    """Raises `CheckpointError` for other weights than those that the adapter was trained on: the
    adapter may be signed, and its base need not be."""
    wanted = checkpoint_folder.read_metadata(folder).base_hash
    found = parameter_hash(weights)
    if found != wanted:
        raise CheckpointError(
            f"{base} has weights with the hash {found}, and the adapter {folder} was trained on {wanted}: restore them"
        )


def _merged(
    model: AdaptedModel, weights: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    model.adopt_frozen(base)
    model.adopt(weights)
    return model.merged()


def stored_weights(folder: Path) -> dict[str, Tensor]:
    """Returns the weights in a checkpoint's folder, an adapter's by PEFT's names. Whole tensors on
    disk are mapped into memory, and read as they are needed."""
    shards = shards_in(folder)
    if shards:
        return shards.whole(parameter_shapes(read_shape(folder)))
    return load_file(folder / checkpoint_folder.WEIGHTS)


def shards_in(folder: Path) -> TensorContents | None:
    """Returns the weights in a folder with a checkpoint in shards; None where tensors are whole."""
    files = checkpoint_folder.tensor_files(
        checkpoint_folder.WEIGHTS, [path.name for path in folder.iterdir()]
    )
    return None if files == [checkpoint_folder.WEIGHTS] else contents_in(folder, files)


def stored_parameter_hash(folder: Path) -> str:
    """Returns the hash of the weights in a checkpoint's folder, of which a part is in memory at a
    time."""
    stored = shards_in(folder) or contents_in(folder, [checkpoint_folder.WEIGHTS])
    return stored.parameter_hash(parameter_shapes(read_shape(folder)))


def _json(value: Any) -> bytes:
    # No newline at the end, so that JSON cut short anywhere is not JSON.
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode()

"""Tiny checkpoints, written for real, and ways to damage one."""

import random
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from model.config import GPTConfig, preset_fields
from model.files.checkpoint import manifest_of, write_checkpoint
from model.files.checkpoint_folder import (
    MANIFEST,
    SHARDED_VERSION,
    TRAIN_STATE,
    WEIGHTS,
    Metadata,
    manifest_files,
    shard_of,
)
from model.files.durable_files import write_file
from model.gpt import GPT
from model.text.tokenizer import Tokenizer, train_bpe
from raymill.files.safetensors_file import safetensors_pieces
from raymill.files.stored_tensors import stretch_name

DAMAGES = ("flip", "truncate", "remove")
FILES = (MANIFEST, "model.safetensors", "config.json", "tokenizer.json", "raymill.json")


def write_tiny(
    folder: Path,
    *,
    step: int = 1,
    run_id: str = "tiny",
    data: str = "d",
    val_loss: float | None = None,
    precision: str | None = None,
) -> Metadata:
    """Writes a checkpoint whose weights, and thus its parameter hash, depend on the step."""
    tokenizer = train_bpe(["to be or not to be"], vocab_size=257)
    model = GPT(
        GPTConfig(
            **preset_fields({"preset": "tiny", "n_layer": 1, "vocab_size": tokenizer.vocab_size})
        )
    )
    model.init_weights(step)
    metadata = Metadata(
        run_id=run_id,
        step=step,
        tokens_seen=step * 64,
        data_manifest_hash=data,
        code_version="c",
        val_loss=val_loss,
        precision=precision,
    )
    return save_model(
        folder,
        model=model,
        tokenizer=tokenizer,
        metadata=metadata,
        train_state=dict(model.state_dict()),
    )


def metadata_of(step: int, *, generation: int = 0, val_loss: float | None = None) -> Metadata:
    """Returns the metadata of a run's checkpoint that no token store is known of."""
    return Metadata(
        run_id="r",
        step=step,
        tokens_seen=step,
        data_manifest_hash=None,
        code_version="c",
        generation=generation,
        val_loss=val_loss,
    )


def save_model(
    folder: Path,
    *,
    model: GPT,
    tokenizer: Tokenizer,
    metadata: Metadata,
    train_state: Mapping[str, Tensor] | None = None,
) -> Metadata:
    """Writes the model's checkpoint, and returns its metadata with the parameter hash."""
    return write_checkpoint(
        folder,
        config=model.config,
        state=model.state_dict(),
        tokenizer=tokenizer,
        metadata=metadata,
        train_state=train_state,
    )


def damage(folder: Path, name: str, how: str) -> None:
    """Flips a bit in the middle of the file, cuts off its last byte, or removes it."""
    path = folder / name
    content = bytearray(path.read_bytes())
    match how:
        case "flip":
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        case "truncate":
            path.write_bytes(content[:-1])
        case "remove":
            path.unlink()


def into_shards(folder: Path, count: int, *, seed: int = 0) -> None:
    """Turns a checkpoint with whole tensors into one of so many shards, cut anywhere."""
    rng, files = random.Random(seed), manifest_files(folder)
    for file in (WEIGHTS, TRAIN_STATE):
        shards: list[dict[str, Tensor]] = [{} for _ in range(count)]
        for name, tensor in load_file(folder / file).items():
            values = tensor.reshape(-1)
            cuts = sorted({0, len(values), *(rng.randrange(len(values)) for _ in range(5))})
            for start, stop in pairwise(cuts):
                rng.choice(shards)[stretch_name(name, start)] = values[start:stop].clone()
        (folder / file).unlink()
        del files[file]
        for index, shard in enumerate(shards):
            path = folder / shard_of(file, index, count=count)
            files[path.name] = write_file(path, safetensors_pieces(shard))
    (folder / MANIFEST).write_bytes(manifest_of(files, version=SHARDED_VERSION))

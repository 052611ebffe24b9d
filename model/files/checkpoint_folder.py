"""A checkpoint's folder as files: its manifest, where its weights come from, and what is wrong with
it.

This module does not import PyTorch, so that a command can look at a checkpoint at once.
"""

import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import MISSING, asdict, dataclass, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, Self

from raymill.errors import CheckpointError

# Of a checkpoint with whole tensors, and with a file a worker
FORMAT_VERSION, SHARDED_VERSION = 1, 2
MANIFEST = "manifest.json"
WEIGHTS, TRAIN_STATE = "model.safetensors", "train_state.safetensors"
# As PEFT names them: an adapter's settings, and its weights in place of the model's
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
REQUIRED_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "raymill.json")

_SHARD = re.compile(r"(?:model|train_state)-shard-\d{5}-of-(\d{5})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Where a checkpoint's weights come from (raymill.json)."""

    run_id: str
    step: int
    tokens_seen: int
    # Of the token store; None at step 0 and in some older checkpoints
    data_manifest_hash: str | None
    code_version: str
    data_identity: str | None = None  # of what decides the token store's shards
    generation: int = 0  # of the attempt that wrote it: a later attempt has a higher number
    # The memory of the training's guard; see jobs/training/guards.py
    guard: dict[str, Any] | None = None
    parameter_hash: str | None = None  # set by write_checkpoint
    # The sum of the words of the state that it was copied from, in hexadecimal (model/files/state_hash.py)
    state_checksum: str | None = None
    val_loss: float | None = None  # nats per token
    val_bits_per_byte: float | None = None
    precision: str | None = None  # of the run's computations, fp32 or bf16
    base_hash: str | None = None  # of an adapter: the parameter hash of the weights it stands on
    base: str | None = None  # URI of the checkpoint with those
    base_source: str | None = None  # where those came from, such as hf://OWNER/NAME@COMMIT

    @property
    def fields(self) -> dict[str, Any]:
        """The metadata in raymill.json: a whole model's says nothing of a base."""
        fields = asdict(self)
        if self.base_hash is None:
            del fields["base"], fields["base_hash"], fields["base_source"]
        return fields

    @property
    def public(self) -> Self:
        """The same for strangers: it names what is on the Hub, and no place of one's own."""
        source = self.base_source or ""
        return replace(self, base=None, base_source=source if source.startswith("hf://") else None)

    @property
    def merged(self) -> Self:
        """The same of the whole model that an adapter makes with its base."""
        return replace(self, parameter_hash=None, base=None, base_hash=None, base_source=None)


def verify_checkpoint(
    folder: Path, *, to_train: bool = True, besides: Collection[str] = ()
) -> list[str]:
    """Returns what is wrong with the checkpoint, a sentence for each problem, naming its file.
    Empty means valid.

    Without `to_train` the training state may be missing, as in a copy that only computes. The
    content of files in `besides` is the caller's to look at.
    """
    if not folder.is_dir():
        return [f"{folder} is not a folder"]
    try:
        files = manifest_files(folder)
    except CheckpointError as error:
        return [str(error)]
    wanted = [*REQUIRED_FILES, *tensor_files(WEIGHTS, files)]
    problems = [f"{MANIFEST} does not list {name}" for name in wanted if name not in files]
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            if not name.startswith("train_state") or to_train:
                problems.append(f"{name} is missing")
        elif (size := path.stat().st_size) != expected["size"]:
            problems.append(f"{name} has {size} bytes, {MANIFEST} says {expected['size']}")
        elif name not in besides and (found := fingerprint(path)["sha256"]) != expected["sha256"]:
            problems.append(
                f"{name} is altered: its SHA-256 is {found}, {MANIFEST} says {expected['sha256']}"
            )
    return problems


def shard_of(file: str, index: int, *, count: int) -> str:
    """Returns the name of the file with a worker's stretches of the tensors of the whole `file`."""
    return file.replace(".", f"-shard-{index + 1:05}-of-{count:05}.", 1)


def tensor_files(whole: str, files: Collection[str]) -> list[str]:
    """Returns the file that a checkpoint with these has its tensors in, or the files of its shards;
    an adapter's weights have a name of their own."""
    if whole == WEIGHTS and ADAPTER_CONFIG in files:
        return [ADAPTER_WEIGHTS]
    counts = [int(match[1]) for name in files if (match := _SHARD.fullmatch(name))]
    return (
        [shard_of(whole, index, count=counts[0]) for index in range(counts[0])]
        if counts
        else [whole]
    )


def state_files(files: Collection[str], *, place: str) -> list[str]:
    """Returns the files of these that hold the weights and the training state. Raises
    `CheckpointError` where the checkpoint at the place has not all of them."""
    wanted = [*tensor_files(WEIGHTS, files), *tensor_files(TRAIN_STATE, files)]
    if missing := [file for file in wanted if file not in files]:
        raise CheckpointError(
            f"{place} has no {', '.join(missing)}: training can't continue from it"
        )
    return wanted


def fingerprint(path: Path) -> dict[str, Any]:
    """Returns the size and the SHA-256 of a file as it is on disk."""
    with path.open("rb") as file:
        return {
            "size": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def read_metadata(folder: Path) -> Metadata:
    """Raises `CheckpointError` where raymill.json is missing or has no metadata."""
    return metadata_from(read_json(folder / "raymill.json"), place=str(folder))


def metadata_from(fields: Any, *, place: str) -> Metadata:
    """Returns the metadata that raymill.json has in a place, without the fields that only a newer
    raymill knows: one that every reader has to know comes with another format_version. Raises
    `CheckpointError`."""
    known = {field.name: field.default is MISSING for field in dataclass_fields(Metadata)}
    given = fields if isinstance(fields, dict) else {}
    if missing := [name for name, is_needed in known.items() if is_needed and name not in given]:
        writer = f", written by raymill {given['code_version']}," if "code_version" in given else ""
        raise CheckpointError(
            f"raymill.json in {place}{writer} lacks {', '.join(missing)}: restore the file from a copy, or use another "
            "checkpoint"
        )
    return Metadata(**{name: given[name] for name in known if name in given})


@dataclass(frozen=True)
class StoredModel:
    """The model in a folder: a checkpoint of raymill's own, whole or an adapter's weights, or one
    that transformers saved."""

    folder: Path

    @property
    def is_of_transformers(self) -> bool:
        """Whether transformers saved it. With raymill.json but no manifest it is a torn checkpoint
        instead."""
        own = (MANIFEST, "raymill.json")
        is_own = any((self.folder / name).exists() for name in own)
        return (self.folder / "config.json").exists() and not is_own

    @property
    def is_adapter(self) -> bool:
        """Whether its weights are an adapter's, which stands on a base."""
        return (self.folder / ADAPTER_CONFIG).exists()

    @property
    def metadata(self) -> Metadata | None:
        """The metadata that raymill recorded; None where transformers saved the model. Raises
        `CheckpointError`."""
        return None if self.is_of_transformers else read_metadata(self.folder)


def manifest_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the size and the SHA-256 of each file that the manifest lists. Raises
    `CheckpointError`."""
    manifest = read_json(folder / MANIFEST)
    try:
        version, files = manifest["format_version"], dict(manifest["files"])
        well_formed = all(
            Path(name).name == name
            and isinstance(entry["size"], int)
            and isinstance(entry["sha256"], str)
            for name, entry in files.items()
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{MANIFEST} is altered: expected format_version and files"
        ) from error
    if version not in (FORMAT_VERSION, SHARDED_VERSION):
        raise CheckpointError(
            f"{MANIFEST} has format_version {version!r}, this version of raymill reads {FORMAT_VERSION} and "
            f"{SHARDED_VERSION}"
        )
    if not well_formed:
        raise CheckpointError(
            f"{MANIFEST} is altered: expected a file name with its size and sha256 in each entry"
        )
    return files


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name} is missing in {path.parent}") from error
    except ValueError as error:
        raise CheckpointError(f"{path.name} in {path.parent} is not JSON: {error}") from error

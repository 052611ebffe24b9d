"""Keeps the frozen weights that adapters stand on: under `bases/`, one checkpoint for all runs that
began from the same weights."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from cluster.storage.registry import find_checkpoint
from cluster.storage.uris import Storage, open_storage
from model.files.checkpoint_folder import MANIFEST, StoredModel, read_metadata
from raymill.errors import CheckpointError

BASES = "bases/"


def base_folder(storage: Storage, parts: Iterable[str]) -> Storage:
    """Returns the folder of a base, which is named by what decides its bytes."""
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return storage.child(f"{BASES}{digest[:16]}")


def find_base(folder: Path, storage_uri: str) -> Path | None:
    """Returns a local folder with the verified base of an adapter's checkpoint; None where the
    checkpoint is a whole model. Raises `CheckpointError`."""
    stored = StoredModel(folder)
    metadata = stored.metadata if stored.is_adapter else None
    if metadata is None:
        return None
    if metadata.base is None:
        raise CheckpointError(
            f"{folder} does not say where its base is, whose parameter hash is {metadata.base_hash}: use the "
            "checkpoint in its run's storage"
        )
    return verified_base(metadata.base, str(metadata.base_hash), storage_uri)


def verified_base(uri: str, parameter_hash: str, storage_uri: str) -> Path:
    """Returns a local folder with a base, where it was or in this storage, into which it may have
    been copied. Raises `CheckpointError`."""
    moved = open_storage(storage_uri).child(f"{BASES}{uri.rpartition('/')[2]}")
    place = moved.uri if moved.exists(MANIFEST) else uri
    _, folder = find_checkpoint(place, storage_uri)
    found = read_metadata(folder).parameter_hash
    if found != parameter_hash:
        raise CheckpointError(
            f"{place} has weights with the hash {found}, and the adapter was trained on {parameter_hash}"
        )
    return folder

"""Signs a checkpoint together with what it was trained from."""

import tempfile
from pathlib import Path
from typing import Any

from cluster.output.progress import say
from cluster.storage.registry import named_checkpoint
from cluster.storage.uris import Storage, open_storage
from jobs.run.training_statement import training_of
from model.files.checkpoint_folder import MANIFEST, verify_checkpoint
from model.signing.signature import MODEL, TRAINING, Signer, sign
from raymill.errors import CheckpointError


def sign_checkpoint(reference: str, key: Signer, *, storage_uri: str) -> dict[str, Any]:
    """Signs the checkpoint of a reference where it lies, once all its files are as its manifest
    says. Raises `CheckpointError`, and `UserError` for a key that does not sign or an authority
    that does not stamp."""
    checkpoint = named_checkpoint(reference, storage_uri)
    place = open_storage(checkpoint)
    if not place.exists(MANIFEST):
        raise CheckpointError(
            f"{checkpoint} was saved by transformers, and says nothing of its training: raymill signs its own "
            "checkpoints, and `model_signing sign` any folder"
        )
    with tempfile.TemporaryDirectory(prefix="raymill-sign-") as scratch:
        folder = _whole(place, Path(scratch))
        if problems := verify_checkpoint(folder):
            raise CheckpointError(f"checkpoint {checkpoint} is not valid: {'; '.join(problems)}")
        training = training_of(checkpoint, folder)
        say(f"signing {checkpoint}")
        sign(folder, key, training)
        if place.local_path("") is None:
            # The statement first: who sees the folder's signature sees the statement too
            for name in (TRAINING, MODEL):
                place.upload_file(folder / name, name)
    return {"checkpoint": checkpoint, "files": [MODEL, TRAINING], "training": training}


def _whole(place: Storage, scratch: Path) -> Path:
    """Returns a folder with all files of the checkpoint, without earlier signatures of a remote
    one."""
    if (local := place.local_path("")) is not None:
        return local
    for entry in place.list():
        if entry.key not in (MODEL, TRAINING):
            place.download_file(entry.key, scratch / entry.key)
    return scratch

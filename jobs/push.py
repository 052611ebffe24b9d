"""Uploads a checkpoint to the Hugging Face Hub, with a model card made from its lineage."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cluster.storage.hub import HubStorage
from cluster.storage.registry import find_checkpoint
from cluster.storage.uris import NotFoundError, StorageError, open_storage
from jobs.export import export
from jobs.publishing.model_card import Origin, model_card
from jobs.run.history import CONFIG_FILE, recorded_config
from model.files.bounded_text import require_bounded_text
from model.files.checkpoint_folder import StoredModel
from model.files.hf_config import read_shape
from model.files.stored_tokenizer import load_tokenizer
from raymill.errors import CheckpointError, UserError

CARD = "README.md"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_MODEL = re.compile(r"hf://([^/@]+/[^/@]+)(?:@.*)?")
_DATASET = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:[@/].*)?")


@dataclass(frozen=True)
class Pushed:
    """A checkpoint on its way to a repository."""

    checkpoint: str  # a URI
    repository: HubStorage
    storage_uri: str
    card: str  # README.md

    @classmethod
    def of(cls, reference: str, repository: str, *, storage_uri: str, license_id: str) -> Self:
        """Finds and verifies the checkpoint, and writes its card. Raises `StorageError` for what is
        no model's repository, and `CheckpointError`."""
        place = _repository(repository)
        if not _LICENSE.fullmatch(license_id):
            raise UserError(
                f"--license {license_id!r} is not one of the Hub's words for a license, expected one such as "
                "apache-2.0, mit or other"
            )
        checkpoint, folder = find_checkpoint(reference, storage_uri)
        metadata = StoredModel(folder).metadata
        if metadata is None:
            raise CheckpointError(
                f"{checkpoint} was saved by transformers and has no lineage; upload it with `hf upload`"
            )
        require_bounded_text(folder)
        tokenizer = load_tokenizer(folder)
        assert tokenizer is not None, "only plain Hugging Face folders may lack one"
        card = model_card(
            place.repository,
            shape=read_shape(folder),
            tokenizer=tokenizer,
            metadata=metadata,
            origin=_origin_of(checkpoint),
            license_id=license_id,
        )
        return cls(checkpoint, place, storage_uri, card)

    @property
    def name(self) -> str:
        return self.repository.repository

    def upload(self, *, creates: bool) -> dict[str, Any]:
        """Uploads the checkpoint without its training state, and the card, in one commit. Raises
        `StorageError`."""
        with tempfile.TemporaryDirectory(prefix="raymill-push-") as scratch:
            folder = Path(scratch) / "model"
            exported = export(
                self.checkpoint, str(folder), storage_uri=self.storage_uri, is_public=True
            )
            (folder / CARD).write_text(self.card)
            message = f"raymill: {self.checkpoint.rpartition('/')[2]}"
            try:
                commit = self.repository.commit_folder(folder, message=message, creates=creates)
            except NotFoundError as error:
                raise NotFoundError(f"{error}; --create makes a private one") from error
        return {
            "repository": f"hf://{self.name}@{commit}",
            "commit": commit,
            "parameter_hash": exported["parameter_hash"],
            "files": exported["files"] | {CARD: len(self.card.encode())},
        } | {name: exported[name] for name in ("base",) if name in exported}


def _repository(uri: str) -> HubStorage:
    """Returns a model's repository. Raises `StorageError`."""
    place = HubStorage.at(uri) if uri.startswith("hf://") else None
    if place is None or place.kind != "model" or place.folder:
        raise StorageError(
            f"cannot push to {uri!r}: expected a model's repository on the Hub, hf://OWNER/NAME or "
            "hf://OWNER/NAME@BRANCH"
        )
    return place


def _origin_of(checkpoint: str) -> Origin:
    """Returns what anybody may look up of where a run's weights and texts come from: repositories of
    the Hub. Paths stay private."""
    run_uri, _, _ = checkpoint.rpartition("/checkpoints/")
    run = open_storage(run_uri) if run_uri else None
    if run is None or not run.exists(CONFIG_FILE):
        return Origin()
    config = recorded_config(run)
    base = _MODEL.fullmatch(config.train.init_from or "")
    matches = [_DATASET.fullmatch(source) for source in config.data.source]
    datasets = [match[1] for match in matches if match]
    return Origin(base[1] if base else None, tuple(dict.fromkeys(datasets)))

"""The registry of published checkpoints: what `latest` means, and how a checkpoint reference
becomes a folder.

A publication is a small numbered file under `registry/`; the highest number is the latest. Two
publishers cannot take the same number, and none is ever rewritten. One whose checkpoint was deleted
while it was written is withdrawn.
"""

import json
import logging
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from cluster.storage.checkpoint_cache import discard, fetch, is_left_behind
from cluster.storage.uris import (
    AlreadyExistsError,
    ConflictError,
    NotFoundError,
    Storage,
    StorageError,
    open_storage,
    pinned,
)
from model.files.checkpoint_folder import (
    MANIFEST,
    CheckpointError,
    Metadata,
    is_hf_folder,
    metadata_from,
    read_metadata,
    verify_checkpoint,
)
from model.signing.signature import Trusted, check

LATEST = "latest"
ENDPOINTS = "endpoints/"
"""Folder in which each endpoint keeps what it serves, with the checkpoints that it needs under
`pinned`."""
LAST_GOOD = f"{ENDPOINTS}last-good/"
"""Folder with a copy of each of these files, in case one is damaged."""
AUDIT = f"{ENDPOINTS}audit/"
"""Folder with the orders that each endpoint was given."""
_PUBLISH_TRIES = 2  # a second one finds the checkpoint that took the place of a deleted one
_PUBLICATION = re.compile(r"registry/\d+\.json")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Publication:
    """One published checkpoint."""

    checkpoint: str  # URI of its folder
    parameter_hash: str
    run_id: str
    step: int
    time: float  # seconds since 1970


def publish(storage: Storage, reference: str) -> Publication:
    """Makes the checkpoint of a reference (see `find_checkpoint`) the latest. Raises
    `CheckpointError` if invalid, or if its run deletes it meanwhile and the reference names no
    other one."""
    deleted: str | None = None
    for _ in range(_PUBLISH_TRIES):
        try:
            publication = _verified(reference, storage.uri)
        except CheckpointError as error:
            if deleted is None:
                raise
            raise CheckpointError(_deleted_meanwhile(deleted)) from error
        key, version = _recorded(storage, publication)
        # Verifying takes seconds to minutes. Until the publication is written the run's retention
        # may delete the checkpoint, afterwards it does not.
        if open_storage(publication.checkpoint).exists(MANIFEST):
            return publication
        with suppress(ConflictError):
            storage.delete(key, if_version=version)
        deleted = publication.checkpoint
    raise CheckpointError(_deleted_meanwhile(str(deleted)))


def _verified(reference: str, storage_uri: str) -> Publication:
    """Returns the publication of the checkpoint that the reference names, after it was verified."""
    checkpoint, folder = find_checkpoint(reference, storage_uri)
    if is_hf_folder(folder):
        raise CheckpointError(
            f"{checkpoint} was saved by transformers and has no {MANIFEST}: only raymill's own checkpoints are "
            "published; `raymill serve` and `raymill evaluate` take the folder as it is"
        )
    metadata = read_metadata(folder)
    now_s, parameter_hash = round(time.time(), 3), str(metadata.parameter_hash)
    return Publication(checkpoint, parameter_hash, metadata.run_id, metadata.step, now_s)


def _recorded(storage: Storage, publication: Publication) -> tuple[str, str]:
    """Writes the publication under the next number; returns its key and the version of that
    file."""
    content = json.dumps(asdict(publication)).encode()
    while True:
        numbers = [int(Path(key).stem) for key in _publication_keys(storage)]
        key = f"registry/{max(numbers, default=0) + 1:06d}.json"
        with suppress(AlreadyExistsError):  # another publisher took the number
            return key, storage.write_bytes(key, content, if_absent=True)


def _deleted_meanwhile(checkpoint: str) -> str:
    return (
        f"{checkpoint} was deleted while it was being published: its run keeps its newest checkpoints only. Publish "
        "the run itself, which means its newest one, or have it keep more (checkpoint.num_to_keep)"
    )


def publications(storage: Storage) -> list[Publication]:
    """Returns everything published, oldest first."""
    return list(newest_first(storage))[::-1]


def newest_first(storage: Storage) -> Iterator[Publication]:
    """Yields everything published, read one by one: `latest` is one request, not one for each
    publication."""
    for key in reversed(_publication_keys(storage)):
        yield Publication(**json.loads(storage.read_bytes(key)))


def _publication_keys(storage: Storage) -> list[str]:
    """Returns the keys of the publications, oldest first; other files in that folder, such as
    notes, are left alone."""
    return [entry.key for entry in storage.list("registry/") if _PUBLICATION.fullmatch(entry.key)]


def what_latest_became(storage: Storage) -> str:
    """Returns a line on what `latest` is and was, and how to return to the earlier checkpoint if
    that has the lower validation loss on the same data."""
    newest, *earlier = islice(newest_first(storage), 2)
    now = metadata_of(newest.checkpoint)
    said = f"latest is now step {newest.step:,} of run {newest.run_id}{_loss(now)}"
    if not earlier or earlier[0].checkpoint == newest.checkpoint:
        return said
    before = metadata_of(earlier[0].checkpoint)
    said += f"; it was step {earlier[0].step:,} of run {earlier[0].run_id}{_loss(before)}"
    if now and before and _is_better(before, now):
        said += f", which is better on the same data: `raymill publish {earlier[0].checkpoint}` makes it latest again"
    return said


def served_checkpoints(storage: Storage) -> set[str]:
    """Returns the URIs of checkpoints that endpoints serve, are about to serve, or would roll back
    to. Raises `StorageError` if that cannot be known."""
    keys = [
        entry.key
        for entry in storage.list(ENDPOINTS)
        if not entry.key.startswith((LAST_GOOD, AUDIT))
    ]
    return {uri for key in keys for uri in _pinned(storage, key)}


def _pinned(storage: Storage, key: str) -> list[str]:
    """Returns the checkpoints in an endpoint's file, or in its copy if the file is damaged."""
    for candidate in (key, LAST_GOOD + key.removeprefix(ENDPOINTS)):
        with suppress(ValueError, NotFoundError):
            content = json.loads(storage.read_bytes(candidate))
            if isinstance(content, dict) and isinstance(content.get("pinned"), list):
                return [str(uri) for uri in content["pinned"]]
        _log.warning("%s does not say which checkpoints its endpoint needs", candidate)
    raise StorageError(
        f"{storage.uri}/{key} is damaged, so the checkpoints that its endpoint needs are not known: restore the file, "
        "or delete it if the endpoint no longer exists"
    )


def resolve_checkpoint(
    reference: str, storage_uri: str, *, signed_by: Trusted | None = None
) -> Path:
    """Returns a local folder with the verified checkpoint of a reference, see `find_checkpoint`."""
    return find_checkpoint(reference, storage_uri, signed_by=signed_by)[1]


def find_checkpoint(
    reference: str, storage_uri: str, *, signed_by: Trusted | None = None
) -> tuple[str, Path]:
    """Returns the URI of the verified checkpoint that `reference` names, and a local folder with
    it.

    `latest` is the newest valid published checkpoint; damaged ones are logged and skipped. A URI
    names a checkpoint's folder, or a run's, which means its newest valid checkpoint; a remote one
    is copied here, of a model on the Hub (hf://owner/name@revision) the present commit, which the
    returned URI names. Raises `CheckpointError`, also where `signed_by` has not signed the
    checkpoint: an earlier one that is signed does not do.
    """
    candidates, none = _candidates(reference, storage_uri)
    for checkpoint in candidates:
        try:
            local, problems = _checked(checkpoint)
        except NotFoundError as error:
            if not none:
                raise
            problems = [str(error)]  # deleted since it was listed
        if not problems:
            if signed_by:
                check(local, signed_by, may_lack=is_left_behind)
            return checkpoint, local
        if not none:
            raise CheckpointError(f"checkpoint {reference} is not valid: {'; '.join(problems)}")
        _log.warning("checkpoint %s is skipped: %s", checkpoint, "; ".join(problems))
    raise CheckpointError(none)


def named_checkpoint(reference: str, storage_uri: str) -> str:
    """Returns the URI of the checkpoint that `reference` names, judged by file names alone, before
    it is fetched and verified. Raises `CheckpointError`."""
    candidates, none = _candidates(reference, storage_uri)
    for checkpoint in candidates:
        folder = open_storage(checkpoint)
        if folder.exists(MANIFEST) or (
            folder.exists("config.json") and not folder.exists("raymill.json")
        ):
            return checkpoint
    raise CheckpointError(none or f"checkpoint {reference} is not valid: {MANIFEST} is missing")


def _candidates(reference: str, storage_uri: str) -> tuple[Iterable[str], str]:
    """Returns the URIs of the possible checkpoints, newest first, and the error if none of them is
    valid, which is empty for a reference to a single checkpoint."""
    storage = open_storage(storage_uri)
    if reference == LATEST:
        published = (publication.checkpoint for publication in newest_first(storage))
        return (
            published,
            f"nothing is published in {storage_uri}: finish a run there, or name a checkpoint's folder",
        )
    folder = open_storage(pinned(reference)[0])
    keys = [entry.key for entry in folder.list()]
    if not keys:
        raise CheckpointError(
            f"unknown checkpoint {reference}: no folder with files is there{_siblings(folder)}"
        )
    folders = (key.removesuffix(f"/{MANIFEST}") for key in keys if key.endswith(f"/{MANIFEST}"))
    nested = sorted((name for name in folders if f"{name}/raymill.json" in keys), reverse=True)
    if MANIFEST not in keys and "config.json" not in keys and nested:
        return [
            folder.child(name).uri for name in nested
        ], f"no checkpoint under {reference} is valid"
    return [folder.uri], ""


def _siblings(folder: Storage) -> str:
    """Returns the end of an error that names the checkpoints beside a folder that is missing."""
    above = folder.uri.rpartition("/")[0]
    if not above.endswith("/checkpoints"):
        return "; expected latest, a run's id, run@step, or the path or URI of a folder"
    keys = [entry.key for entry in open_storage(above).list() if entry.key.endswith(f"/{MANIFEST}")]
    names = sorted(key.removesuffix(f"/{MANIFEST}") for key in keys)
    return f"; beside it are {', '.join(names[-8:])}" if names else ""


def metadata_of(checkpoint: str) -> Metadata | None:
    """Returns where the checkpoint's weights come from; None if it is gone, such as with its run's
    folder. Raises `CheckpointError`."""
    content = open_storage(checkpoint).find_bytes("raymill.json")
    return None if content is None else metadata_from(json.loads(content), place=checkpoint)


def _loss(metadata: Metadata | None) -> str:
    return (
        ""
        if metadata is None or metadata.val_loss is None
        else f" (validation loss {metadata.val_loss:.3f})"
    )


def _is_better(one: Metadata, other: Metadata) -> bool:
    """Compares the loss on the validation split, if both were trained on the same token store."""
    if one.val_loss is None or other.val_loss is None or one.data_manifest_hash is None:
        return False
    return one.data_manifest_hash == other.data_manifest_hash and one.val_loss < other.val_loss


def _checked(uri: str) -> tuple[Path, list[str]]:
    """Returns the checkpoint's folder or a copy in the cache, and its problems. A damaged copy is
    not kept."""
    storage = open_storage(uri)
    here = storage.local_path("")
    local = here or fetch(storage)
    problems = [] if is_hf_folder(local) else verify_checkpoint(local, to_train=False)
    if problems and here is None:
        discard(local)
    return local, problems

"""The registry of published checkpoints: what `latest` means, and how a checkpoint reference
becomes a folder.

A publication is a small numbered file under `registry/`; the highest number is the latest. Two
publishers cannot take the same number, and none is ever rewritten. One whose checkpoint was deleted
while it was written is withdrawn. It has the hash of the checkpoint's manifest: what lies in that
place later, and is another checkpoint, was not published.
"""

import json
import logging
import re
import shlex
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from cluster.storage.checkpoint_cache import discard, fetch, is_left_behind
from cluster.storage.freshness import (
    Publication,
    checkpoint_folders,
    contradicted,
    differing,
    later_step,
    newest,
    recorded_names,
)
from cluster.storage.uris import (
    AlreadyExistsError,
    ConflictError,
    NotFoundError,
    Storage,
    StorageError,
    open_storage,
    pinned,
    storage_flag,
)
from model.files.checkpoint_folder import (
    MANIFEST,
    Metadata,
    StoredModel,
    fingerprint,
    metadata_from,
    read_metadata,
    verify_checkpoint,
)
from model.signing.signature import FloorError, SignatureError, Trusted, check
from raymill.errors import CheckpointError

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
_LEDGER = "ledger.jsonl"  # of a run

_log = logging.getLogger(__name__)


class _Candidate(NamedTuple):
    """The meanings of a reference."""

    checkpoint: str  # URI of its folder
    publication: Publication | None = None  # where one names it


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
    metadata = StoredModel(folder).metadata
    if metadata is None:
        raise CheckpointError(
            f"{checkpoint} was saved by transformers and has no {MANIFEST}: only raymill's own checkpoints are "
            "published; `raymill serve` and `raymill evaluate` take the folder as it is"
        )
    now_s, parameter_hash = round(time.time(), 3), str(metadata.parameter_hash)
    manifest_hash = _manifest_hash(folder)
    return Publication(
        checkpoint, parameter_hash, metadata.run_id, metadata.step, now_s, manifest_hash
    )


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
        yield _read_publication(storage, key)


def _read_publication(storage: Storage, key: str) -> Publication:
    """Returns a publication without the fields that only a newer raymill knows."""
    content = storage.read_bytes(key)
    known = {field.name for field in fields(Publication)}
    try:
        given = json.loads(content)
        return Publication(**{name: given[name] for name in known & given.keys()})
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{storage.uri}/{key} is no publication ({error}): restore the file, or delete it"
        ) from error


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
        said += ", which is better on the same data: "
        said += f"{_to_publish(earlier[0], storage)} makes it latest again"
    return said


def _to_publish(earlier: Publication, storage: Storage) -> str:
    return f"`raymill publish {shlex.quote(earlier.checkpoint)}{storage_flag(storage.uri)}`"


def served_checkpoints(storage: Storage) -> set[str]:
    """Returns the URIs of checkpoints that endpoints serve, are about to serve, or would roll back
    to. Raises `StorageError` if that cannot be known."""
    return {uri for name in endpoint_files(storage) for uri in served_by(storage, name)}


def served_by(storage: Storage, endpoint: str) -> list[str]:
    """Returns the checkpoints that one endpoint serves. Raises `StorageError` if that cannot be
    known."""
    return _pinned(storage, f"{ENDPOINTS}{endpoint}.json")


def endpoint_files(storage: Storage) -> dict[str, list[str]]:
    """Returns the keys of each endpoint's state, by its name: its file, and the copy of that, if
    there is one."""
    keys = [entry.key for entry in storage.list(ENDPOINTS)]
    files: dict[str, list[str]] = {}
    for key in keys:
        if not key.startswith((LAST_GOOD, AUDIT)):
            name = key.removeprefix(ENDPOINTS).removesuffix(".json")
            copy = f"{LAST_GOOD}{name}.json"
            files[name] = [key, copy] if copy in keys else [key]
    return files


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
    returned URI names. Raises `CheckpointError`.

    With `signed_by` the newest one counts, whatever is wrong with it: the error is of that one, also
    where it is damaged or not signed, and no earlier one takes its place.
    """
    if signed_by is not None:
        return _find_signed(reference, storage_uri, signed_by)
    candidates, none = _candidates(reference, storage_uri)
    for checkpoint, publication in candidates:
        try:
            local, problems = _checked(checkpoint, publication)
        except NotFoundError as error:
            if not none:
                raise
            problems = [str(error)]  # deleted since it was listed
        if not problems:
            return checkpoint, local
        if not none:
            raise CheckpointError(f"checkpoint {reference} is not valid: {'; '.join(problems)}")
        _log.warning("checkpoint %s is skipped: %s", checkpoint, "; ".join(problems))
    raise CheckpointError(none)


def named_checkpoint(reference: str, storage_uri: str) -> str:
    """Returns the URI of the checkpoint that `reference` names, judged by file names alone, before
    it is fetched and verified. Raises `CheckpointError`."""
    candidates, none = _candidates(reference, storage_uri)
    for checkpoint, _ in candidates:
        folder = open_storage(checkpoint)
        if folder.exists(MANIFEST) or (
            folder.exists("config.json") and not folder.exists("raymill.json")
        ):
            return checkpoint
    raise CheckpointError(none or f"checkpoint {reference} is not valid: {MANIFEST} is missing")


def _find_signed(reference: str, storage_uri: str, signer: Trusted) -> tuple[str, Path]:
    """Returns the URI of the newest checkpoint that a reference names, which the signer has signed,
    and a local folder with it."""
    if reference == LATEST:
        return _signed_latest(storage_uri, signer)
    folder, keys = _listed(reference)
    folders = checkpoint_folders(keys)
    is_itself = MANIFEST in keys or "config.json" in keys
    if is_itself and folders:
        raise CheckpointError(
            f"{folder.uri} has the files of a checkpoint, and holds others, such as {max(folders)}: name the one that "
            "is meant"
        )
    if is_itself or not folders:
        return folder.uri, _signed(_Candidate(folder.uri), signer)
    choice = newest(folders, lambda name: _is_recorded(folder.child(name).uri))
    for name, reason in choice.skipped.items():
        _log.warning("checkpoint %s is skipped: %s", folder.child(name).uri, reason)
    if choice.name is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.skipped.items())
        raise CheckpointError(f"no checkpoint under {reference} is valid: {reasons}")
    uri = folder.child(choice.name).uri
    older = folder.child(choice.older).uri if choice.older else None
    try:
        if choice.problem:
            raise CheckpointError(f"checkpoint {uri} is not valid: {choice.problem}")
        return uri, _signed(_Candidate(uri), signer)
    except (CheckpointError, NotFoundError) as error:
        raise _final(error, reference, older, "sign or restore this one") from error


def _signed_latest(storage_uri: str, signer: Trusted) -> tuple[str, Path]:
    published = list(newest_first(open_storage(storage_uri)))
    if not published:
        raise CheckpointError(_nothing_published(storage_uri))
    latest, *earlier = published
    older = [before.checkpoint for before in earlier if before.checkpoint != latest.checkpoint]
    try:
        local = _signed(_Candidate(latest.checkpoint, latest), signer)
    except (CheckpointError, NotFoundError) as error:
        raise _final(
            error, LATEST, next(iter(older), None), "publish a valid, signed one"
        ) from error
    later = later_step(latest, earlier)
    if later is not None:
        _log.warning(
            "latest names step %d, and step %d of the same run was published before: "
            "storage.signed_from_step=%d refuses such a step back",
            latest.step,
            later,
            later,
        )
    return latest.checkpoint, local


def _signed(candidate: _Candidate, signer: Trusted) -> Path:
    """Returns a local folder with a checkpoint, once it is valid, signed, and what its name and its
    publication say."""
    uri, publication = candidate
    local, problems = _checked(uri, publication)
    if problems:
        raise CheckpointError(f"checkpoint {uri} is not valid: {'; '.join(problems)}")
    training = check(local, signer, may_lack=is_left_behind)
    if not training and publication is None:  # a folder that transformers saved
        return local
    difference = contradicted(uri, publication, read_metadata(local))
    if difference:
        raise SignatureError(f"checkpoint {uri} is signed, and not what was named: {difference}")
    return local


def _final(error: Exception, reference: str, older: str | None, remedy: str) -> CheckpointError:
    """Returns the error of the newest checkpoint that a reference means, with the reason why no
    older one is taken."""
    if isinstance(error, FloorError):
        return error
    kind = SignatureError if isinstance(error, SignatureError) else CheckpointError
    return kind(
        f"{error}. It is the newest one that {reference} means, and with storage.signed_by no older one takes its "
        "place, or else whoever can write to the storage could choose an older one. Name an older checkpoint itself"
        f"{f', such as {older},' if older else ''} or {remedy}"
    )


def _is_recorded(checkpoint: str) -> bool:
    """Tells whether the ledger of a checkpoint's run says that it was stored."""
    run, _, name = checkpoint.rpartition("/checkpoints/")
    ledger = open_storage(run).find_bytes(_LEDGER) if run else None
    return ledger is not None and name in recorded_names(ledger)


def _nothing_published(storage_uri: str) -> str:
    return (
        f"nothing is published in {storage_uri}: finish a run there, or name a checkpoint's folder"
    )


def _candidates(reference: str, storage_uri: str) -> tuple[Iterable[_Candidate], str]:
    """Returns the possible checkpoints, newest first, and the error if none of them is valid, which
    is empty for a reference to a single checkpoint."""
    if reference == LATEST:
        published = newest_first(open_storage(storage_uri))
        newest_ones = (_Candidate(entry.checkpoint, entry) for entry in published)
        return newest_ones, _nothing_published(storage_uri)
    folder, keys = _listed(reference)
    folders = (key.removesuffix(f"/{MANIFEST}") for key in keys if key.endswith(f"/{MANIFEST}"))
    nested = sorted((name for name in folders if f"{name}/raymill.json" in keys), reverse=True)
    if MANIFEST not in keys and "config.json" not in keys and nested:
        candidates = [_Candidate(folder.child(name).uri) for name in nested]
        return candidates, f"no checkpoint under {reference} is valid"
    return [_Candidate(folder.uri)], ""


def _listed(reference: str) -> tuple[Storage, list[str]]:
    """Returns the folder that a reference names, and the keys of its files. Raises
    `CheckpointError` where there are none."""
    folder = open_storage(pinned(reference)[0])
    keys = [entry.key for entry in folder.list()]
    if not keys:
        raise CheckpointError(
            f"unknown checkpoint {reference}: no folder with files is there{_siblings(folder)}"
        )
    return folder, keys


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


def _checked(uri: str, publication: Publication | None) -> tuple[Path, list[str]]:
    """Returns the checkpoint's folder or a copy in the cache, and its problems, also that it is not
    what was published. A damaged copy is not kept."""
    storage = open_storage(uri)
    here = storage.local_path("")
    local = here or fetch(storage)
    problems = []
    if not StoredModel(local).is_of_transformers:
        problems = verify_checkpoint(local, to_train=False)
    if problems and here is None:
        discard(local)
    if not problems and publication is not None:
        problems = differing(publication, _manifest_hash(local))
    return local, problems


def _manifest_hash(folder: Path) -> str | None:
    path = folder / MANIFEST
    return str(fingerprint(path)["sha256"]) if path.is_file() else None

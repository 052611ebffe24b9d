"""Decides which checkpoint counts where checkpoints must be signed: the newest one, with all its
faults. Pure functions of what is published and of the names of files.

Older checkpoints are signed as well. So whoever can write to the storage would choose what is
served, if a damaged newest one let an older one take its place.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

from model.files.checkpoint_folder import MANIFEST, Metadata
from model.signing.signature import MODEL, TRAINING

_QUARANTINED = "QUARANTINED"  # as jobs/run/checkpoints.py marks one that is damaged or not proven
_STEP = re.compile(r"step-0*(\d+)(?:-\d+)?")


@dataclass(frozen=True)
class Publication:
    """One published checkpoint."""

    checkpoint: str  # URI of its folder
    parameter_hash: str
    run_id: str
    step: int
    time: float  # seconds since 1970
    manifest_hash: str | None = None  # SHA-256 of its manifest.json; None in older publications


class PublishedStanding(Enum):
    """A checkpoint's claims, by the files of its folder."""

    WHOLE = "its manifest is there"
    TORN = (
        f"{MANIFEST} is missing, and it was complete once: it is signed, or its run's ledger has it"
    )
    DOUBTED = f"it is signed, and has the mark {_QUARANTINED}, which is not"
    SET_ASIDE = f"its run has set it aside ({_QUARANTINED})"
    ARRIVING = f"{MANIFEST} is missing: it is being uploaded, or was never complete"


@dataclass(frozen=True)
class Newest:
    """The newest checkpoint of several, and those newer ones that do not count."""

    name: str | None  # None where there is none
    problem: str = ""  # why it cannot be taken, nor an older one instead
    skipped: dict[str, str] = field(default_factory=dict)  # the reason by name
    older: str | None = None  # one that may be named instead


def checkpoint_folders(keys: Iterable[str]) -> dict[str, set[str]]:
    """Returns the files of each folder that is a checkpoint's, by its name, whether it is whole or
    not."""
    folders: dict[str, set[str]] = {}
    for key in keys:
        name, _, file = key.rpartition("/")
        folders.setdefault(name, set()).add(file)
    return {name: files for name, files in folders.items() if _is_checkpoint(name, files)}


def _is_checkpoint(name: str, files: Collection[str]) -> bool:
    if any(part.startswith(".") or not part for part in name.split("/")):
        return False  # where a run writes one before it publishes it, or the reference's own folder
    return named_step(name) is not None or "raymill.json" in files or TRAINING in files


def named_step(uri: str) -> int | None:
    """Returns the step that a checkpoint's folder has in its name."""
    match = _STEP.fullmatch(uri.rpartition("/")[2])
    return int(match[1]) if match else None


def newest(folders: Mapping[str, Collection[str]], is_recorded: Callable[[str], bool]) -> Newest:
    """Returns the checkpoint that counts of a run's folders. `is_recorded` tells whether the run's
    ledger has the checkpoint in a folder; it is asked of those alone that nothing else tells."""
    skipped: dict[str, str] = {}
    names = sorted(folders, reverse=True)
    for number, name in enumerate(names):
        standing = _standing(folders[name], partial(is_recorded, name))
        if standing in (PublishedStanding.SET_ASIDE, PublishedStanding.ARRIVING):
            skipped[name] = standing.value
            continue
        problem = "" if standing is PublishedStanding.WHOLE else standing.value
        older = [older for older in names[number + 1 :] if _may_be_named(folders[older])]
        return Newest(name, problem, skipped, next(iter(older), None))
    return Newest(None, skipped=skipped)


def _may_be_named(files: Collection[str]) -> bool:
    return MANIFEST in files and _QUARANTINED not in files


def _standing(files: Collection[str], is_recorded: Callable[[], bool]) -> PublishedStanding:
    is_signed = MODEL in files or TRAINING in files
    if _QUARANTINED in files:
        return PublishedStanding.DOUBTED if is_signed else PublishedStanding.SET_ASIDE
    if MANIFEST in files:
        return PublishedStanding.WHOLE
    return PublishedStanding.TORN if is_signed or is_recorded() else PublishedStanding.ARRIVING


def recorded_names(ledger: bytes) -> set[str]:
    """Returns the names of the folders of all checkpoints that a run's ledger says were stored."""
    names = set()
    for line in ledger.splitlines():
        fields: Any = None
        with suppress(ValueError):  # a crash's unfinished last line
            fields = json.loads(line) if b'"checkpoint"' in line else None
        if isinstance(fields, dict) and fields.get("event") == "checkpoint":
            names.add(str(fields.get("checkpoint")).rpartition("/")[2])
    return names


def differing(publication: Publication, manifest_hash: str | None) -> list[str]:
    """Returns what is wrong with a checkpoint whose manifest has this hash, None where it has no
    manifest, if it is not what was published."""
    published = publication.manifest_hash
    if published is None or manifest_hash == published:
        return []
    held = f"has the SHA-256 {manifest_hash[:12]}…" if manifest_hash else "is missing"
    return [f"{MANIFEST} {held}, and its publication names {published[:12]}…"]


def contradicted(uri: str, publication: Publication | None, metadata: Metadata) -> str:
    """Returns how a signed checkpoint differs from what its folder's name and its publication say
    of it; empty where it does not."""
    step = named_step(uri)
    if step is not None and step != metadata.step:
        return f"it is of step {metadata.step}, and its folder's name says {step}"
    if publication is None:
        return ""
    published = (publication.run_id, publication.step, publication.parameter_hash)
    if published == (metadata.run_id, metadata.step, metadata.parameter_hash):
        return ""
    return (
        f"it is step {metadata.step} of run {metadata.run_id} with the parameter hash {metadata.parameter_hash}, and "
        f"its publication says step {publication.step} of run {publication.run_id} with "
        f"{publication.parameter_hash}"
    )


def later_step(latest: Publication, earlier: Iterable[Publication]) -> int | None:
    """Returns the latest step of the same run that was published before, if that is later."""
    steps = [publication.step for publication in earlier if publication.run_id == latest.run_id]
    return max((step for step in steps if step > latest.step), default=None)

"""Names of checkpoints: `latest`, a run's id, `run@step`, or the path or URI of a
folder."""

import re

from cluster.storage.freshness import named_step
from cluster.storage.interface import Storage
from cluster.storage.registry import LATEST
from cluster.storage.uris import absolute_uri, open_storage
from model.files.checkpoint_folder import MANIFEST
from raymill.errors import CheckpointError

_RUN = re.compile(r"(?P<run>[A-Za-z0-9][A-Za-z0-9._-]{0,63})(@(?P<step>\d+))?")


def checkpoint_uri(reference: str, storage_uri: str) -> str:
    """Returns the absolute location that a reference means, and `latest` as it is.

    A word is a file or folder here if there is one of that name, else a run of the storage: its
    folder, which means its newest checkpoint, or with `@step` the checkpoint of that step. Raises
    `CheckpointError` for a step that it lacks.
    """
    match = _RUN.fullmatch(reference)
    if reference == LATEST or match is None or _is_here(reference):
        return reference if reference == LATEST else absolute_uri(reference)
    run = open_storage(storage_uri).child(f"runs/{match['run']}")
    if not any(run.list()):
        return absolute_uri(reference)
    return run.uri if match["step"] is None else _of_step(run, int(match["step"]))


def _is_here(reference: str) -> bool:
    folder = open_storage(reference).local_path("")
    return folder is not None and folder.exists()


def checkpoint_steps(run: Storage) -> dict[str, int]:
    """Returns the step of each whole checkpoint of the run, by its name, in the order of names."""
    steps = {}
    for entry in run.list("checkpoints/"):
        _, name, *rest = entry.key.split("/")
        if rest == [MANIFEST] and (step := named_step(name)) is not None:
            steps[name] = step
    return dict(sorted(steps.items()))


def _of_step(run: Storage, step: int) -> str:
    """Returns the URI of the run's checkpoint of the step, of the newest attempt if several
    attempts took it."""
    steps = checkpoint_steps(run)
    named = [name for name, its_step in steps.items() if its_step == step]
    if not named:
        known = ", ".join(map(str, sorted(set(steps.values())))) or "none yet"
        raise CheckpointError(
            f"run {run.uri} has no checkpoint of step {step}; it has those of steps {known}"
        )
    return run.child(f"checkpoints/{named[-1]}").uri

"""A run by the name that a user gives it: its id, or its folder's path or URI."""

from cluster.storage import Storage, open_storage
from jobs.ledger import LEDGER, Ledger
from model.errors import UserError


class RunError(UserError):
    """There is no such run, or nothing to tell of it yet."""


def find_run(reference: str, storage_uri: str) -> Storage:
    """The run's storage, from its id under `storage_uri` or from its folder's path or URI. Raises `RunError`."""
    runs = open_storage(storage_uri).child("runs")
    candidates = [open_storage(reference)] if "/" in reference else [runs.child(reference), open_storage(reference)]
    for run in candidates:
        if run.exists(LEDGER):
            return run
    known = sorted({entry.key.split("/")[0] for entry in runs.list() if entry.key.endswith(f"/{LEDGER}")})
    raise RunError(
        f"unknown run {reference!r}: no {LEDGER} in {' or '.join(run.uri for run in candidates)}; "
        + (f"{runs.uri} has {', '.join(known[-8:])}" if known else f"{runs.uri} has no runs")
    )


def begun_ledger(run: Storage) -> Ledger:
    """Of a run with a completed step at least. Raises `RunError`."""
    ledger = Ledger.read(run)
    if not ledger.steps:
        raise RunError(f"{run.uri} has no completed step yet; ask again once it has one")
    return ledger

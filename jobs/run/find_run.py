"""Finds a run by its id or its folder's path or URI, and the token store that it was trained on."""

from collections.abc import Iterator
from contextlib import suppress
from itertools import islice

from cluster.settings.run import RunConfig
from cluster.storage.registry import LATEST, newest_first
from cluster.storage.uris import Storage, open_storage
from jobs.run.ledger import LEDGER, Ledger, Line
from jobs.run.signed_lines import shown_ledger
from jobs.tokens.division import Division, HeldOut
from jobs.tokens.holes import Holes, read_holes
from jobs.tokens.token_store import MANIFEST, Manifest, TokenStoreError
from raymill.errors import UserError


def find_run(reference: str, storage_uri: str) -> Storage:
    """Returns the run's storage, from its id under `storage_uri` or its folder's path or URI;
    `latest` is the run of the checkpoint that was published last, unless a run has that id. Raises
    `UserError`."""
    runs = open_storage(storage_uri).child("runs")
    if reference == LATEST and not any(runs.child(reference).list()):
        for newest in islice(newest_first(open_storage(storage_uri)), 1):
            reference = newest.checkpoint.partition("/checkpoints/")[0]
    candidates = [open_storage(reference)]
    if "/" not in reference:
        candidates.insert(0, runs.child(reference))
    for run in candidates:
        if run.exists(LEDGER):
            return run
    for run in candidates:
        if any(run.list("jobs/")):
            raise UserError(
                f"run {reference!r} has no step yet, and so no {LEDGER} in {run.uri}; "
                "`raymill status` says what it does"
            )
    places = " or ".join(run.uri for run in candidates)
    known = ", ".join(_begun_runs(runs)[-8:]) or "no runs"
    raise UserError(f"unknown run {reference!r}: no {LEDGER} in {places}; {runs.uri} has {known}")


def begun_ledger(run: Storage) -> Ledger:
    """Returns the ledger of a run with at least one completed step. Raises `UserError`."""
    ledger = shown_ledger(run)
    if not ledger.steps:
        raise UserError(f"{run.uri} has no completed step yet; try again once it has one")
    return ledger


def data_identity(ledger: Ledger) -> str | None:
    """Returns the identity of the token store, as the run's last attempt recorded it."""
    starts = ledger.events("start")
    return starts[-1].get("data_identity") if starts else None


def token_uses(storage: Storage) -> dict[str, list[str]]:
    """Returns what the runs of a storage use token stores for, in words, by the stores'
    identities."""
    runs = storage.child("runs")
    uses: dict[str, list[str]] = {}
    for name in _begun_runs(runs):
        starts = Ledger.read(runs.child(name)).events("start")
        for start in starts[-1:]:
            uses.setdefault(start.get("data_identity", ""), []).append(f"run {name} trains on it")
            for text, identity in start.get("validated_on", {}).items():
                uses.setdefault(identity, []).append(f"validation set {text} of run {name}")
    return uses


def _begun_runs(runs: Storage) -> list[str]:
    ledgers = [entry.key for entry in runs.list() if entry.key.endswith(f"/{LEDGER}")]
    return sorted({key.split("/")[0] for key in ledgers})


def last_start(ledger: Ledger, identity: str | None) -> Line:
    """Returns the newest attempt's `start` among those that trained on the token store with this
    identity; an empty line where there is none."""
    starts = [line for line in ledger.events("start") if line.get("data_identity") == identity]
    return starts[-1] if starts else {}


def division(start: Line) -> Division:
    """Returns how the attempt divided its token store."""
    return Division(HeldOut(start.get("held_out", HeldOut.DOCUMENTS)), start.get("end_tokens", 0))


def holes_of(run: Storage, config: RunConfig) -> Holes:
    """Returns what the run with these settings leaves out of its texts. Raises
    `TokenStoreError`."""
    return read_holes(_root(run), config.data.forgotten)


def find_tokens(run: Storage, identity: str | None) -> Storage:
    """Returns the finished token store with this identity, in the run's storage. Raises
    `TokenStoreError`."""
    store = next(stores_with(run, identity), None)
    if store is None:
        root = _root(run)
        raise TokenStoreError(
            f"none of the {len(_manifests(root))} token stores under {root.uri}/tokens is the one that {run.uri} was "
            f"trained on, of identity {(identity or 'unknown')[:12]}…; put it back there, or tokenize again with the "
            "run's settings"
        )
    return store


def stores_with(run: Storage, identity: str | None) -> Iterator[Storage]:
    """Yields the finished token stores with this identity in the run's storage: more than one where
    the same text was tokenized from two places."""
    root = _root(run)
    for key in _manifests(root):
        # A store that is damaged or of another format is not the right one.
        with suppress(ValueError, KeyError, TypeError, TokenStoreError):
            if Manifest.from_json(root.read_bytes(key)).identity == identity:
                yield root.child(key.removesuffix(f"/{MANIFEST}"))


def _root(run: Storage) -> Storage:
    return open_storage(run.uri.rpartition("/runs/")[0])


def _manifests(root: Storage) -> list[str]:
    return [entry.key for entry in root.list("tokens/") if entry.key.endswith(f"/{MANIFEST}")]

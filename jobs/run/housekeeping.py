"""Removes runs by name, and finds what no run of a storage needs any more: `raymill delete` and
`raymill gc`.

Both say what they would remove, and remove it only if they are told to. Nothing goes that an
endpoint serves or would return to, that `latest` means, or that another run began from.
"""

import json
import shlex
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cluster.output.job_log import LogReader, launches
from cluster.settings.data import TOKENS
from cluster.stages.run_mirrored import SILENCE_S, lease_key
from cluster.stages.stage_module import STAGES
from cluster.storage.bases import BASES
from cluster.storage.lease import living_holder
from cluster.storage.registry import endpoint_files, newest_first, served_by
from cluster.storage.uris import Storage, open_storage, place_of, places_to, storage_flag
from cluster.submission.record import read_record
from jobs.run.base import recorded_base
from jobs.run.checkpoints import RunCheckpoints
from jobs.run.history import CONFIG_FILE, recorded_config
from jobs.run.ledger import LEDGER, Ledger
from jobs.tokens.token_store import MANIFEST, SOURCES, read_manifest
from raymill.errors import UserError


@dataclass(frozen=True)
class Leftover:
    """A folder that nothing needs."""

    uri: str
    why: str
    num_files: int
    num_bytes: int


def delete_run(run: Storage, storage: Storage, *, yes: bool) -> dict[str, Any]:
    """Deletes the run's folder if `yes`, and returns what that is. Raises `UserError` for a run
    that is running or that something else needs, and `StorageError`."""
    stages = running_stages(run)
    if stages:
        raise UserError(f"{run.uri} is running ({', '.join(stages)}): `raymill stop` ends it first")
    reasons = needed_places(storage, besides=run).get(place_of(run.uri))
    if reasons:
        named = "; ".join(f"{uri} {why}" for uri, why in reasons.items())
        raise UserError(f"{run.uri} stays: {named}{_to_forget(storage, reasons)}")
    folder = _leftover(run, "asked for")
    return _removed(storage, [folder], yes=yes)


def collect(storage: Storage, *, yes: bool) -> dict[str, Any]:
    """Finds token stores that no run was trained on, bases that no run's adapter stands on,
    checkpoints that are torn or damaged, and runs without a step; deletes them if `yes`. Raises
    `UserError` while a run is running, which may be about to use any of them."""
    runs = [storage.child(f"runs/{name}") for name in _names(storage, "runs/")]
    for run in runs:
        stages = running_stages(run)
        if stages:
            raise UserError(
                f"{run.uri} is running ({', '.join(stages)}): what it needs is known when it has ended"
            )
    begun: list[Storage] = []
    unused: list[Leftover] = []
    for run in runs:
        if _is_begun(run):
            begun.append(run)
        elif not _is_awaited(run):
            unused.append(_leftover(run, "it has no step"))
    for run in begun:
        checkpoints = RunCheckpoints(run)
        for name, why in _broken(checkpoints):
            unused.append(_leftover(checkpoints.folder(name), why))
    unused += _unused_stores(storage, begun)
    unused += _unused_bases(storage, runs)
    needed = needed_places(storage, besides=None)
    leftovers = [folder for folder in unused if place_of(folder.uri) not in needed]
    return _removed(storage, leftovers, yes=yes)


def _broken(checkpoints: RunCheckpoints) -> Iterable[tuple[str, str]]:
    yield from ((name, "it was never complete") for name in checkpoints.torn)
    yield from ((name, "it is damaged") for name in checkpoints.quarantined)


def _unused_stores(storage: Storage, runs: list[Storage]) -> list[Leftover]:
    """Returns the finished token stores that no run was trained or validated on. One that is
    unfinished has hours of work in it, and stays."""
    identities: set[str] = set()
    validating: set[str] = set()
    for run in runs:
        identities |= {start["data_identity"] for start in Ledger.read(run).events("start")}
        texts = _texts(recorded_config(run).data.validation.values())
        validating.update(map(place_of, texts))
    unused = []
    for name in _names(storage, "tokens/"):
        store = storage.child(f"tokens/{name}")
        if not store.exists(MANIFEST) or read_manifest(store).identity in identities:
            continue
        listed = json.loads(store.find_bytes(SOURCES) or b'{"sources": []}')["sources"]
        if validating.isdisjoint(map(place_of, _texts(listed))):
            unused.append(_leftover(store, "no run was trained on it"))
    return unused


def _texts(sources: Iterable[str]) -> Iterable[str]:
    """Yields those among sources of data that are no finished token stores."""
    return (uri for uri in sources if not uri.startswith(TOKENS))


def _unused_bases(storage: Storage, runs: list[Storage]) -> list[Leftover]:
    """Returns the frozen weights on which no run's adapter stands."""
    used: set[str] = set()
    for run in runs:
        base = recorded_base(run)
        if base:
            used.add(base.uri.rpartition("/")[2])
    unused: list[Leftover] = []
    for name in _names(storage, BASES):
        if name not in used:
            unused.append(_leftover(storage.child(f"{BASES}{name}"), "no adapter stands on it"))
    return unused


def needed_places(storage: Storage, *, besides: Storage | None) -> dict[str, dict[str, str]]:
    """Returns the places that have to stay, each with the locations that lead through it and the
    reasons why these are needed; a run's own start is no reason to keep it."""
    needed: dict[str, dict[str, str]] = {}

    def need(uri: str, why: str) -> None:
        for place in places_to(uri):
            needed.setdefault(place, {})[uri] = why

    for name in _names(storage, "runs/"):
        run = storage.child(f"runs/{name}")
        if (besides is None or run.uri != besides.uri) and run.exists(CONFIG_FILE):
            config = recorded_config(run)
            for uri in (*config.data.source, *config.data.validation.values()):
                need(uri.removeprefix(TOKENS), f"is what run {name} reads")
            for uri in filter(None, (config.train.init_from, config.data.tokenizer)):
                need(uri, f"is what run {name} began from")
    newest = next(newest_first(storage), None)
    if newest:
        need(newest.checkpoint, "is latest")
    for name in endpoint_files(storage):
        for uri in served_by(storage, name):
            need(uri, f"is served, or what the endpoint {name} returns to")
    return needed


def _to_forget(storage: Storage, uris: Iterable[str]) -> str:
    """Returns the end of an error: what forgets each endpoint that needs one of these checkpoints."""
    needed, where = set(uris), storage_flag(storage.uri)
    lines = [
        f"`raymill delete --endpoint {shlex.quote(name)}{where}`"
        for name in endpoint_files(storage)
        if needed.intersection(served_by(storage, name))
    ]
    return f". Once it has ended, an endpoint is forgotten by {', '.join(lines)}" if lines else ""


def running_stages(run: Storage) -> list[str]:
    """Returns the stages of the run that are running."""
    return [stage for stage in STAGES if living_holder(run, lease_key(stage), timeout_s=SILENCE_S)]


def _is_begun(run: Storage) -> bool:
    return run.exists(LEDGER) and run.exists(CONFIG_FILE) and bool(Ledger.read(run).steps)


def _is_awaited(run: Storage) -> bool:
    """Reports whether the run was submitted, and no launch of it has ended: it may wait for a
    cluster or a queue."""
    names = launches(run)
    return read_record(run) is not None and (not names or LogReader(run, names[-1]).ended() is None)


def _names(storage: Storage, folder: str) -> list[str]:
    return sorted({entry.key.split("/")[1] for entry in storage.list(folder)})


def _leftover(folder: Storage, why: str) -> Leftover:
    sizes = [entry.size for entry in folder.list()]
    return Leftover(folder.uri, why, len(sizes), sum(sizes))


def _removed(storage: Storage, leftovers: list[Leftover], *, yes: bool) -> dict[str, Any]:
    """Returns the folders as a result, deleted if `yes`."""
    for leftover in leftovers if yes else ():
        folder = open_storage(leftover.uri)
        here = folder.local_path("")
        if here is not None:
            shutil.rmtree(here)
        else:
            for entry in folder.list():
                folder.delete(entry.key)
    rows = [vars(leftover) for leftover in leftovers]
    total = sum(leftover.num_bytes for leftover in leftovers)
    return {
        "storage": storage.uri,
        "leftovers": rows,
        "bytes": total,
        "deleted": yes and bool(leftovers),
    }

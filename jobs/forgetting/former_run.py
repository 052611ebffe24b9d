"""Lists what holds of a former run what was forgotten, and removes it where nothing needs it.

Copies elsewhere are not known: what was exported, pushed or backed up out of the storage.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.output.json_result import JsonResult
from cluster.storage.uris import Storage, open_storage, place_of
from jobs.forgetting.forget_plan import Forgetting
from jobs.run.checkpoints import RunCheckpoints, step_of
from jobs.run.find_run import stores_with, token_uses
from jobs.run.history import recorded_config
from jobs.run.housekeeping import needed_places, running_stages
from jobs.tokens.document_map import DOCUMENTS
from raymill.errors import UserError

_METADATA = "raymill.json"
_TRACE_INDEX = "trace"  # the folder of a store's trace index


@dataclass(frozen=True)
class Remnant(JsonResult):
    """Something that holds what was forgotten."""

    uri: str
    what: str
    needed_by: list[str]  # in words: why it stays
    can_be_removed: bool  # by --purge, where nothing needs it
    is_removed: bool = False


def remnants(forgetting: Forgetting) -> list[Remnant]:
    """Returns all that is known of: checkpoints and their copies in the storage, runs that began
    from them, and what belongs to the token store."""
    storage, former = forgetting.storage, forgetting.former
    needed = needed_places(storage, besides=None)
    found = [
        Remnant(uri, what, _reasons(needed, uri), can_be_removed=True)
        for uri, what in _tainted(forgetting)
    ]
    for name, source in _began_from(storage, {remnant.uri for remnant in found}):
        uri = storage.child(f"runs/{name}").uri
        found.append(Remnant(uri, f"a run that began from {source}", [], can_be_removed=False))
    if stages := running_stages(former):
        found.append(
            Remnant(
                former.uri,
                f"copies of its state in the nodes' memory, as it is running ({', '.join(stages)})",
                ["`raymill stop` ends it"],
                can_be_removed=False,
            )
        )
    samples = any(line.get("samples") for line in forgetting.opened.ledger.events("validation"))
    of_ledger = "ledger and logs, with what the model wrote" if samples else "ledger and logs"
    found.append(Remnant(former.uri, of_ledger, ["`raymill delete` removes the run"], False))
    return [*found, *_of_store(forgetting)]


def _tainted(forgetting: Forgetting) -> Iterator[tuple[str, str]]:
    """Yields the checkpoints of the former run that have read a document, and copies of them."""
    storage, former, first_step = forgetting.storage, forgetting.former, forgetting.asked.first_step
    checkpoints = RunCheckpoints(former)
    for name in [*checkpoints.names, *checkpoints.torn, *checkpoints.quarantined]:
        if step_of(name) >= first_step:
            yield checkpoints.uri(name), "a checkpoint"
    former_id = former.uri.rpartition("/")[2]
    for entry in storage.list():
        folder, _, file = entry.key.rpartition("/")
        if file != _METADATA or folder.startswith("runs/"):
            continue
        told = json.loads(storage.find_bytes(entry.key) or b"{}")
        if told.get("run_id") == former_id and told.get("step", 0) >= first_step:
            yield storage.child(folder).uri, "an exported checkpoint"


def _began_from(storage: Storage, tainted: set[str]) -> Iterator[tuple[str, str]]:
    """Yields the runs that began from one of these checkpoints, by name."""
    names = {entry.key.split("/")[1] for entry in storage.list("runs/")}
    for name in sorted(names):
        run = storage.child(f"runs/{name}")
        source = recorded_config(run).train.init_from if run.exists("config.yaml") else None
        if source and any(place_of(source) == place_of(uri) for uri in tainted):
            yield name, source


def _reasons(needed: dict[str, dict[str, str]], uri: str) -> list[str]:
    return [f"{named} {why}" for named, why in needed.get(place_of(uri), {}).items()]


def _of_store(forgetting: Forgetting) -> Iterator[Remnant]:
    """Yields what belongs to the token store, and the runs that read it."""
    storage, new_run = forgetting.storage, forgetting.plan.new_run
    former = forgetting.former.uri.rpartition("/")[2]
    uses = token_uses(storage).get(forgetting.holes.data_identity, [])
    others = [use for use in uses if f"run {former} " not in use and f"run {new_run} " not in use]
    for store in stores_with(forgetting.new, forgetting.holes.data_identity):
        new = f"run {new_run} is resumed and audited with it"
        yield Remnant(store.uri, "the tokens themselves", [new, *others], can_be_removed=False)
        if store.exists(DOCUMENTS):
            proven = f"run {new_run} is verified with it"
            yield Remnant(
                f"{store.uri}/{DOCUMENTS}",
                "the document map: file and place of each document",
                [proven, *others],
                can_be_removed=False,
            )
        if any(store.list(f"{_TRACE_INDEX}/")):
            yield Remnant(
                f"{store.uri}/{_TRACE_INDEX}",
                "the trace index: hashes of its passages; `raymill trace index` makes it again",
                others,
                can_be_removed=True,
            )


def purge(forgetting: Forgetting) -> list[Remnant]:
    """Removes what can be and nothing needs. Returns all remnants, each with what became of it.
    Raises `UserError` while the former run is running."""
    if stages := running_stages(forgetting.former):
        raise UserError(
            f"{forgetting.former.uri} is running ({', '.join(stages)}): `raymill stop` ends it first"
        )
    done: list[Remnant] = []
    for remnant in remnants(forgetting):
        goes = remnant.can_be_removed and not remnant.needed_by
        if goes:
            _remove(remnant.uri, forgetting.former)
        done.append(Remnant(**{**vars(remnant), "is_removed": goes}))
    return done


def _remove(uri: str, former: Storage) -> None:
    checkpoints, name = RunCheckpoints(former), uri.rpartition("/")[2]
    if uri == checkpoints.uri(name):
        checkpoints.delete([name])
        return
    place = open_storage(uri)
    for entry in [*place.list()]:
        place.delete(entry.key)

"""`raymill promote` and `raymill rollback`."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from cluster.endpoint.delivery import Operator, follow
from cluster.endpoint.endpoint import Endpoint
from cluster.output.progress import say
from cluster.settings.parser import ConfigError
from cluster.storage.uris import join_uri, open_storage
from model.errors import UserError

Gate = Callable[[str], dict[str, Any]]
"""Returns the request fields that say on what a checkpoint and the live version are compared."""

MAX_GATE_TEXT = 1 << 18  # characters


def promote(arguments: argparse.Namespace) -> dict[str, Any]:
    """Promotes, and waits until the checkpoint has survived its watch window or serves as a canary."""
    asked = [arguments.checkpoint is not None, arguments.finish, arguments.follow is not None]
    if sum(asked) != 1:
        raise ConfigError("name a checkpoint to promote, or give --follow RUN, or --finish for the current canary")
    operator = _operator(arguments)
    gate = gate_of(arguments.gate_source, arguments.storage_uri)
    terms = {
        "canary_percent": arguments.canary,
        "watch_s": arguments.watch_s,
        "max_loss_increase": arguments.max_loss_increase,
    }
    if arguments.follow is not None:
        follow_run(operator, arguments.follow, arguments.storage_uri, terms=terms, gate=gate)
    if arguments.finish:
        operator.finish()
        return _result(operator.wait())
    operator.promote(arguments.checkpoint, terms=terms, gate=gate(arguments.checkpoint))
    until = ("steady",) if arguments.canary is None else ("canary", "steady")
    return _result(operator.wait(until=until))


def rollback(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rolls back, and waits until the previous version serves."""
    operator = _operator(arguments)
    if operator.roll_back()["phase"] == "loading":
        return _result(operator.wait())
    return _result(operator.wait_until_steady())


def follow_run(operator: Operator, run: str, storage_uri: str, *, terms: dict[str, Any], gate: Gate) -> NoReturn:
    """Promotes new checkpoints of a run (an id, or the path or URI of its folder) until a signal ends it."""
    folder = open_storage(run if "/" in run else join_uri(storage_uri, f"runs/{run}"))
    say(f"promoting the newest checkpoint of {folder.uri} as it appears; Ctrl-C ends it")
    follow(operator, folder, terms=terms, gate=gate)


def _operator(arguments: argparse.Namespace) -> Operator:
    endpoint = Endpoint.load(arguments.storage_uri, url=arguments.url, admin_key_file=arguments.admin_key_file)
    return Operator(endpoint)


def gate_of(source: str | None, storage_uri: str) -> Gate:
    if source is None:
        return lambda checkpoint: {"gate_rows": _validation_rows(checkpoint, storage_uri)}
    fixed = {} if source == "none" else _text_or_rows(Path(source))
    return lambda checkpoint: fixed


def _validation_rows(checkpoint: str, storage_uri: str) -> list[list[int]]:
    """Returns validation rows of the run that wrote the checkpoint; reports it if they are unknown."""
    from jobs.evaluate import gate_rows

    found = gate_rows(checkpoint, storage_uri)
    if not found["rows"]:
        say(f"no loss is compared, the gate is the self-test alone ({found['reason']}); name a text: --gate-source")
    return list(found["rows"])


def _text_or_rows(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        return {"gate_rows": json.loads(text)} if path.suffix == ".json" else {"gate_text": text[:MAX_GATE_TEXT]}
    except (OSError, ValueError) as error:
        raise UserError(f"--gate-source {path} cannot be read: {error}") from None


def _result(state: dict[str, Any]) -> dict[str, Any]:
    versions = {role: state[role] and state[role]["version"] for role in ("live", "candidate", "previous")}
    return {"phase": state["phase"], "checkpoint": state["live"]["checkpoint"], **versions}

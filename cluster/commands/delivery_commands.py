"""`raymill promote` and `raymill rollback`: from their parsed arguments to the result that is printed."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from cluster.endpoint.delivery import Operator, follow
from cluster.endpoint.endpoint import Endpoint
from cluster.output.progress import say
from cluster.settings.parser import ConfigError
from cluster.storage.uris import absolute_uri, join_uri, open_storage
from model.errors import UserError

Gate = Callable[[str], dict[str, Any]]

MAX_GATE_TEXT = 1 << 18  # characters


def promote(arguments: argparse.Namespace) -> dict[str, Any]:
    """Waits until the checkpoint has outlasted its watch window, or serves as a canary."""
    asked = [arguments.checkpoint is not None, arguments.finish, arguments.follow is not None]
    if sum(asked) != 1:
        raise ConfigError("name a checkpoint to promote, or give --follow RUN, or --finish for the canary that is on")
    operator = _operator(arguments)
    storage_uri = _storage_uri(arguments)
    gate = gate_of(arguments.gate_source, storage_uri)
    if arguments.follow is not None:
        follow_run(operator, arguments.follow, storage_uri, terms=_terms(arguments), gate=gate)
    if arguments.finish:
        operator.finish()
        return _result(operator.wait(say=say))
    operator.promote(arguments.checkpoint, terms=_terms(arguments), gate=gate(arguments.checkpoint))
    until = ("steady",) if arguments.canary is None else ("canary", "steady")
    return _result(operator.wait(until=until, say=say))


def rollback(arguments: argparse.Namespace) -> dict[str, Any]:
    """Waits until the version before serves."""
    operator = _operator(arguments)
    if operator.roll_back()["phase"] == "loading":
        return _result(operator.wait(say=say))
    return _result(operator.wait_until_steady())


def follow_run(operator: Operator, run: str, storage_uri: str, *, terms: dict[str, Any], gate: Gate) -> NoReturn:
    """Until a signal ends it. `run` is an id, or a path or URI of its folder."""
    folder = open_storage(run if "/" in run else join_uri(storage_uri, f"runs/{run}"))
    say(f"promoting the newest checkpoint of {folder.uri} as it appears; Ctrl-C ends it")
    follow(operator, folder, terms=terms, gate=gate, say=say)


def _operator(arguments: argparse.Namespace) -> Operator:
    endpoint = Endpoint.load(_storage_uri(arguments), url=arguments.url, admin_key_file=arguments.admin_key_file)
    return Operator(endpoint)


def _terms(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "canary_percent": arguments.canary,
        "watch_s": arguments.watch_s,
        "max_loss_increase": arguments.max_loss_increase,
    }


def gate_of(source: str | None, storage_uri: str) -> Gate:
    """What a checkpoint and the live version are measured on: the fields that say so."""
    if source is None:
        return lambda checkpoint: {"gate_rows": _validation_rows(checkpoint, storage_uri)}
    fixed = {} if source == "none" else _text_or_rows(Path(source))
    return lambda checkpoint: fixed


def _validation_rows(checkpoint: str, storage_uri: str) -> list[list[int]]:
    """Of the run that wrote the checkpoint; where they are not known, that is told."""
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


def _storage_uri(arguments: argparse.Namespace) -> str:
    return absolute_uri(getattr(arguments, "storage.uri"))

"""`raymill promote` and `raymill rollback`."""

import json
import time
from pathlib import Path
from typing import Any, NoReturn

from cluster.commands.arguments import (
    ADAPTER,
    ADMIN_KEY,
    CANARY_PERCENT,
    FINISH,
    FOLLOWED,
    GATE_SOURCE,
    MAX_LOSS_INCREASE,
    PROMOTED,
    STORAGE,
    URL,
    WATCH_S,
)
from cluster.commands.command import Arguments, Result
from cluster.endpoint.delivery import Operator, OrderRefusedError
from cluster.endpoint.endpoint import Endpoint
from cluster.output.progress import say
from cluster.storage.references import checkpoint_uri
from cluster.storage.registry import named_checkpoint
from cluster.storage.uris import join_uri, open_storage
from raymill.errors import UserError

_MAX_GATE_CHARS = 1 << 18
_FOLLOW_S = 2.0


def promote(arguments: Arguments) -> Result:
    """Promotes, and waits until the checkpoint has survived its watch window or serves as a
    canary."""
    operator, storage_uri = _operator(arguments), arguments[STORAGE]
    operator.require_access()  # the gate's rows take PyTorch, and seconds
    source = arguments[GATE_SOURCE]
    gate = None if source is None else _text_or_rows(source)
    terms = {
        "canary_percent": arguments[CANARY_PERCENT],
        "watch_s": arguments[WATCH_S],
        "max_loss_increase": arguments[MAX_LOSS_INCREASE],
    }
    if (run := arguments[FOLLOWED]) is not None:
        follow_run(operator, run, storage_uri, terms=terms, gate=gate)
    if arguments[FINISH]:
        operator.finish()
        return _result(operator.wait())
    reference = arguments[PROMOTED]
    assert reference is not None, "one of the three is given"
    checkpoint = checkpoint_uri(reference, storage_uri)
    if "/" not in reference:  # a run of the storage, where a path may be the endpoint's own
        checkpoint = named_checkpoint(checkpoint, storage_uri)
    fields = _gate_rows(checkpoint, storage_uri) if gate is None else gate
    operator.promote(checkpoint, terms=terms, gate=fields)
    until = ("steady",) if arguments[CANARY_PERCENT] is None else ("canary", "steady")
    return _result(operator.wait(until=until))


def rollback(arguments: Arguments) -> Result:
    """Rolls back, and waits until the previous version serves."""
    operator = _operator(arguments)
    if operator.roll_back()["phase"] == "loading":
        return _result(operator.wait())
    return _result(operator.wait_until_steady())


def follow_run(
    operator: Operator,
    run: str,
    storage_uri: str,
    *,
    terms: dict[str, Any],
    gate: dict[str, Any] | None,
) -> NoReturn:
    """Promotes the newest checkpoint of a run (an id, or the path or URI of its folder) whenever it
    is newer than the live one, until a signal. A checkpoint that is refused or rolled back is
    reported and not tried again."""
    from jobs.run.checkpoints import RunCheckpoints

    folder = open_storage(run if "/" in run else join_uri(storage_uri, f"runs/{run}"))
    checkpoints = RunCheckpoints(folder)
    say(f"promoting the newest checkpoint of {folder.uri} as it appears; Ctrl-C ends it")
    tried: set[str] = set()
    while True:
        live = operator.wait_until_steady()["live"]["checkpoint"]
        is_of_run = live.startswith(f"{folder.uri}/checkpoints/")
        uris = [
            uri
            for name in checkpoints.names
            if (uri := checkpoints.uri(name)) > live or not is_of_run
        ]
        checkpoint = next((uri for uri in reversed(uris) if uri not in tried), None)
        if checkpoint is None:
            time.sleep(_FOLLOW_S)
            continue
        tried.add(checkpoint)
        try:
            fields = _gate_rows(checkpoint, storage_uri) if gate is None else gate
            operator.promote(checkpoint, terms=terms, gate=fields)
            operator.wait()
        except OrderRefusedError as error:
            say(f"not promoted: {error}")


def _operator(arguments: Arguments) -> Operator:
    endpoint = Endpoint.load(
        arguments[STORAGE], url=arguments[URL], admin_key_file=arguments[ADMIN_KEY]
    )
    return Operator(endpoint, adapter=arguments[ADAPTER])


def _gate_rows(checkpoint: str, storage_uri: str) -> dict[str, Any]:
    """Returns validation rows of the run that wrote the checkpoint; reports it if they are
    unknown."""
    say(f"reading the text on which {checkpoint} is compared with the live version")
    from jobs.evaluate import gate_rows

    found = gate_rows(checkpoint, storage_uri)
    if not found["rows"]:
        say(
            f"no loss is compared, the gate is the self-test alone ({found['reason']}); name a text: --gate-source"
        )
    return {"gate_rows": list(found["rows"])}


def _text_or_rows(source: str) -> dict[str, Any]:
    """Returns the request fields with what a checkpoint and the live version are compared on."""
    if source == "none":
        return {}
    try:
        text = Path(source).read_text(encoding="utf-8")
        return (
            {"gate_rows": json.loads(text)}
            if source.endswith(".json")
            else {"gate_text": text[:_MAX_GATE_CHARS]}
        )
    except (OSError, ValueError) as error:
        raise UserError(f"--gate-source {source} cannot be read: {error}") from None


def _result(state: dict[str, Any]) -> Result:
    versions = {
        role: state[role] and state[role]["version"] for role in ("live", "candidate", "previous")
    }
    return Result({"phase": state["phase"], "checkpoint": state["live"]["checkpoint"], **versions})

"""Lays out the run that forgets: the former run's state from before it read any of the documents,
and the lines of its ledger up to there.

    forgotten/HASH.json   the documents, which the settings name by that hash
    checkpoints/          the newest checkpoint from before, and that of step 0 if there is one
    ledger.jsonl          the steps that stay, and a line that says from which run they are
    config.yaml           last: without it the run is laid out again

What is trained from there on is an ordinary run, on any number of workers.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.output.progress import say
from cluster.settings.run import to_yaml
from cluster.storage.uris import Storage
from jobs.forgetting.forget_plan import Forgetting
from jobs.proof.recorded.checkpoint import CheckpointRecord, state_problem
from jobs.run.base import BASE_FILE
from jobs.run.checkpoints import RunCheckpoints, step_of
from jobs.run.end import FORGOTTEN
from jobs.run.history import CONFIG_FILE, recorded_config
from jobs.run.ledger import LEDGER, Ledger, Line
from jobs.run.ledger_chain import chain_of, encoded, hash_of
from jobs.training.guards import GuardState
from model.files.checkpoint_folder import MANIFEST
from model.signing.signature import MODEL, TRAINING
from raymill.errors import UserError

_OF_STEPS = (None, "skip", "validation", "layers", "phases")
_OF_FORMER = {MODEL, TRAINING}
"""Signatures, which state a line of the former run's ledger."""


def fork(forgetting: Forgetting) -> str | None:
    """Makes the new run as one that was stopped after its newest checkpoint before the first step
    concerned; does nothing where it is there. Returns that checkpoint's name, None where the run
    begins with the first step. Raises `UserError`."""
    new = forgetting.new
    if new.exists(CONFIG_FILE):
        return _begun(forgetting)
    forgetting.holes.store(forgetting.storage)
    base = forgetting.former.find_bytes(BASE_FILE)
    if base is not None:
        new.write_bytes(BASE_FILE, base)
    start = _copied(forgetting)
    _write_ledger(new, _front(forgetting, start))
    new.write_bytes(CONFIG_FILE, to_yaml(forgetting.config).encode())
    return start


def _begun(forgetting: Forgetting) -> str | None:
    """Returns from which checkpoint the new run was begun. Raises `UserError` for another run of
    that name."""
    new = forgetting.new
    told = Ledger.read(new).events(FORGOTTEN)
    if recorded_config(new).data.forgotten != forgetting.holes.hash or not told:
        raise UserError(
            f"{new.uri} is another run, which does not forget these documents of {forgetting.former.uri}; "
            "`raymill delete` removes it"
        )
    checkpoint: str | None = told[-1]["checkpoint"]
    return checkpoint


def _copied(forgetting: Forgetting) -> str | None:
    """Copies what the new run begins from; returns the newest checkpoint's name."""
    former, ledger = forgetting.former, forgetting.opened.ledger
    checkpoints, first_step = RunCheckpoints(former), forgetting.asked.first_step
    is_left_out = GuardState(rollbacks=ledger.rollbacks).leaves_out
    with tempfile.TemporaryDirectory(prefix="raymill-forget-") as scratch:
        newest, damaged = checkpoints.find(
            Path(scratch), left_out=lambda step: step >= first_step or is_left_out(step)
        )
        for name, problems in damaged.items():
            say(f"{checkpoints.uri(name)} is passed over: {'; '.join(problems)}")
        if newest is None:
            return None
        if problem := state_problem(newest, CheckpointRecord.in_ledger(newest.name, ledger)):
            raise UserError(f"nothing can be trained again from {newest.name}: {problem}")
        _copy(newest, forgetting.new)
        # An audit takes the first steps again from what a warm start began with
        for name in checkpoints.names:
            if step_of(name) == 0 and name != newest.name:
                _copy(checkpoints.fetch(name, Path(scratch)), forgetting.new)
        return newest.name


def _copy(checkpoint: Path, new: Storage) -> None:
    """Copies a checkpoint without its signatures, its manifest last."""
    place = new.child(f"checkpoints/{checkpoint.name}")
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    named = {path.relative_to(checkpoint).as_posix(): path for path in files}
    for name in sorted(named.keys() - _OF_FORMER, key=lambda name: (name == MANIFEST, name)):
        place.upload_file(named[name], name)


def _front(forgetting: Forgetting, start: str | None) -> list[Line]:
    """Returns the lines of the new run's ledger: those of the steps that stay, and where they are
    from."""
    former, ledger = forgetting.former, forgetting.opened.ledger
    step = step_of(start) if start else 0
    copies = RunCheckpoints(forgetting.new)
    places = {name: copies.uri(name) for name in copies.names}
    kept = lines_to(ledger, step, places) if start else []
    chain = chain_of((former.find_bytes(LEDGER) or b"").rpartition(b"\n")[0].splitlines())
    kept.append(
        {
            "event": FORGOTTEN,
            "time": kept[-1]["time"] if kept else round(time.time(), 3),
            "run": former.uri.rpartition("/")[2],
            "ledger": {"line": chain.num_lines, "sha256": chain.head},
            "checkpoint": start,
            "step": step,
            "documents": forgetting.holes.hash,
        }
    )
    return kept


def lines_to(ledger: Ledger, step: int, places: Mapping[str, str]) -> list[Line]:
    """Returns the lines of a ledger that say how the state after a step came about: starts, steps
    and what was decided and measured at them, each step once; and the lines of the checkpoints that
    were copied, by name, to these places."""
    counting = {id(line) for line in ledger.steps}
    kept: list[Line] = []
    for line in ledger.standing.lines:
        stored: Line = {}
        match line.get("event"):
            case None:
                is_kept = id(line) in counting and line["step"] <= step
            case "rollback":
                is_kept = line["last"] < step
            case "start":
                is_kept = line["step"] < step
            case "tolerance_mode":
                is_kept = True
            case "checkpoint":
                name = line["checkpoint"].rpartition("/")[2]
                is_kept = name in places
                stored = {"checkpoint": places.get(name)}
            case event:
                is_kept = event in _OF_STEPS and line["step"] <= step
        if is_kept:
            kept.append(line | stored)
    return kept


def _write_ledger(run: Storage, lines: Sequence[Line]) -> None:
    """Writes the lines, each with the hash of the one before."""
    head: str | None = None
    content: list[bytes] = []
    for line in lines:
        content.append(encoded(line, head))
        head = hash_of(content[-1])
    run.write_bytes(LEDGER, b"".join(line + b"\n" for line in content))

"""Compares a kept checkpoint with what a run's ledger recorded of it."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.run.checkpoints import generation_of, step_of
from jobs.run.ledger import Ledger, Line
from model.files.checkpoint_folder import (
    MANIFEST,
    Metadata,
    fingerprint,
    manifest_files,
    read_metadata,
    state_files,
    verify_checkpoint,
)
from model.files.hf_config import read_shape
from model.files.state_hash import COUNT, StoredState, VectorsHash, read_state
from model.files.tensor_contents import TensorContents, contents_in
from model.shapes import parameter_shapes
from raymill.errors import CheckpointError

_PIECE_BYTES = 1 << 20
_OF_STARTS = {"data_identity", "precision", "code_version", "tokens_seen"}
"""Fields of which the ledger may have several values: that of the attempt that wrote it counts."""


@dataclass(frozen=True)
class CheckpointRecord:
    """A ledger's record of one checkpoint."""

    name: str
    line: Line | None  # the last `checkpoint` line that names it
    before: Ledger  # the lines up to that one, or all

    @classmethod
    def in_ledger(cls, name: str, ledger: Ledger) -> "CheckpointRecord":
        for number in range(len(ledger.lines), 0, -1):
            line = ledger.lines[number - 1]
            if line.get("event") == "checkpoint" and line["checkpoint"].rpartition("/")[2] == name:
                return cls(name, line, Ledger(ledger.lines[:number]))
        return cls(name, None, ledger)


def checkpoint_problems(folder: Path, record: CheckpointRecord) -> list[str]:
    """Returns what is wrong with a checkpoint: its files compared with its manifest, and manifest,
    weights, training state and metadata with the ledger."""
    try:
        # Files and values are hashed beside each other: each is a pass over all bytes
        with ThreadPoolExecutor(1) as beside:
            reading = beside.submit(_read, folder)
            altered = verify_checkpoint(folder)
            state, stored = reading.result()
    except CheckpointError as error:
        return verify_checkpoint(folder) or [str(error)]
    if altered:
        return altered
    metadata = read_metadata(folder)
    problems = _said_otherwise(
        {
            "its parameters' hash": (
                state.hashes.parameters,
                ("raymill.json", metadata.parameter_hash),
                ("the ledger", _of_line(record, "parameter_hash")),
            ),
            "its training state's hash": (
                state.hashes.of_state(metadata),
                ("the ledger", _of_line(record, "state_hash")),
            ),
            f"its {MANIFEST}'s hash": (
                fingerprint(folder / MANIFEST)["sha256"],
                ("the ledger", _of_line(record, "manifest_hash")),
            ),
        }
    )
    if record.line is not None and "state_hash" not in record.line:
        problems.append(
            "the ledger has no hash of its training state: an earlier version of raymill wrote it, or somebody took "
            "it out"
        )
    problems += metadata_problems(metadata, record)
    if metadata.step == 0:
        problems += _start_problems(state, stored, shapes=parameter_shapes(read_shape(folder)))
    return problems


def state_problem(folder: Path, record: CheckpointRecord) -> str | None:
    """Returns why training may not be taken again from a checkpoint: its state is not the one that
    the ledger recorded."""
    if record.line is None:
        return "no line of the ledger names it"
    state, _ = _read(folder)
    wanted = record.line.get("state_hash")
    found = state.hashes.of_state(read_metadata(folder))
    if wanted in (None, found):  # `verify` tells of a line without one
        return None
    return f"its training state's hash is {_short(found)}, the ledger says {_short(wanted)}"


def _read(folder: Path) -> tuple[StoredState, TensorContents]:
    files = state_files(manifest_files(folder), place=str(folder))
    stored = contents_in(folder, files)
    return read_state(stored, parameter_shapes(read_shape(folder))), stored


def _of_line(record: CheckpointRecord, field: str) -> str | None:
    return record.line.get(field) if record.line else None


def _said_otherwise(hashes: dict[str, Sequence[Any]]) -> list[str]:
    """Returns a sentence for each place that says another hash than was found."""
    problems: list[str] = []
    for what, (found, *places) in hashes.items():
        for place, said in places:
            if said not in (None, found):
                problems.append(f"{what} is {_short(found)}, {place} says {_short(said)}")
    return problems


def metadata_problems(metadata: Metadata, record: CheckpointRecord) -> list[str]:
    """Returns what raymill.json says otherwise than the name of its folder and the ledger."""
    ledger, line = record.before, record.line or {}
    known: dict[str, list[Any]] = {
        "step": [step_of(record.name)],
        "generation": [generation_of(record.name)],
    }
    if "val_loss" in line:
        known["val_loss"] = [line["val_loss"]]
    if metadata.step:
        of_step = [other for other in ledger.lines if other.get("step") == metadata.step]
        known["tokens_seen"] = [other["tokens_seen"] for other in of_step if "event" not in other]
        validations = [other for other in of_step if other.get("event") == "validation"]
        if metadata.val_loss is not None:
            for name in ("val_loss", "val_bits_per_byte"):
                measured = [other[name] for other in validations[-1:]] or [None]
                known[name] = known.get(name, []) + measured
        starts = ledger.events("start")
        for name in ("data_identity", "precision", "code_version"):
            known[name] = [*dict.fromkeys(start[name] for start in starts)]
    problems = []
    for name, values in known.items():
        told = getattr(metadata, name)
        if values and (told not in values if name in _OF_STARTS else {told} != {*values}):
            problems.append(f"raymill.json says {name} {told}, the ledger says {values[-1]}")
    windows = [[*window] for window in (metadata.guard or {}).get("rollbacks", ())]
    # The newest may have come while this checkpoint was being stored
    if windows != [[*window] for window in ledger.rollbacks[: len(windows)]]:
        problems.append(f"raymill.json says rollbacks {windows}, which the ledger does not have")
    return problems


def _start_problems(
    state: StoredState, stored: TensorContents, *, shapes: dict[str, Any]
) -> list[str]:
    """Returns whether a checkpoint of step 0 has anything but weights: an update rule that has not
    begun."""
    blank = VectorsHash(0)
    for name in stored.names:
        if name not in shapes and name != COUNT:
            num_values, dtype = stored.num_values(name), stored.dtype(name)
            pieces = _zeros(num_values * dtype.itemsize)
            blank.add(name, dtype, num_values=num_values, pieces=pieces)
    if state.hashes.vectors == blank.hexdigest():
        return []
    return ["its training state is not that of a start: the update rule's vectors are not zero"]


def _zeros(num_bytes: int) -> Iterator[bytes]:
    piece = bytes(_PIECE_BYTES)
    for start in range(0, num_bytes, _PIECE_BYTES):
        yield piece[: num_bytes - start]


def _short(sha256: str | None) -> str:
    return f"{sha256[:12]}…" if sha256 else "nothing"

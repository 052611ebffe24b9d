"""Defines the certificate of a run that was trained without some documents: what follows from the
run's own records.

It names the documents by the hashes of their tokens, and never by text, file or place.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import numpy as np
from pydantic import TypeAdapter

from cluster.storage.uris import Storage
from jobs.proof.opened_run import Learning, OpenedRun
from jobs.proof.step_outcomes import StepOutcomes
from jobs.run.end import FORGOTTEN
from jobs.run.find_run import find_tokens, holes_of
from jobs.run.history import recorded_config
from jobs.run.ledger import Ledger, Line
from jobs.run.ledger_chain import hash_of
from jobs.run.signed_lines import StatedLine
from jobs.tokens.holes import Hole, Holes
from jobs.tokens.token_store import Shard, read_manifest

FORGETTING = "forgetting"
"""The folder of a certificate and its signature, in the folder of the run that forgets."""
CERTIFICATE = "certificate.json"
TYPE = "urn:raymill:forgetting:v1"


@dataclass(frozen=True, order=True)
class ForgottenDocument:
    sha256: str  # of its tokens, as the token store has them
    tokens: int


@dataclass(frozen=True)
class Certificate:
    """What was forgotten, from which run, by which code, from which checkpoint."""

    run: str  # id of the run that forgets
    former_run: str  # id
    former_ledger: StatedLine  # the last line of its ledger when it was forgotten
    documents: tuple[ForgottenDocument, ...]
    forgotten: str  # SHA-256 of the list of documents with their places, `data.forgotten`
    data_manifest_hash: str | None
    first_step: int  # that reads one of the documents
    checkpoint: str | None  # of the former run, from which the steps were taken again
    checkpoint_state_hash: str | None
    last_step: int
    ledger: StatedLine  # the last line of the new run's ledger
    parameter_hash: str  # of the new run's weights
    code_versions: tuple[str, ...]  # that took the steps again
    made: str  # UTC
    type: str = TYPE

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, content: bytes) -> "Certificate":
        """Raises `ValueError` for what is no certificate."""
        certificate = _CERTIFICATE.validate_json(content)
        if certificate.type != TYPE:
            raise ValueError(f"it has the type {certificate.type}, expected {TYPE}")
        return certificate


_CERTIFICATE = TypeAdapter(Certificate)


@dataclass(frozen=True)
class ForgettingRecords:
    """The records of a run that forgets."""

    run: Storage
    lines: Sequence[bytes]  # of its ledger
    learning: Learning
    holes: Holes
    told: Line  # what the ledger says of the former run

    @classmethod
    def read(cls, run: Storage, lines: Sequence[bytes], ledger: Ledger) -> "ForgettingRecords":
        """Opens a run whose ledger has a line `forgotten`; `ledger` has those lines that count.
        Raises `TokenStoreError`."""
        config = recorded_config(run)
        holes = holes_of(run, config)
        store = find_tokens(run, holes.data_identity)
        outcomes = StepOutcomes(ledger)
        opened = OpenedRun(run, ledger, config, outcomes)
        learning = Learning(opened, store, read_manifest(store), outcomes.last_step)
        return cls(run, lines, learning, holes, ledger.events(FORGOTTEN)[-1])

    @property
    def ledger(self) -> Ledger:
        return self.learning.opened.ledger

    @property
    def own(self) -> list[Line]:
        """The lines that the former run does not have."""
        return self.ledger.lines[self.ledger.lines.index(self.told) + 1 :]

    @property
    def from_step(self) -> int:
        """The step of the former run's state from which this run goes on."""
        return int(self.told["step"])

    def _newly_forgotten(self) -> list[Hole]:
        """Returns the documents that the former run had not forgotten itself, as far as its lines
        say."""
        former = self.ledger.lines[: self.ledger.lines.index(self.told)]
        named = [line["forgotten"] for line in former if line.get("forgotten")]
        before: set[Hole] = set()
        for name in named[-1:]:
            config = self.learning.opened.config
            data = config.data.model_copy(update={"forgotten": name})
            before |= {*holes_of(self.run, config.model_copy(update={"data": data})).holes}
        return [hole for hole in self.holes.holes if hole not in before]

    def certificate(self) -> Certificate:
        """Returns what can be certified of the run as it is recorded now."""
        told, copied = self.told, self._copied_line()
        checkpoints = self.ledger.events("checkpoint")
        starts = [line for line in self.own if line.get("event") == "start"]
        return Certificate(
            run=self.run.uri.rpartition("/")[2],
            former_run=told["run"],
            former_ledger=StatedLine(told["ledger"]["line"], told["ledger"]["sha256"]),
            documents=documents_in(self.holes),
            forgotten=self.holes.hash,
            data_manifest_hash=self.learning.manifest.hash,
            first_step=self._first_step(),
            checkpoint=told["checkpoint"],
            checkpoint_state_hash=copied.get("state_hash"),
            last_step=self.learning.last_step,
            ledger=StatedLine(len(self.lines), hash_of(self.lines[-1])),
            parameter_hash=checkpoints[-1]["parameter_hash"] if checkpoints else "",
            code_versions=tuple(sorted({line["code_version"] for line in starts})),
            made=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _first_step(self) -> int:
        """Returns the first step that reads a document which the former run had not forgotten."""
        shards = {shard.file: shard for shard in self.learning.manifest.shards}
        steps = [
            first_step_reading(self.learning, shards[hole.shard], hole.start, hole.end)
            for hole in self._newly_forgotten()
        ]
        return min(filter(None, steps), default=0)

    def _copied_line(self) -> Line:
        """Returns the line of the checkpoint that the run goes on from; an empty one where it
        begins with the first step."""
        for line in self.ledger.events("checkpoint"):
            if line["checkpoint"].rpartition("/")[2] == self.told["checkpoint"]:
                return line
        return {}


def documents_in(holes: Holes) -> tuple[ForgottenDocument, ...]:
    """Returns the documents of a list, without their places."""
    known = {ForgottenDocument(hole.sha256, hole.tokens) for hole in holes.holes}
    return tuple(sorted(known))


def first_step_reading(learning: Learning, shard: Shard, start: int, end: int) -> int:
    """Returns the first step, taken or to come, that reads one of the tokens [start, end) of a
    shard; 0 where none does. A row that has it as its first input alone reads it too."""
    order = learning.order
    first = order.num_samples
    for stretch in order.stretches(shard, start, end):
        rows = order.rows_reading(stretch)
        if len(rows):  # later epochs of a source begin behind all samples of its first one
            numbers = np.asarray(rows, dtype=np.int64)
            samples = order.order.samples_of(stretch.source, numbers, epoch=0)
            first = min(first, int(samples.min()))
    return order.schedule.step_of(first) if first < order.num_samples else 0

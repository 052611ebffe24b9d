"""Recomputes the hashes of a run's checkpoints, of its data and of its ledger's lines, and names
what is not as it was recorded, or not as it was signed.

    ledger        each line follows the one before; with a signer, lines 1 to N, which were signed, are
                  the run
    checkpoints   files, weights, training state and metadata, as their lines say
    data          shards, document map and tokenizer, as the newest start says
    statement     what was signed, compared with all of these
    forgetting    the documents that the run was trained without, and its certificate
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.output.progress import say
from cluster.output.result_text import counted
from cluster.storage.uris import Storage
from jobs.proof.recorded.checkpoint import CheckpointRecord, checkpoint_problems
from jobs.proof.recorded.contradictions import contradictions
from jobs.proof.recorded.data import DataProof, base_problems, data_problems
from jobs.proof.recorded.forgetting import forgetting_problems
from jobs.proof.recorded.statement import statement_problems
from jobs.run.checkpoints import QUARANTINED, RunCheckpoints
from jobs.run.ledger import LEDGER, Ledger
from jobs.run.ledger_chain import Chain, chain_of
from jobs.run.signed_lines import StatedLine, stated_line
from jobs.run.training_statement import training_of
from model.files.checkpoint_folder import Metadata, read_metadata
from model.signing.signature import MODEL, SignatureError, Trusted, check


@dataclass
class Proof:
    """The findings about a run so far."""

    lines: Sequence[bytes]  # of its ledger
    chain: Chain
    all_lines: Ledger
    ledger: Ledger  # the lines that count
    signer: Trusted | None = None
    signed: StatedLine | None = None  # the last line that counts, where a signature says so
    num_checkpoints: int = 0
    data: DataProof = field(default_factory=DataProof)
    problems: list[str] = field(default_factory=list)

    @property
    def num_behind(self) -> int:
        """The number of lines behind the last one that was signed."""
        return len(self.lines) - self.signed.number if self.signed else 0

    @property
    def verdict(self) -> str:
        if self.problems:
            return f"{counted(len(self.problems), 'problem')}: {'; '.join(self.problems)}"
        kept = f"{counted(self.num_checkpoints, 'checkpoint')} and {counted(self.data.num_shards, 'shard')}"
        verdict = f"{kept} are as recorded; {self.chain.summary}"
        if self.signed and self.signer:
            verdict += f"; {self.signer.shown} signed lines 1 to {self.signed.number}"
        if self.num_behind:
            verdict += (
                f", and what {counted(self.num_behind, 'line')} behind them say is not proven"
            )
        return verdict

    def json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "valid": not self.problems,
            "problems": self.problems,
            "checkpoints": self.num_checkpoints,
            "shards": self.data.num_shards,
            "ledger_lines": self.chain.num_lines,
            "ledger_head": self.chain.head,
            "chained_from": self.chain.first,
            "signed_lines": self.signed.number if self.signed else None,
            "lines_behind": self.num_behind,
        }


def verify(run: Storage, *, signed_by: Trusted | None = None) -> dict[str, Any]:
    """Is `raymill verify`: `proof_of`, as a result."""
    return proof_of(run, signed_by=signed_by).json()


def proof_of(run: Storage, *, signed_by: Trusted | None = None) -> Proof:
    """Reads every byte of a run's checkpoints and of its token stores. With a trusted signer the
    newest checkpoint must be signed, earlier ones rightly if they are, and the lines that it states
    are the run."""
    content = run.find_bytes(LEDGER) or b""
    lines = content.rpartition(b"\n")[0].splitlines()
    ledger = Ledger.parse(content, f"{run.uri}/{LEDGER}")
    proof = Proof(lines, chain_of(lines), ledger, ledger, signed_by)
    proof.problems += [f"{LEDGER}, {problem}" for problem in proof.chain.problems]
    if content and not content.endswith(b"\n"):
        say(f"{LEDGER} ends within a line, as a crash leaves it: that line counts for nothing")
    metadata = _check_checkpoints(run, proof)
    proof.data = data_problems(run, proof.ledger, metadata)
    proof.problems += proof.data.problems
    proof.problems += base_problems(run, metadata)
    proof.problems += contradictions(proof.ledger)
    proof.problems += forgetting_problems(run, lines, proof.ledger, signed_by=signed_by)
    return proof


def _check_checkpoints(run: Storage, proof: Proof) -> list[Metadata]:
    """Returns the metadata of the sound ones, newest first."""
    checkpoints = RunCheckpoints(run)
    names = checkpoints.names
    if proof.signer and not names:
        proof.problems.append(
            f"no checkpoint is there, so nothing of this run was signed by {proof.signer.shown}"
        )
    metadata: list[Metadata] = []
    for number, name in enumerate(reversed(names), start=1):
        say(f"checkpoint {number} of {len(names)}: {name}")
        with tempfile.TemporaryDirectory(prefix="raymill-verify-") as scratch:
            folder = checkpoints.fetch(name, Path(scratch))
            found: list[str] = []
            if proof.signer:
                uri = checkpoints.uri(name)
                found += _signature_problems(folder, proof, newest=uri if number == 1 else None)
            record = CheckpointRecord.in_ledger(name, proof.ledger)
            found += checkpoint_problems(folder, record)
            if record.line is None and not _may_be_unrecorded(proof, is_newest=number == 1):
                found.append(f"no line of {LEDGER} that counts names it")
            proof.problems += [f"{name}: {problem}" for problem in found]
            if not found:
                metadata.append(read_metadata(folder))
    proof.num_checkpoints = len(names)
    proof.problems += _missing_problems(checkpoints, names, proof)
    return metadata


def _missing_problems(checkpoints: RunCheckpoints, names: Sequence[str], proof: Proof) -> list[str]:
    """Returns which checkpoint should be there and is not: the newest one of the ledger, also where
    the line that names it is behind the signed ones, and one that was signed and then set aside."""
    problems: list[str] = []
    recorded = [line["checkpoint"] for line in proof.all_lines.events("checkpoint")]
    newest = max((uri.rpartition("/")[2] for uri in recorded), default=None)
    if newest is not None and newest not in names:
        problems.append(f"{newest}: the ledger's newest checkpoint is missing or incomplete")
    for name in checkpoints.quarantined if proof.signer else ():
        if checkpoints.folder(name).exists(MODEL):
            problems.append(f"{name}: it is signed, and has the mark {QUARANTINED}, which is not")
    return problems


def _may_be_unrecorded(proof: Proof, *, is_newest: bool) -> bool:
    """Reports whether a checkpoint may have no line yet: its run is at work, and writes that next."""
    return is_newest and proof.signer is None and not proof.ledger.is_finished


def _signature_problems(folder: Path, proof: Proof, *, newest: str | None) -> list[str]:
    """Returns what is wrong with a checkpoint's signature, and what is another than was signed with
    the newest one, of which `newest` is the URI. Its statement settles which lines count."""
    assert proof.signer is not None
    if newest is None and not (folder / MODEL).exists():
        return []
    try:
        training = check(folder, proof.signer)
        stated = stated_line(training)
    except SignatureError as error:
        return [str(error)]
    if not stated.stands_in(proof.lines):
        return [f"{LEDGER} had another last line when it was signed: lines were changed or cut off"]
    if newest is None:
        return []
    proof.signed, proof.ledger = stated, Ledger(proof.ledger.lines[: stated.number])
    problems = statement_problems(training, training_of(newest, folder, ledger=proof.ledger))
    if proof.num_behind and proof.ledger.is_finished:
        problems.append(
            f"{LEDGER} has {counted(proof.num_behind, 'line')} behind line {stated.number}, added after the run had "
            "finished and was signed: they count for nothing"
        )
    return problems

"""Audits a run on behalf of somebody who does not own its storage: everything that is recorded is
checked, and intervals between checkpoints, drawn by lot, are computed again.

    signatures, chain, every hash ── `verify`
    intervals drawn by hash(the ledger's head, a nonce of the auditor) ── `replay`, by one worker
    shards of the token store, where that is asked ── `tokenized_again`
"""

import math
import secrets
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cluster.output.progress import say
from cluster.output.result_text import counted
from cluster.settings.code_folders import code_version
from cluster.settings.parser import ConfigError
from cluster.storage.uris import Storage
from jobs.proof.audits.intervals import (
    Interval,
    chance_unseen,
    drawn_by_lot,
    intervals_of,
    steps_behind,
)
from jobs.proof.audits.kept_record import PAGE, RECORD, begun_record, write_record
from jobs.proof.audits.record import AuditRecord, ComputedInterval
from jobs.proof.replay_run import replay
from jobs.proof.tokenize_again import tokenized_again
from jobs.proof.verify_run import Proof, proof_of
from jobs.run.checkpoints import RunCheckpoints, step_of
from jobs.run.find_run import begun_ledger
from jobs.run.history import recorded_config
from jobs.run.ledger import Ledger
from jobs.training.mixed_hardware import hardware, settle_rounding
from model.signing.signature import SigningKey, Trusted, TrustedSigner, sign_files
from raymill.errors import UserError

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Shares of forged intervals, for which the report says how likely the audit has missed them."""

UNCOVERED = (
    "Times, speeds, prices, hardware and places of workers: the ledger says them, and nothing computes them again.",
    "Whether a checkpoint or a publication is the newest one: who can delete from the storage can hide a newer one.",
    "Why steps were rolled back or taken again: what was left out or voided counts for nothing here too.",
    "Statistics of layers, what audits of workers found, and samples of prompts that the settings do not name.",
    "Where the texts come from, and what may be done with them.",
)
NOT_TOKENIZED = "How the token store was made of its corpus, and by which filters: --tokenize makes shards of it again."


@dataclass(frozen=True)
class Audit:
    """The request for an audit."""

    num_samples: int
    nonce: str | None = None  # drawn where it is None
    num_workers: int = 1
    signed_by: Trusted | None = None
    key: SigningKey | None = None  # the auditor's, which signs the report
    num_shards: int = 0  # of the token store, that are made again


@dataclass(frozen=True)
class AuditReport:
    """The record of an audit that has ended, and the files that it was written to."""

    record: AuditRecord
    files: list[str]

    def json(self) -> dict[str, Any]:
        record = self.record
        judged = {"verdict": record.verdict, "valid": record.valid, "problems": record.problems}
        return judged | record.json() | {"files": self.files}


def audit(run: Storage, asked: Audit, folder: Path) -> AuditReport:
    """Returns what was found, and writes it into the folder as JSON and as a page. An audit that
    was interrupted is continued there: intervals that this user computed again are not once more.

    Raises `UserError` where the folder has the audit of another run, ledger or nonce, or one that
    this user did not write, and where the run has no interval.
    """
    if asked.num_samples < 1:
        raise ConfigError(f"--samples {asked.num_samples}: expected at least 1")
    if asked.num_shards < 0:
        raise ConfigError(f"--tokenize {asked.num_shards}: expected a number of shards")
    begun_ledger(run)  # a run without a step is told of at once
    proof = proof_of(run, signed_by=asked.signed_by)
    ledger = proof.ledger
    intervals = intervals_of(ledger, [step_of(name) for name in RunCheckpoints(run).names])
    if not intervals:
        raise UserError(f"{run.uri} has no checkpoint to which steps could be taken again")
    record = _record(run, proof, asked, intervals, folder)
    drawn = drawn_by_lot(intervals, asked.num_samples, head=record.head, nonce=record.nonce)
    ended = {earlier.last for earlier in record.intervals}
    to_do = [interval for interval in drawn if interval.last not in ended]
    _say_cost(ledger, to_do, num_workers=asked.num_workers)
    for interval in to_do:
        computed = _computed_again(run, ledger, interval, asked.num_workers)
        record = record.with_interval(computed)
        write_record(folder, record)
    if asked.num_shards:
        lot = f"{record.head} {record.nonce}"
        record = record.with_tokenized(tokenized_again(run, num_shards=asked.num_shards, lot=lot))
    return _closed(folder, record, num_drawn=len(drawn), key=asked.key)


def _record(
    run: Storage, proof: Proof, asked: Audit, intervals: Sequence[Interval], folder: Path
) -> AuditRecord:
    """Returns the record as the audit begins, with the intervals of an interrupted one."""
    signer = asked.signed_by
    stamps = signer.timestamped_by if isinstance(signer, TrustedSigner) else None
    head = proof.signed.sha256 if proof.signed else str(proof.chain.head)
    known = begun_record(folder, {"run": run.uri, "head": head, "nonce": asked.nonce})
    starts = proof.ledger.events("start")
    config = recorded_config(run)
    settle_rounding(config)  # as the steps will be taken
    use_gpu = config.scaling.use_gpu and torch.cuda.is_available()
    return AuditRecord(
        run=run.uri,
        head=head,
        nonce=asked.nonce or (known.nonce if known else secrets.token_hex(16)),
        begun=_now(),
        signed_by=signer.shown if signer else None,
        timestamped_by=str(stamps) if stamps else None,
        signed_lines=proof.signed.number if proof.signed else None,
        workers=asked.num_workers,
        hardware=hardware(config, torch.device("cuda" if use_gpu else "cpu")),
        hardware_of_run=_different(start["hardware"] for start in starts),
        code_version=code_version(),
        code_of_run=_different(start["code_version"] for start in starts),
        intervals_of_run=len(intervals),
        problems=proof.problems,
        uncovered=_uncovered(proof, intervals, asked),
        intervals=[replace(earlier, now=False) for earlier in (known.intervals if known else [])],
    )


def _different(values: Iterable[Any]) -> list[Any]:
    """Returns each value once, in their order."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _uncovered(proof: Proof, intervals: Sequence[Interval], asked: Audit) -> list[str]:
    """Returns what this audit does not look at."""
    texts = [*UNCOVERED]
    if not asked.num_shards:
        texts.append(NOT_TOKENIZED)
    behind = steps_behind(proof.ledger, intervals)
    if behind:
        texts.append(
            f"Steps {behind[0]} to {behind[-1]}: no checkpoint is kept behind them, to which they could be taken again."
        )
    if proof.num_behind:
        texts.append(f"{counted(proof.num_behind, 'line')} of the ledger behind the signed ones.")
    return texts


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")


def _say_cost(ledger: Ledger, intervals: Sequence[Interval], *, num_workers: int) -> None:
    num_steps = sum(interval.num_steps for interval in intervals)
    step_s = statistics.median(line["wall_s"] for line in ledger.steps)
    worker_s = step_s * statistics.median(ledger.world_sizes)
    say(
        f"{counted(num_steps, 'step')} in {counted(len(intervals), 'interval')} will be taken again, about "
        f"{num_steps * worker_s / num_workers:,.0f} s on hardware like the run's"
    )


def _computed_again(
    run: Storage, ledger: Ledger, interval: Interval, num_workers: int
) -> ComputedInterval:
    """Takes the steps again. A run that cannot be taken again there has a problem too."""
    say(f"steps {interval.first} to {interval.last}")
    start_s = time.monotonic()
    steps = range(interval.first, interval.last + 1)
    num_hashes = num_validations = 0
    try:
        again = replay(run, steps=steps, num_workers=num_workers, ledger=ledger)
    except UserError as error:
        is_equal, verdict = False, str(error)
    else:
        is_equal, verdict = again.equal, again.verdict
        num_hashes, num_validations = again.hashes, again.validations
        if is_equal and interval.last not in again.states:
            is_equal = False
            verdict = f"the ledger has no hash of the training state after step {interval.last}"
    return ComputedInterval(
        **asdict(interval),
        computed=_now(),
        now=True,
        equal=is_equal,
        verdict=verdict,
        hashes=num_hashes,
        validations=num_validations,
        seconds=round(time.monotonic() - start_s, 3),
    )


def _closed(
    folder: Path, record: AuditRecord, *, num_drawn: int, key: SigningKey | None
) -> AuditReport:
    """Completes the record, and has the auditor sign it."""
    num_intervals = record.intervals_of_run
    parted = [at for at in record.intervals if not at.equal]
    problems = record.problems + [f"steps {at.first}..{at.last}: {at.verdict}" for at in parted]
    of_all = f"{num_drawn} of {counted(num_intervals, 'interval')}"
    record = replace(
        record,
        problems=problems,
        unseen={
            f"{share:.0%}": chance_unseen(
                num_intervals, math.ceil(share * num_intervals), num_drawn
            )
            for share in SHARES
        },
        ended=_now(),
        valid=not problems,
        verdict=f"{counted(len(problems), 'problem')}: {'; '.join(problems)}"
        if problems
        else f"all that is recorded agrees, and {of_all} gave the same bits again",
    )
    write_record(folder, record)
    files = [RECORD, PAGE]
    if key:
        files += sign_files(folder, key)
    return AuditReport(record, [str(folder / name) for name in files])

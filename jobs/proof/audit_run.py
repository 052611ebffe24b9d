"""Audits a run on behalf of somebody who does not own its storage: everything that is recorded is
checked, and intervals between checkpoints, drawn by lot, are computed again.

    signatures, chain, every hash ── `verify`
    intervals drawn by hash(the ledger's head, a nonce of the auditor) ── `replay`, by one worker

Who forged the record cannot know which intervals are drawn: the head fixes the record before, and the
nonce comes after it.
"""

import hashlib
import json
import math
import secrets
import statistics
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from cluster.output.progress import say
from cluster.output.result_text import counted
from cluster.settings.parser import ConfigError
from cluster.storage.uris import Storage
from jobs.proof.replay_run import replay
from jobs.proof.verify_run import verify
from jobs.report.page import document, grid, pairs
from jobs.run.checkpoints import RunCheckpoints, step_of
from jobs.run.find_run import begun_ledger
from jobs.run.ledger import Ledger
from jobs.training.guards import GuardState
from model.errors import UserError
from model.signing.signature import SigningKey, Trusted, TrustedSigner, sign_files

RECORD, PAGE = "audit.json", "index.html"
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Shares of forged intervals, for which the report says how likely the audit has missed them."""


@dataclass(frozen=True)
class Interval:
    """The steps from one kept checkpoint, or the start, to the next."""

    first: int
    last: int

    @property
    def num_steps(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True)
class Audit:
    """What is asked of an audit."""

    num_samples: int
    nonce: str | None = None  # drawn where it is None
    num_workers: int = 1
    signed_by: Trusted | None = None
    key: SigningKey | None = None  # the auditor's, which signs the report


def audit(run: Storage, asked: Audit, folder: Path) -> dict[str, Any]:
    """Returns `valid`, and `problems`; writes them into the folder as JSON and as a page. An audit
    that was interrupted is continued there: intervals that were computed again are not once more.

    Raises `UserError` where the folder has the audit of another run, ledger or nonce, and where
    the run has no interval.
    """
    if asked.num_samples < 1:
        raise ConfigError(f"--samples {asked.num_samples}: expected at least 1")
    ledger = begun_ledger(run)
    signer = asked.signed_by
    stamps = signer.timestamped_by if isinstance(signer, TrustedSigner) else None
    found = verify(run, signed_by=signer)
    head = str(found["ledger_head"])
    known = _begun(folder, run=run, head=head, nonce=asked.nonce)
    nonce = asked.nonce or known.get("nonce") or secrets.token_hex(16)
    intervals = intervals_of(ledger, [step_of(name) for name in RunCheckpoints(run).names])
    if not intervals:
        raise UserError(f"{run.uri} has no checkpoint to which steps could be taken again")
    drawn = drawn_by_lot(intervals, asked.num_samples, head=head, nonce=nonce)
    done: list[dict[str, Any]] = known.get("intervals", [])
    ended = {earlier["last"] for earlier in done}
    to_do = [interval for interval in drawn if interval.last not in ended]
    _say_cost(ledger, to_do, num_workers=asked.num_workers)
    record = {
        "run": run.uri,
        "head": head,
        "nonce": nonce,
        "signed_by": signer.shown if signer else None,
        "timestamped_by": str(stamps) if stamps else None,
        "intervals_of_run": len(intervals),
        "problems": found["problems"],
        "intervals": done,
    }
    for interval in to_do:
        done.append(_computed_again(run, ledger, interval, asked.num_workers))
        _write(folder, record)
    return _closed(folder, record, num_drawn=len(drawn), key=asked.key)


def intervals_of(ledger: Ledger, kept_steps: Sequence[int]) -> list[Interval]:
    """Returns the intervals that can be computed again: each ends at a kept checkpoint. Steps that
    a rollback left out are no part of them."""
    is_left_out = GuardState(rollbacks=ledger.rollbacks).leaves_out
    recorded = {line["step"] for line in ledger.lines if line.get("event") in (None, "skip")}
    steps = sorted(step for step in recorded if not is_left_out(step))
    ends = {step for step in kept_steps if not is_left_out(step)}
    intervals: list[Interval] = []
    for before, end in pairwise(sorted({0, *ends})):
        first, behind = bisect_right(steps, before), bisect_right(steps, end)
        if first < behind:
            intervals.append(Interval(steps[first], steps[behind - 1]))
    return intervals


def drawn_by_lot(
    intervals: Sequence[Interval], num_samples: int, *, head: str, nonce: str
) -> list[Interval]:
    """Returns different intervals, all of them where there are no more: those with the smallest
    hashes. So a larger sample begins with the smaller one."""

    def lot(interval: Interval) -> bytes:
        text = f"{head} {nonce} {interval.first} {interval.last}"
        return hashlib.sha256(text.encode()).digest()

    return sorted(intervals, key=lot)[:num_samples]


def chance_unseen(num_intervals: int, num_forged: int, num_samples: int) -> float:
    """Returns the probability that none of the forged intervals was drawn (the hypergeometric
    distribution at 0)."""
    num_drawn = min(num_samples, num_intervals)
    ways = math.comb(num_intervals - num_forged, num_drawn)
    return ways / math.comb(num_intervals, num_drawn)


def _begun(folder: Path, *, run: Storage, head: str, nonce: str | None) -> dict[str, Any]:
    """Returns the record of an audit that began in a folder; an empty one where none did."""
    path = folder / RECORD
    if not path.exists():
        return {}
    known: dict[str, Any] = json.loads(path.read_bytes())
    wanted = {"run": run.uri, "head": head, "nonce": nonce or known["nonce"]}
    for name, value in wanted.items():
        if known[name] != value:
            raise UserError(
                f"{folder} has an audit whose {name} is {known[name]}, not {value}: name another folder with --to"
            )
    return known


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
) -> dict[str, Any]:
    """Takes the steps again. A run that cannot be taken again there has a problem too."""
    say(f"steps {interval.first} to {interval.last}")
    start_s = time.monotonic()
    steps = range(interval.first, interval.last + 1)
    try:
        result = replay(run, steps=steps, num_workers=num_workers)
    except UserError as error:
        result = {"equal": False, "verdict": str(error), "hashes": 0}
    is_equal, verdict = result["equal"], result["verdict"]
    is_hashed = any(line["step"] == interval.last for line in ledger.events("checkpoint"))
    if is_equal and not is_hashed:
        is_equal, verdict = (
            False,
            f"the ledger has no hash of the weights after step {interval.last}",
        )
    seconds = round(time.monotonic() - start_s, 3)
    found = {"equal": is_equal, "verdict": verdict, "hashes": result["hashes"], "seconds": seconds}
    return asdict(interval) | found


def _closed(
    folder: Path, record: dict[str, Any], *, num_drawn: int, key: SigningKey | None
) -> dict[str, Any]:
    """Completes the record, has the auditor sign it, and returns it."""
    num_intervals = record["intervals_of_run"]
    parted = [at for at in record["intervals"] if not at["equal"]]
    record["problems"] = record["problems"] + [
        f"steps {at['first']}..{at['last']}: {at['verdict']}" for at in parted
    ]
    record["unseen"] = {
        f"{share:.0%}": chance_unseen(num_intervals, math.ceil(share * num_intervals), num_drawn)
        for share in SHARES
    }
    record["valid"] = not record["problems"]
    of_all = f"{num_drawn} of {counted(num_intervals, 'interval')}"
    record["verdict"] = (
        f"{counted(len(record['problems']), 'problem')}: {'; '.join(record['problems'])}"
        if record["problems"]
        else f"all that is recorded agrees, and {of_all} gave the same bits again"
    )
    _write(folder, record)
    files = [RECORD, PAGE]
    if key:
        files += sign_files(folder, key)
    return record | {"files": [str(folder / name) for name in files]}


def _write(folder: Path, record: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PAGE).write_text(_page(record), encoding="utf-8")
    # The record last, and at once: an audit that is interrupted here goes on from it
    half = folder / f".{RECORD}"
    half.write_text(json.dumps(record, indent=1), encoding="utf-8")
    half.replace(folder / RECORD)


def _page(record: dict[str, Any]) -> str:
    title = f"Audit of {record['run']}"
    about = [
        (name, str(record[key]))
        for name, key in (
            ("The ledger's last line (SHA-256)", "head"),
            ("Nonce of the auditor", "nonce"),
            ("Must have been signed by", "signed_by"),
            ("Root of their time stamps", "timestamped_by"),
            ("Intervals of the run", "intervals_of_run"),
        )
    ]
    intervals = [
        [f"{at['first']}..{at['last']}", str(at["hashes"]), f"{at['seconds']:.1f}", at["verdict"]]
        for at in record["intervals"]
    ]
    unseen = [[share, f"{chance:.1%}"] for share, chance in record.get("unseen", {}).items()]
    chances = grid(
        "If so many intervals were forged, the chance that none was drawn",
        ("Share forged", "Unseen"),
        unseen,
    )
    heads = ("Steps", "Hashes compared", "Seconds", "Verdict")
    body = f"""<h1>{escape(title)}</h1>
<p>{escape(record.get("verdict", "This audit has not ended."))}</p>
{pairs(about)}
<h2>Computed again</h2>
{grid("Intervals that were drawn", heads, intervals)}
{f"<h2>What may be unseen</h2>{chances}" if unseen else ""}
"""
    return document(title, body)

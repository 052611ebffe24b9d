"""Tells which lines of a run's ledger a signature states. These are the run: what stands behind them
replaces none of them.

    lines 1 to N   stated with the newest signed checkpoint: the chain has line N stand for all before
    behind N       nothing, where the run had finished; else only what comes after the last step before

A command that shows a run has no key, and believes the statement as it lies there: it keeps lines from
whoever can only add to a file. `raymill verify --signed-by` checks who signed it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.output.progress import say
from cluster.output.result_text import counted
from cluster.storage.uris import Storage
from jobs.run.ledger import LEDGER, Ledger, Line, void
from jobs.run.ledger_chain import hash_of
from model.signing.signature import TRAINING, SignatureError, predicate_in

_NEVER_REPLACE = {"start", "preempted", "finish", "gave_up", "spent"}
"""Events that say of a step at which an attempt begins or ends, and nothing of the step."""


@dataclass(frozen=True)
class StatedLine:
    """The line of a ledger that was its last when a checkpoint was signed."""

    number: int
    sha256: str

    def stands_in(self, lines: Sequence[bytes]) -> bool:
        """Reports whether a ledger still has it at its place."""
        return self.number <= len(lines) and hash_of(lines[self.number - 1]) == self.sha256


def stated_line(training: dict[str, Any]) -> StatedLine:
    """Returns the line that a signed statement names. Raises `SignatureError` where it names none,
    as an exported folder's does, or more than one."""
    try:
        [stated] = training["runDetails"]["byproducts"]
        name, _, number = stated["name"].rpartition(" ")
        if name != f"{LEDGER}, line":
            raise ValueError(name)
        return StatedLine(int(number), stated["digest"]["sha256"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SignatureError(
            f"{TRAINING} states no line of a {LEDGER}: it was not made for a checkpoint in its run; sign that with "
            "`raymill sign`"
        ) from None


def newest_stated_line(run: Storage) -> StatedLine | None:
    """Returns what the newest checkpoint with a statement states, whoever made it; None where the
    run has none that can be read."""
    keys = [entry.key for entry in run.list("checkpoints/")]
    signed = sorted(key for key in keys if key.endswith(f"/{TRAINING}"))
    for key in reversed(signed):
        try:
            return stated_line(predicate_in(run.read_bytes(key)))
        except (SignatureError, ValueError) as error:
            say(f"{run.uri}/{key} is passed over: {error}")
    return None


def shown_ledger(run: Storage) -> Ledger:
    """Reads a run's ledger, empty where there is none, with only those lines that count where
    somebody signed the run."""
    content = run.find_bytes(LEDGER) or b""
    ledger = Ledger.parse(content, f"{run.uri}/{LEDGER}")
    stated = newest_stated_line(run) if ledger.lines else None
    if stated is None:
        return ledger
    if not stated.stands_in(content.splitlines()):
        say(
            f"{LEDGER} of {run.uri} has not the line {stated.number} that its signature states: lines were changed or "
            "cut off since, see `raymill verify --signed-by`"
        )
        return ledger
    kept = [*ledger.lines[: stated.number], *_behind(ledger, stated.number)]
    num_left_out = len(ledger.lines) - len(kept)
    if num_left_out:
        say(
            f"{counted(num_left_out, 'line')} behind line {stated.number} of {LEDGER}, which a signature states, "
            "would replace what was signed, and count for nothing here"
        )
    return Ledger(kept)


def _behind(ledger: Ledger, number: int) -> list[Line]:
    """Returns what counts of the lines behind a stated one: nothing that replaces those before."""
    signed = Ledger(ledger.lines[:number])
    if signed.is_finished:
        return []
    last = max((line["step"] for line in signed.lines if "step" in line), default=0)
    kept: list[Line] = []
    for line in ledger.lines[number:]:
        event, step = line.get("event"), line.get("step", last + 1)
        if event == "rollback":
            kept += [{**line, "first": max(line["first"], last + 1)}] if line["last"] > last else []
        elif void([line]):
            kept.append({**line, "to_step": max(line["to_step"], last)})
        elif event in _NEVER_REPLACE or step > last:
            kept.append(line)
    return kept

"""Tells from a run's ledger the findings of its audits, their cost, and who was left out."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.output.result_text import counted
from jobs.run.history import duration
from jobs.run.ledger import Ledger, Line
from jobs.sentinel.measures import Measure
from jobs.sentinel.proven_part import proven_part

_VERDICTS = ("corruption", "undecided", "named", "asked_again", "proven", "refuted")


@dataclass(frozen=True)
class Finding:
    """The ledger's account of a worker that was wrong, and of the run's way from there."""

    line: Line
    lost_s: float | None  # until that step stood; None where it does not, or nothing was lost

    @property
    def cells(self) -> list[str]:
        lost = "" if self.lost_s is None else duration(self.lost_s)
        return [f"{self.line['step']:,}", self.line["event"], self._who, self._what, lost]

    @property
    def _who(self) -> str:
        if "nodes" in self.line:
            return " or ".join(sorted({*self.line["nodes"].values()}))
        return f"rank {self.line['rank']} on {self.line['node']}" if "node" in self.line else ""

    @property
    def _what(self) -> str:
        words = [str(self.line["what"])] if "what" in self.line else []
        if self.line["event"] == "asked_again":
            words.append(f"{self.line['reason']}; computed again {self.line['found']}")
        if "measure" in self.line:
            words.append(str(self.line["measure"]).replace("_", " "))
        if self.line.get("to_step") is not None:
            words.append(f"back to step {self.line['to_step']:,}")
        return ", ".join(words)


def findings(ledger: Ledger) -> list[Finding]:
    """Returns what was found and decided, in order."""
    told: list[Finding] = []
    for place, line in enumerate(ledger.lines):
        is_told = line.get("event") in _VERDICTS
        if is_told and line.get("differs", True):  # else the data was at fault
            told.append(Finding(line, _lost_s(line, ledger.lines[place:])))
    return told


def audit_rows(ledger: Ledger) -> list[tuple[str, str]]:
    """Returns (name, value) of the run's audits; nothing where none took place and nothing was
    found."""
    steps = ledger.steps
    audited = [line for line in steps if "audit_seconds" in line]
    told = findings(ledger)
    if not audited and not told:
        return []
    took_s = sum(line["audit_seconds"] for line in audited)
    share = took_s / sum(line["wall_s"] for line in steps)
    part = proven_part(ledger.lines)
    rows = [
        ("Steps audited", f"{len(audited):,} of {len(steps):,}"),
        ("Time of the audits", f"{took_s:,.2f} s, {share:.2%} of the steps' time"),
        ("Proven to", f"step {part.to_step or 0:,}"),
    ]
    if part.not_proven_since is not None:
        since = f"step {part.not_proven_since:,}: the run continued from a state that no audit had proven"
        rows.append(("Not proven since", since))
    corruptions = ledger.events("corruption", "named")
    rows.append(("Workers found wrong", counted(len(corruptions), "time")))
    gone = {line["node"] for line in corruptions if line.get("measure") == Measure.LEFT_OUT}
    if gone:
        rows.append(("Nodes left out", ", ".join(sorted(gone))))
    lost_s = sum(finding.lost_s or 0.0 for finding in told)
    if lost_s:
        rows.append(("Time that wrong workers cost", duration(lost_s)))
    return rows


def _lost_s(line: Line, after: Sequence[Line]) -> float | None:
    """Returns the seconds until the step in which a worker was found wrong stands, or until the run
    goes back once more. Verdicts that change nothing cost none."""
    if "to_step" not in line:
        return None
    for later in after:
        if "event" not in later and later["step"] >= line["step"]:
            return float(later["time"] - line["time"])
        if later is not line and "to_step" in later:
            return float(later["time"] - line["time"])  # the rest is that one's
    return None

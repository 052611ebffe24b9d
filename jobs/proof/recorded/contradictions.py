"""Finds steps that a ledger tells twice, and otherwise each time."""

from jobs.proof.diff_runs import first_difference, step_values
from jobs.run.ledger import Ledger, Line

_MAY_DIFFER = {"rollback", "corruption", "undecided", "refuted", "tolerance_mode"}
"""Events after which a step that is taken again may give other values."""


def contradictions(ledger: Ledger) -> list[str]:
    """Returns each step that was taken or validated again with other values: the last ones count,
    and a reader might look at the first. A run whose workers or hardware were other ones, or that
    was rolled back, may have such steps."""
    if any(line.get("event") in _MAY_DIFFER for line in ledger.lines):
        return []
    problems: list[str] = []
    last = step_values(ledger)
    for line in ledger.lines:
        values = step_values(Ledger(_alone(line, last)))
        step = line.get("step", 0)
        if step not in values:
            continue
        parted = first_difference(values, last, steps=[step], is_repeated=True)
        if parted:
            problems.append(f"the ledger tells step {step} twice, and otherwise: {parted}")
    return problems


def _alone(line: Line, last: dict[int, Line]) -> list[Line]:
    """Returns lines from which the values of one line follow: a validation has its step before
    it."""
    if line.get("event") != "validation":
        return [line]
    known = last.get(line["step"], {})
    return [{**known, "step": line["step"]}, line]

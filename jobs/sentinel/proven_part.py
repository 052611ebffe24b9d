"""Tells from a run's ledger how far the run is proven: pure functions."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from jobs.run.ledger import Line, void


@dataclass(frozen=True)
class ProvenPart:
    """How far a run is proven."""

    to_step: int | None = None  # None where nothing is audited
    # Whether it went on from a state that was not proven: no later audit proves what led to that
    has_gap: bool = False

    @property
    def not_proven_since(self) -> int | None:
        """The step from which on nothing is proven any more; None where later audits prove it."""
        return self.to_step + 1 if self.has_gap and self.to_step is not None else None

    def from_start(self, step: int) -> "ProvenPart":
        """Returns what is proven once the run continues from the state after a step."""
        has_gap = step > (self.to_step or 0)
        return ProvenPart(None if self.to_step is None else min(self.to_step, step), has_gap)

    def up_to(self, step: int) -> "ProvenPart":
        """Returns what is proven once the steps up to this one are, of those behind the last
        start."""
        return self if self.has_gap else replace(self, to_step=step)

    def fields(self) -> dict[str, Any]:
        """Returns the fields of a step's line."""
        since = self.not_proven_since
        told = {} if self.to_step is None else {"proven_to": self.to_step}
        return told if since is None else told | {"not_proven_since": since}


NOT_AUDITED = ProvenPart()


def proven_part(lines: Iterable[Line]) -> ProvenPart:
    """Returns how far the ledger says that the run is proven.

    An audited step that stands has found what all ranks held before it the same. So have steps that
    were taken again and led to the weights of a checkpoint. What the run went back behind is proven
    no longer, nor is what an attempt takes again. An attempt that continues from a checkpoint or a
    snapshot behind that has the same state on all ranks, whatever it is: what was wrong in it, no
    audit finds any more.
    """
    known = [*lines]
    ways_back = void(known)
    part = NOT_AUDITED
    for line in known:
        proven = part.to_step or 0
        match line.get("event"):
            case None if "proven_to" in line:
                part = ProvenPart(line["proven_to"], "not_proven_since" in line)
            case "proven":
                part = part.up_to(max(proven, line["step"]))
            case "checkpoint" if line.get("proven_to") is not None:
                if not any(way.covers(line["step"], line["generation"]) for way in ways_back):
                    part = replace(part, to_step=max(proven, line["proven_to"]))
            case "start":
                part = part.from_start(line["step"])
            case _:
                last = _last_that_stands(line)
                if part.to_step is not None and last is not None:
                    part = replace(part, to_step=min(part.to_step, last))
    return part


def proven_to(lines: Iterable[Line]) -> int | None:
    """Returns the step up to which the ledger says that the run is proven, None where it says
    nothing of that."""
    return proven_part(lines).to_step


def _last_that_stands(line: Line) -> int | None:
    """Returns the last step that an event leaves as it was, None where it changes none."""
    if line.get("event") == "rollback":
        return int(line["first"]) - 1
    return min((way.to_step for way in void([line])), default=None)

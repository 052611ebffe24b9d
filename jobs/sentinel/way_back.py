"""Finds the state from which a run continues once a worker was found wrong: pure functions of the
ledger.

An audit finds a worker that is wrong in some lanes only after a while, and what it computed until
then may be wrong too. So the run goes back to an earlier checkpoint and takes the steps behind it
again without that worker. If they lead to the last checkpoint's very weights, the worker was right
until then: those weights are proven. If not, the run goes back further, and so on to its start,
which nobody computed.

     start ───── 100 ───── 200 ───── 300 ──── found at 340
                            └─ again ─┘ the same as 300?  yes: continue;  no: go back to 100

The steps that are compared are so many that a worker which is wrong as often as it was found wrong
is wrong in one of them with near certainty.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jobs.run.ledger import Line

_WAYS_BACK = ("corruption", "undecided", "refuted")
_CERTAINTY = 10.0  # wrong turns to expect in the steps that are compared: e^-10 to have none


@dataclass(frozen=True)
class Proof:
    """A step after which the weights must have a hash, for the steps before to be right."""

    step: int
    parameter_hash: str


@dataclass(frozen=True)
class WayBack:
    """Where a run continues."""

    to_step: int  # after which a checkpoint was stored, or 0: from the start
    proof: Proof | None = None  # of the last checkpoint, where there is one behind that step
    least_steps: int = 1  # to compare, here and where the proof fails

    def fields(self) -> dict[str, Any]:
        """Returns the fields of the ledger's events."""
        proves = asdict(self.proof) if self.proof else None
        return {"to_step": self.to_step, "proves": proves, "least_steps": self.least_steps}


@dataclass(frozen=True)
class Void:
    """What must not be continued from, since the run went back behind it."""

    to_step: int
    generation: int  # of the writers, up to this one
    attempt: int  # snapshots are void up to this attempt

    def covers(self, step: int, generation: int) -> bool:
        """Reports whether the checkpoint of a step, by a writer of that generation, is void."""
        return step > self.to_step and generation <= self.generation


def void(lines: Iterable[Line]) -> list[Void]:
    """Returns what the run has gone back behind, in order."""
    ways_back: list[Void] = []
    for line in lines:
        if line.get("event") in _WAYS_BACK and line["to_step"] is not None:
            ways_back.append(Void(line["to_step"], line["generation"], line["attempt"]))
    return ways_back


def proven_to(lines: Iterable[Line]) -> int | None:
    """Returns the step up to which the ledger says that the run is proven, None where it says
    nothing of that.

    An audited step that stands has found what all ranks held before it the same. So have steps that
    were taken again and led to the weights of a checkpoint. What the run went back behind is proven
    no longer, nor is what an attempt takes again.
    """
    known = [*lines]
    ways_back = void(known)
    proven: int | None = None
    for line in known:
        match line.get("event"):
            case None if "audit_seconds" in line:
                proven = max(proven or 0, line["step"] - 1)
            case "proven":
                proven = max(proven or 0, line["step"])
            case "checkpoint" if line.get("proven_to") is not None:
                if not any(way.covers(line["step"], line["generation"]) for way in ways_back):
                    proven = max(proven or 0, line["proven_to"])
            case _:
                last = _last_that_stands(line)
                if proven is not None and last is not None:
                    proven = min(proven, last)
    return proven


def _last_that_stands(line: Line) -> int | None:
    """Returns the last step that an event leaves as it was, None where it changes none."""
    match line.get("event"):
        case "start":
            return int(line["step"])
        case "rollback":
            return int(line["first"]) - 1
        case event if event in _WAYS_BACK:
            return None if line["to_step"] is None else int(line["to_step"])
    return None


def checkpoints_of(lines: Sequence[Line], kept_steps: Iterable[int]) -> list[Proof]:
    """Returns the step and the hash of each stored checkpoint that is not void, oldest first, but
    that of step 0. `kept_steps` are those of the checkpoints that still exist."""
    ways_back = void(lines)
    kept = {*kept_steps}
    hashes: dict[int, str] = {}
    for line in lines:
        if line.get("event") != "checkpoint" or line["step"] not in kept:
            continue
        if not any(way.covers(line["step"], line["generation"]) for way in ways_back):
            hashes[line["step"]] = line["parameter_hash"]
    return [Proof(step, hashes[step]) for step in sorted(hashes) if step > 0]


def way_back(checkpoints: Sequence[Proof], *, least_steps: int) -> WayBack:
    """Returns the way back from a worker whose gradients were wrong: the steps from there to the
    last checkpoint, which are compared, are at least so many."""
    if not checkpoints:
        return WayBack(0, least_steps=least_steps)
    last = checkpoints[-1]
    far_enough = [at.step for at in checkpoints if at.step <= last.step - max(1, least_steps)]
    return WayBack(max(far_enough, default=0), last, least_steps)


def way_back_before(checkpoints: Sequence[Proof], *, audited_step: int) -> WayBack:
    """Returns the way back from a wrong copy of the state: to a state that all ranks had alike when
    the audit of a later step compared them."""
    alike = [checkpoint.step for checkpoint in checkpoints if checkpoint.step < audited_step]
    return WayBack(max(alike, default=0))


def steps_to_compare(*, num_audits: int, num_wrong: int, turns_per_step: int) -> int:
    """Returns the number of steps in which a worker that was wrong in so many of its audits is
    wrong in one of its turns with near certainty."""
    share_wrong = min(1.0, num_wrong / max(1, num_audits))
    return math.ceil(_CERTAINTY / (share_wrong * turns_per_step))


def audits_of_node(lines: Iterable[Line], node: str, *, step: int, every_steps: int) -> int:
    """Returns about how many audits a node has taken part in since it joined the run."""
    for line in lines:
        if line.get("event") != "start":
            continue
        if any(worker["node"] == node for worker in line["workers"]):
            return max(1, (step - line["step"]) // every_steps)
    return 1


def pending(lines: Iterable[Line]) -> WayBack | None:
    """Returns the last way back of which the run still owes the proof."""
    way: WayBack | None = None
    for line in lines:
        if line.get("event") in _WAYS_BACK and line["to_step"] is not None:
            proof = Proof(**line["proves"]) if line["proves"] else None
            way = WayBack(line["to_step"], proof, line["least_steps"]) if proof else None
        elif line.get("event") in ("proven", "refuted"):
            way = None
    return way

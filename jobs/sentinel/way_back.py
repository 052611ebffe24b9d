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

from jobs.run.ledger import Line, void

_CERTAINTY = 10.0  # wrong turns to expect in the steps that are compared: e^-10 to have none

MOST_WAYS_BACK = 8
"""Ways back in a row without a step beyond those that the run has taken before. A node that is wrong
is left out at its second one, so four of them may be wrong in the same steps. Where nobody can be
named, as two workers contradict each other in ever other bits, eight tries have told nothing: it is
for a third worker to say."""


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


def checkpoints_of(lines: Sequence[Line], kept_steps: Iterable[int]) -> list[Proof]:
    """Returns the step and the hash of each stored checkpoint that is not void, oldest first,
    without step 0. `kept_steps` are the steps of the checkpoints that still exist."""
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


def doubtful_step(lines: Iterable[Line]) -> int | None:
    """Returns the step to audit once more, since the run went back from there and nobody was named;
    None where there is none."""
    steps = [line["step"] for line in lines if line.get("event") == "undecided"]
    return steps[-1] if steps else None


def nodes_of_last_step(lines: Iterable[Line]) -> set[str]:
    """Returns the nodes of the workers that have taken the run's last step; none before the
    first."""
    begun: set[str] = set()
    nodes: set[str] = set()
    for line in lines:
        if line.get("event") == "start":
            begun = {worker["node"] for worker in line["workers"]}
        elif line.get("event") in (None, "skip"):
            nodes = begun
    return nodes


def pending(lines: Iterable[Line]) -> WayBack | None:
    """Returns the last way back of which the run still owes the proof."""
    way: WayBack | None = None
    for line in lines:
        if void([line]):
            proof = Proof(**line["proves"]) if line["proves"] else None
            way = WayBack(line["to_step"], proof, line["least_steps"]) if proof else None
        elif line.get("event") in ("proven", "refuted"):
            way = None
    return way


def why_no_further(lines: Iterable[Line]) -> str | None:
    """Returns the reason to take no step again, where the run has gone back too often without
    getting further; None while there is hope.

    Those that refuted a checkpoint do not count: each goes further back than the one before, so
    that they end at the run's start. Nor does what was before the run gave up: a user who resumes
    it then has changed something.
    """
    furthest = 0
    ways: dict[tuple[int, int], Line] = {}  # by attempt and writer: it may tell of several workers
    for line in lines:
        match line.get("event"):
            case None if line["step"] > furthest:
                furthest = line["step"]
                ways = {}
            case "gave_up":
                ways = {}
            case "corruption" | "undecided" if line["to_step"] is not None:
                ways[line["attempt"], line["generation"]] = line
    if len(ways) < MOST_WAYS_BACK:
        return None
    last = [*ways.values()][-1]
    nodes = sorted({*last["nodes"].values()}) if "nodes" in last else [last["node"]]
    return (
        f"the run went back {len(ways)} times and got no further than step {furthest}: workers contradict each other "
        f"again and again, the last time in their {last['what']} at step {last['step']}, on {' and '.join(nodes)}. "
        "Leave that hardware out, or give the run a third worker that decides; the same --run-id continues it"
    )

"""Compares the copies of one state that several nodes have in their memory, before a run continues
from one of them.

Where a worker's state was wrong, so is what it has copied, and the copy's checksum is valid. Other
nodes have the right state then, or one that wrong gradients have altered since.
"""

from collections.abc import Sequence
from typing import Protocol

from jobs.run.ledger import Line, void
from jobs.sentinel.consequences import Records
from jobs.sentinel.proven_part import proven_part
from jobs.sentinel.verdict import What
from jobs.sentinel.way_back import checkpoints_of, way_back_before
from jobs.snapshots.choice import Holding


class Keeps(Protocol):
    """Rank 0's question to the keepers of all nodes."""

    def contradictions(self, *, after_attempt: int) -> list[Holding]: ...


def goes_back_from_snapshots(snapshots: Keeps, records: Records, lines: Sequence[Line]) -> bool:
    """Has the ledger say that nodes hold different copies of one state, and that the run goes back
    to the last checkpoint that is proven. Returns whether it does. Without audits nothing is
    compared. `lines` are the ledger's."""
    proven = proven_part(lines).to_step
    if proven is None:
        return False
    after_attempt = max((way.attempt for way in void(lines)), default=0)
    held = snapshots.contradictions(after_attempt=after_attempt)
    if not held:
        return False
    header, names = held[0].header, _names_of_nodes(lines)
    checkpoints = checkpoints_of(lines, records.kept_steps())
    records.ledger.event(
        "undecided",
        step=header.step + 1,
        attempt=header.attempt,
        generation=records.fence.generation - 1,  # this writer's own checkpoints are to stand
        what=What.SNAPSHOTS.value,
        shown={str(place): f"{one.header.checksum or 0:016x}" for place, one in enumerate(held)},
        nodes={str(place): names.get(one.node, one.node) for place, one in enumerate(held)},
        **way_back_before(checkpoints, audited_step=proven + 1).fields(),
    )
    return True


def _names_of_nodes(lines: Sequence[Line]) -> dict[str, str]:
    """Returns the names of the nodes of the run's workers, by Ray's ids."""
    names: dict[str, str] = {}
    for line in lines:
        if line.get("event") == "start":
            names |= {worker["node_id"]: worker["node"] for worker in line["workers"]}
    return names

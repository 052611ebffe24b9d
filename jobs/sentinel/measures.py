"""Decides what to do about a worker that was found wrong, from what was found before: pure
functions, alike on every rank."""

from collections.abc import Iterable, Sequence
from enum import StrEnum

from jobs.run.ledger import Line
from jobs.sentinel.verdict import Corruption, What

REPEATED_WITHIN_S = 24 * 3600.0
"""A node's second corruption within this time ends its part in the run. A single one may be a stray
particle, of which some hit any cluster."""


class Measure(StrEnum):
    """The measures, the mildest first."""

    TAKEN_AGAIN = "taken_again"  # the step, by the same workers
    # The run goes back to a state from before the copy was wrong, with the same workers
    GONE_BACK = "gone_back"
    # The worker's node has no part in the run any more, which continues from a state that others
    # have proven
    LEFT_OUT = "left_out"


def measure(
    corruptions: Sequence[Corruption],
    *,
    nodes: Sequence[str],
    earlier: Sequence[Line],
    now_s: float,
) -> Measure:
    """Returns the strongest measure that one of the corruptions asks for. `nodes` has the node of
    each rank, and `earlier` the ledger's events so far."""
    measures = list(Measure)
    needed = [_measure_of(corruption, nodes, earlier, now_s) for corruption in corruptions]
    return max(needed, key=measures.index)


def ranks_to_leave_out(
    corruptions: Sequence[Corruption],
    *,
    nodes: Sequence[str],
    earlier: Sequence[Line],
    now_s: float,
) -> list[int]:
    """Returns the ranks whose nodes are to have no part in the run any more."""
    ranks: set[int] = set()
    for corruption in corruptions:
        if _measure_of(corruption, nodes, earlier, now_s) is Measure.LEFT_OUT:
            ranks.add(corruption.rank)
    return sorted(ranks)


def corruptions_of_node(lines: Iterable[Line], node: str) -> list[Line]:
    """Returns the ledger's events that name a worker on a node."""
    return [at for at in lines if at.get("event") in ("corruption", "named") and at["node"] == node]


def _measure_of(
    corruption: Corruption, nodes: Sequence[str], earlier: Sequence[Line], now_s: float
) -> Measure:
    node = nodes[corruption.rank]
    for line in corruptions_of_node(earlier, node):
        if now_s - line["time"] < REPEATED_WITHIN_S:
            return Measure.LEFT_OUT
    if corruption.repeats:
        return Measure.LEFT_OUT
    if corruption.what in (What.WEIGHTS, What.VECTORS, What.UPDATE):
        return Measure.GONE_BACK
    return Measure.TAKEN_AGAIN

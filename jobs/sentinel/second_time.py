"""Tells what comes to light the second time: of a contradiction that was there before the run went
back, and of a step that was computed again. Pure functions."""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.run.ledger import Line
from jobs.sentinel.verdict import Corruption, Turn, Undecided, What


@dataclass(frozen=True)
class Recurrence:
    """The meaning of a second contradiction between ranks at the same step."""

    wrong: Sequence[Corruption] = ()  # who alone does not repeat what it had shown
    repeated: Sequence[Undecided] = ()  # what all have shown again


def recurrence(
    step: int, undecided: Sequence[Undecided], *, nodes: Sequence[str], earlier: Sequence[Line]
) -> Recurrence:
    """Returns what ranks that contradict each other have shown again, since the run last went back
    because of that. `nodes` has the node of each rank, and `earlier` the ledger's lines.

    Nothing is known where the last time was at another step or on other nodes, or where several
    have changed what they show: then the run may go back once more.
    """
    before = _last_time(step, earlier)
    wrong: list[Corruption] = []
    repeated: list[Undecided] = []
    for at in undecided:
        line = before.get(at.what)
        if line is None or line["nodes"] != {str(rank): nodes[rank] for rank in at.shown}:
            continue
        shown = {rank: int(line["shown"][str(rank)], 16) for rank in at.shown}
        changed = [rank for rank in at.shown if shown[rank] != at.shown[rank]]
        if not changed:
            repeated.append(at)
        if len(changed) == 1:
            wrong.append(_changed(at, changed[0]))
    return Recurrence(wrong, repeated)


def unnamed(lines: Sequence[Line], step: int) -> list[Line]:
    """Returns the ledger's event of the last contradiction, if that was at this step and nobody was
    named yet: the steps that have led here again tell whose copy was wrong."""
    told = [line["event"] for line in lines if line.get("event") in ("undecided", "named")]
    if told[-1:] != ["undecided"]:
        return []
    last = _last_contradiction(lines)[-1:]
    return [line for line in last if line["step"] == step and line["what"] != What.SNAPSHOTS]


def _last_contradiction(lines: Sequence[Line]) -> list[Line]:
    """Returns the ledger's events about the last contradiction, of weights and of vectors.

    It tells nothing once an attempt continued from a later checkpoint than that to which the run
    went back: that may have the wrong copy, which all ranks then hold.
    """
    last: list[Line] = []
    for line in lines:
        match line.get("event"):
            case "undecided":
                last = [at for at in last if at["attempt"] == line["attempt"]]
                last.append(line)
            case "start":
                last = [at for at in last if line["step"] <= at["to_step"]]
    return last


def _last_time(step: int, earlier: Sequence[Line]) -> dict[What, Line]:
    """Returns the events about the last contradiction by what it was in, where it was at this
    step."""
    last = _last_contradiction(earlier)
    return {What(line["what"]): line for line in last if line["step"] == step}


def _changed(at: Undecided, rank: int) -> Corruption:
    others = [other for other in at.shown if other != rank]
    votes = (2 * len(others), 1)  # the others have shown the same twice
    right = at.shown[others[0]]
    return Corruption(at.what, rank, at.shown[rank], right, repeats=True, votes=votes)


@dataclass(frozen=True)
class Taking:
    """One time that a step was taken, as far as it is known."""

    figures: Sequence[float]  # of the whole batch
    losses: Sequence[Sequence[float]]  # by rank, of its micro-batches
    answers: Sequence[int | None]  # by rank: the checksum of all its turns, where one was made

    def repeats(self, other: "Taking") -> bool:
        """Reports whether both have the same figures, bit by bit, but for which NaN one is."""
        return [*map(bits_of, self.figures)] == [*map(bits_of, other.figures)]


def wrong_at_first(first: Taking, again: Taking) -> list[Corruption]:
    """Returns who was wrong when a step was first taken: the ranks whose losses or checksums differ
    from what two ranks have found since."""
    corruptions: list[Corruption] = []
    for rank, right in enumerate(again.answers):
        shown, votes = first.answers[rank], (2, 1)
        if shown is not None and right is not None and shown != right:
            turn = Turn(rank, None)
            corruptions.append(Corruption(What.GRADIENT, rank, shown, right, False, turn, votes))
            continue
        pairs = zip(first.losses[rank], again.losses[rank], strict=True)
        for before, after in pairs:
            if bits_of(before) != bits_of(after):
                wrong = Corruption(What.LOSS, rank, bits_of(before), bits_of(after), votes=votes)
                corruptions.append(wrong)
                break
    return corruptions


def bits_of(value: float) -> int:
    """Returns the bits of a number in float64, the same ones for every NaN."""
    one_nan = math.nan if math.isnan(value) else value
    return int.from_bytes(struct.pack(">d", one_nan))

"""Draws the consequences of verdicts on rank 0: decides from the ledger what becomes of a worker that
was wrong and where the run continues, and has the ledger say it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol, assert_never

from cluster.storage.uris import Storage, open_storage
from jobs.exact.audits.audit import Shown
from jobs.run.ledger import Ledger, LedgerWriter, Line
from jobs.run.storage_retry import patiently
from jobs.run.writer_generation import Fence
from jobs.sentinel.measures import Measure, corruptions_of_node, measure, ranks_to_leave_out
from jobs.sentinel.proven_part import ProvenPart
from jobs.sentinel.second_time import Recurrence, recurrence, unnamed
from jobs.sentinel.verdict import Corruption, Undecided, What, named_later
from jobs.sentinel.way_back import (
    Proof,
    WayBack,
    audits_of_node,
    checkpoints_of,
    nodes_of_last_step,
    steps_to_compare,
    way_back,
    way_back_before,
)
from jobs.workers.left_out_nodes import leave_out


class Publishes(Protocol):
    proven_to: int | None


class Records(Protocol):
    """The run, as rank 0's writer has it."""

    @property
    def ledger(self) -> LedgerWriter: ...

    @property
    def fence(self) -> Fence: ...

    @property
    def publisher(self) -> Publishes: ...

    def outline(self) -> Ledger: ...

    def kept_steps(self) -> list[int]: ...


@dataclass(frozen=True)
class AuditedAttempt:
    """The sentinel's knowledge of its attempt."""

    number: int
    first_step: int
    places: Sequence[Mapping[str, Any]]  # where each rank runs
    owed: WayBack | None  # whose proof the run owes
    proven: ProvenPart  # of the run, as the attempt begins

    @property
    def nodes(self) -> list[str]:
        return [str(place["node"]) for place in self.places]


@dataclass(frozen=True)
class Audited:
    """An attempt's audits, as far as they are known where a consequence is drawn."""

    step: int  # in which something was found; 0 in the self-test
    began_s: float  # on the performance counter: when that differed
    last_alike: int  # the step before which all copies of the state were the same
    every_steps: int
    num_turns: int  # of a rank in a step


@dataclass(frozen=True)
class Decision:
    measure: Measure
    reason: str  # in words


class Consequences:
    """The consequences of one attempt."""

    def __init__(self, records: Records, attempt: AuditedAttempt, *, storage_uri: str) -> None:
        self._records, self._attempt, self._storage_uri = records, attempt, storage_uri

    def of_corruptions(self, at: Audited, corruptions: Sequence[Corruption]) -> Decision:
        """Has the ledger say what becomes of workers that were wrong, and leaves their nodes out
        where that is it."""
        lines = self._records.outline().lines
        nodes = self._attempt.nodes
        known: dict[str, Any] = {"nodes": nodes, "earlier": lines, "now_s": time.time()}
        chosen = measure(corruptions, **known)
        way = self._way_back(at, chosen, corruptions, lines)
        if way:
            self._go_back_to(way)
        for corruption in corruptions:
            self._tell(
                "corruption",
                at.step,
                measure=chosen.value,
                seconds=round(time.perf_counter() - at.began_s, 3),
                **_fields(corruption),
                **self._attempt.places[corruption.rank],
                **(way.fields() if way else {"to_step": None}),
            )
        names = ", ".join(sorted({f"rank {one.rank} on {nodes[one.rank]}" for one in corruptions}))
        reason = f"step {at.step}: {names} was wrong in its {corruptions[0].what.value}"
        if chosen is Measure.LEFT_OUT:
            for rank in ranks_to_leave_out(corruptions, **known):
                place = {**self._attempt.places[rank], "step": at.step, "reason": reason}
                patiently(partial(leave_out, self._storage(), place), "nodes left out")
        return Decision(chosen, f"{reason}; {_consequence(chosen, way)}")

    def recurrence(self, step: int, undecided: Sequence[Undecided]) -> Recurrence:
        """Returns what ranks that contradict each other have shown before."""
        lines = self._records.outline().lines
        return recurrence(step, undecided, nodes=self._attempt.nodes, earlier=lines)

    def of_undecided(self, at: Audited, undecided: Sequence[Undecided]) -> None:
        """Has the ledger say that ranks hold different copies, and to which state from before the
        run goes back: the same steps, taken again, tell who was wrong."""
        way = way_back_before(self._checkpoints(), audited_step=at.last_alike)
        self._go_back_to(way)
        for one in undecided:
            self._tell(
                "undecided",
                at.step,
                what=one.what.value,
                shown={str(rank): f"{shown:016x}" for rank, shown in one.shown.items()},
                nodes={str(rank): self._attempt.nodes[rank] for rank in one.shown},
                **way.fields(),
            )

    def name_later(self, step: int, shown: Sequence[Shown]) -> None:
        """Has the ledger name who was wrong in this step before the run went back, where that was
        undecided."""
        for line in unnamed(self._records.outline().lines, step):
            before = {int(rank): int(checksum, 16) for rank, checksum in line["shown"].items()}
            for corruption in named_later(What(line["what"]), before, shown):
                node = line["nodes"][str(corruption.rank)]
                self._records.ledger.event("named", step=step, **_fields(corruption), node=node)

    def of_proof(self, owed: WayBack, proof: Proof, found: str) -> WayBack | None:
        """Has the ledger say whether the weights are the stored ones. Returns how the run goes back
        further, None where it does not."""
        if found == proof.parameter_hash:
            self._records.ledger.event("proven", **asdict(proof), attempt=self._attempt.number)
            return None
        way: WayBack | None = None
        if owed.to_step > 0:
            earlier = [at for at in self._checkpoints() if at.step <= owed.to_step]
            way = way_back(earlier, least_steps=owed.least_steps)
            self._go_back_to(way)
        fields = way.fields() if way else {"to_step": None}
        parameter_hash = proof.parameter_hash
        self._tell("refuted", proof.step, parameter_hash=parameter_hash, found=found, **fields)
        return way

    def tell_asked_again(self, step: int, **fields: Any) -> None:
        """Has the ledger say that the lanes of a step were computed again, and who was wrong is not
        known, or nobody was."""
        self._records.ledger.event("asked_again", step=step, attempt=self._attempt.number, **fields)

    def _way_back(
        self,
        at: Audited,
        chosen: Measure,
        corruptions: Sequence[Corruption],
        lines: Sequence[Line],
    ) -> WayBack | None:
        """Returns where the run continues, None where it stays."""
        match chosen:
            case Measure.TAKEN_AGAIN:
                return None
            case Measure.GONE_BACK:
                return way_back_before(self._checkpoints(), audited_step=at.last_alike)
            case Measure.LEFT_OUT:
                count = partial(self._steps_to_compare, at, lines)
                least_steps = max(map(count, corruptions), default=0)
                return (
                    way_back(self._checkpoints(), least_steps=least_steps) if least_steps else None
                )
            case _:
                assert_never(chosen)

    def _steps_to_compare(self, at: Audited, lines: Sequence[Line], corruption: Corruption) -> int:
        """Returns how many steps are to be compared, 0 where the worker has taken none."""
        node = self._attempt.nodes[corruption.rank]
        if corruption.what is What.SELF_TEST:
            return int(node in nodes_of_last_step(lines))
        return steps_to_compare(
            num_audits=audits_of_node(lines, node, step=at.step, every_steps=at.every_steps),
            num_wrong=1 + len(corruptions_of_node(lines, node)) + corruption.repeats,
            turns_per_step=at.num_turns,
        )

    def _go_back_to(self, way: WayBack) -> None:
        publisher = self._records.publisher
        publisher.proven_to = min(publisher.proven_to or 0, way.to_step)

    def _checkpoints(self) -> list[Proof]:
        return checkpoints_of(self._records.outline().lines, self._records.kept_steps())

    def _tell(self, name: str, step: int, **fields: Any) -> None:
        self._records.ledger.event(
            name,
            step=step,
            attempt=self._attempt.number,
            generation=self._records.fence.generation,
            **fields,
        )

    def _storage(self) -> Storage:
        return open_storage(self._storage_uri)


def _fields(corruption: Corruption) -> dict[str, Any]:
    turn = corruption.turn
    return {
        "what": corruption.what.value,
        "rank": corruption.rank,
        "turn": [turn.rank, turn.number] if turn else None,
        "shown": f"{corruption.shown:016x}",
        "right": f"{corruption.right:016x}",
        "repeats": corruption.repeats,
        "votes": [*corruption.votes],
    }


def _consequence(chosen: Measure, way: WayBack | None) -> str:
    match chosen:
        case Measure.TAKEN_AGAIN:
            return "the step is taken again"
        case Measure.GONE_BACK:
            return f"the run goes back to step {way.to_step if way else 0}"
        case Measure.LEFT_OUT:
            goes_back = f", and the run goes back to step {way.to_step}" if way else ""
            return f"its node is left out{goes_back}"
        case _:
            assert_never(chosen)

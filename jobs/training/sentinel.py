"""Judges each audited step of one attempt, the same on every rank, and has the ledger say what was
found and done.

Rank 0 decides from the ledger what becomes of a worker that is wrong; the verdict itself every rank
draws from the same table.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NoReturn, assert_never

from cluster.storage.uris import open_storage
from jobs.exact.batch_gradient import BatchGradient
from jobs.exact.state.sharding import Sharding
from jobs.exact.state.train_state import TrainState
from jobs.exact.stored_state import hash_of_weights
from jobs.exact.sums.audit import Shown, holders_of
from jobs.exact.sums.excerpt import Repeated
from jobs.exact.sums.step_totals import Measured
from jobs.run.ledger import Line
from jobs.run.run_plan import RunPlan
from jobs.run.step_timer import StepTimer
from jobs.run.storage_retry import patiently
from jobs.sentinel.measures import (
    Measure,
    corruptions_of_node,
    measure,
    ranks_to_leave_out,
)
from jobs.sentinel.verdict import (
    CLEAN,
    Corruption,
    Undecided,
    Verdict,
    What,
    disputed_turns,
    named_later,
    of_copies,
    of_repeated,
    of_self_tests,
    of_turns,
)
from jobs.sentinel.way_back import (
    Proof,
    WayBack,
    audits_of_node,
    checkpoints_of,
    proven_to,
    steps_to_compare,
    way_back,
    way_back_before,
)
from jobs.training.kernels import tested_again
from jobs.training.run_writer import RunWriter
from jobs.workers.left_out_nodes import leave_out
from jobs.workers.worker_group import WorkerGroup
from model.errors import UserError


class CorruptionError(Exception):
    """A worker was found wrong, and its node has no part in the run any more: all workers end, to
    be started on other nodes."""


@dataclass(frozen=True)
class _Decision:
    measure: Measure
    reason: str  # in words


@dataclass(frozen=True)
class AuditedAttempt:
    """What a sentinel knows of its attempt."""

    number: int
    first_step: int
    places: Sequence[dict[str, Any]]  # where each rank runs
    owed: WayBack | None  # whose proof the run owes


class Sentinel:
    """The audits of one attempt, as one rank sees them; rank 0 has the run's writer."""

    def __init__(
        self,
        plan: RunPlan,
        gradient: BatchGradient,
        state: TrainState,
        group: WorkerGroup,
        attempt: AuditedAttempt,
        *,
        writer: RunWriter | None,
    ) -> None:
        self._plan, self._gradient, self._state, self._group = plan, gradient, state, group
        self._places, self._number, self._writer = attempt.places, attempt.number, writer
        # The step before which all copies of the state were the same
        self._last_alike = attempt.first_step
        self._owed = attempt.owed
        self._began_s = 0.0  # to judge, when something differed
        self.update_again: Repeated | None = None
        """What ranks found when they made the update of this step again."""
        if writer and gradient.audits.every_steps:
            known = proven_to(writer.outline().lines) or 0
            writer.publisher.proven_to = min(known, attempt.first_step - 1)

    def cleared(self, step: int, measured: Measured, timer: StepTimer) -> Measured | None:
        """Returns the figures of a step in which nothing is in dispute any more, and None where the
        run must go back. Raises `CorruptionError` where a worker's node has no part in the run any
        more, and `UserError` where nobody can tell who is wrong."""
        while measured.shown:
            self._began_s = time.perf_counter()
            verdict = self._verdict(step, measured, timer)
            if verdict.is_clean:
                self._last_alike = step
                self._prove(step - 1)
                self._name_later(step, measured.shown)
                return measured
            if verdict.undecided:
                self._go_back_undecided(step, verdict.undecided)
                return None
            decision = self._decided(step, verdict.corruptions)
            match decision.measure:
                case Measure.TAKEN_AGAIN:
                    measured = self._gradient.of_step(step, timer)
                case Measure.GONE_BACK:
                    return None
                case Measure.LEFT_OUT:
                    raise CorruptionError(decision.reason)
                case _:
                    assert_never(decision.measure)
        return measured

    def compare_self_tests(self, checksum: str, problem: str, kinds: Sequence[object]) -> None:
        """Compares the gradients of the self-tests of workers with the same hardware, before they
        train; a self-test that failed has a problem in place of a checksum. Raises what `cleared`
        does, and `UserError` where the self-test fails on all."""
        self._self_test, self._began_s = checksum, time.perf_counter()
        checksums, problems = zip(*self._group.gather((checksum, problem)), strict=True)
        if not self._gradient.audits.every_steps or all(problems):
            if any(problems):
                raise UserError(next(filter(None, problems)))
            return
        verdict = of_self_tests(checksums, kinds)
        if verdict.undecided:
            raise UserError(self._why_undecided(0, verdict.undecided[0]))
        if verdict.corruptions:
            raise CorruptionError(self._decided(0, verdict.corruptions).reason)

    def goes_back_after(self, step: int) -> bool:
        """Returns whether the run must go back though a step is taken: an update was wrong, or the
        step refutes what was stored. Raises what `cleared` does."""
        again, self.update_again = self.update_again, None
        self._began_s = time.perf_counter()
        verdict = of_repeated(What.UPDATE, again) if again else CLEAN
        if verdict.undecided:
            self._end_undecided(step, verdict.undecided[0])
        if verdict.corruptions:
            decision = self._decided(step, verdict.corruptions)
            if decision.measure is Measure.LEFT_OUT:
                raise CorruptionError(decision.reason)
            return True
        return self._is_refuted(step)

    def _is_refuted(self, step: int) -> bool:
        """Proves a step, where the run owes that. Returns whether the run must go back further,
        since these weights are others than those that were stored."""
        owed = self._owed
        if owed is None or owed.proof is None or owed.proof.step != step:
            return False
        self._owed = None
        found = hash_of_weights(self._state, self._group, step=step)
        return bool(self._group.broadcast(self._told_of_proof(owed, owed.proof, found)))

    def _verdict(self, step: int, measured: Measured, timer: StepTimer) -> Verdict:
        sharding: Sharding = self._state.sharding
        vectors = next(iter(self._state.vectors))
        holders = [holders_of(sharding, "values"), holders_of(sharding, vectors)]
        verdict = of_copies(measured.shown, holders=holders)
        if not verdict.is_clean:
            return verdict  # wrong weights have wrong gradients
        audit = self._gradient.audit_of_step(step)
        assert audit is not None, "it has shown checksums"
        disputed = disputed_turns(audit, measured.shown)
        if not disputed:
            return of_repeated(What.SUM, measured.sums) if measured.sums else CLEAN
        turns = [(turn.rank, turn.number) for turn in disputed]
        answers = self._gradient.answers(step, turns, timer)
        return of_turns(audit, measured.shown, disputed, answers)

    def _prove(self, step: int) -> None:
        """Has the run's checkpoints be proven up to a step, also where that is an earlier one."""
        if self._writer:
            self._writer.publisher.proven_to = step

    def _go_back_to(self, way: WayBack) -> None:
        assert self._writer is not None
        proven = self._writer.publisher.proven_to
        self._prove(min(proven or 0, way.to_step))

    @property
    def _nodes(self) -> list[str]:
        return [str(place["node"]) for place in self._places]

    def _decided(self, step: int, corruptions: Sequence[Corruption]) -> _Decision:
        """Returns what rank 0 has decided, once the ledger says it."""
        decision = self._decide(step, corruptions) if self._writer else None
        decided: _Decision = self._group.broadcast(decision)
        return decided

    def _decide(self, step: int, corruptions: Sequence[Corruption]) -> _Decision:
        assert self._writer is not None
        lines = self._writer.outline().lines
        known: dict[str, Any] = {"nodes": self._nodes, "earlier": lines, "now_s": time.time()}
        chosen = measure(corruptions, **known)
        way = self._way_back(step, chosen, corruptions, lines)
        if way:
            self._go_back_to(way)
        for corruption in corruptions:
            self._writer.ledger.event(
                "corruption",
                step=step,
                attempt=self._number,
                generation=self._writer.fence.generation,
                measure=chosen.value,
                seconds=round(time.perf_counter() - self._began_s, 3),
                **_fields(corruption),
                **self._places[corruption.rank],
                **(way.fields() if way else {"to_step": None}),
            )
        names = ", ".join(
            sorted({f"rank {at.rank} on {self._nodes[at.rank]}" for at in corruptions})
        )
        reason = f"step {step}: {names} was wrong in its {corruptions[0].what.value}"
        if chosen is Measure.LEFT_OUT:
            ranks = ranks_to_leave_out(corruptions, **known)
            for rank in ranks:
                place = self._places[rank] | {"step": step, "reason": reason}
                write = partial(leave_out, open_storage(self._plan.config.storage.uri), place)
                patiently(write, "nodes left out")
        return _Decision(chosen, f"{reason}; {_consequence(chosen, way)}")

    def _way_back(
        self,
        step: int,
        chosen: Measure,
        corruptions: Sequence[Corruption],
        lines: Sequence[Line],
    ) -> WayBack | None:
        """Returns where the run continues, None where it stays."""
        assert self._writer is not None
        if corruptions[0].what is What.SELF_TEST:
            return None  # it has not trained yet
        checkpoints = checkpoints_of(lines, self._writer.kept_steps())
        match chosen:
            case Measure.TAKEN_AGAIN:
                return None
            case Measure.GONE_BACK:
                return way_back_before(checkpoints, audited_step=self._last_alike)
            case Measure.LEFT_OUT:
                least_steps = max(self._steps_to_compare(step, at, lines) for at in corruptions)
                return way_back(checkpoints, least_steps=least_steps)
            case _:
                assert_never(chosen)

    def _steps_to_compare(self, step: int, corruption: Corruption, lines: Sequence[Line]) -> int:
        node = self._nodes[corruption.rank]
        every_steps = self._gradient.audits.every_steps
        return steps_to_compare(
            num_audits=audits_of_node(lines, node, step=step, every_steps=every_steps),
            num_wrong=1 + len(corruptions_of_node(lines, node)) + corruption.repeats,
            turns_per_step=self._gradient.num_turns(step),
        )

    def _told_of_proof(self, owed: WayBack, proof: Proof, found: str) -> bool:
        """Has the ledger say whether the weights are those that were stored. Returns whether the
        run must go back further; on other ranks than 0, nothing that counts."""
        if self._writer is None:
            return False
        tell = self._writer.ledger.event
        if found == proof.parameter_hash:
            tell("proven", **asdict(proof), attempt=self._number)
            self._prove(proof.step)
            return False
        way: WayBack | None = None
        if owed.to_step > 0:
            lines = self._writer.outline().lines
            checkpoints = checkpoints_of(lines, self._writer.kept_steps())
            earlier = [at for at in checkpoints if at.step <= owed.to_step]
            way = way_back(earlier, least_steps=owed.least_steps)
            self._go_back_to(way)
        tell(
            "refuted",
            **asdict(proof),
            found=found,
            attempt=self._number,
            generation=self._writer.fence.generation,
            **(way.fields() if way else {"to_step": None}),
        )
        return way is not None

    def _go_back_undecided(self, step: int, undecided: Sequence[Undecided]) -> None:
        """Has the ledger say that ranks hold different copies, and to which state from before the
        run goes back: the same steps, taken again, tell who was wrong. Raises `UserError` for
        gradients and sums, which differ again however often they are computed."""
        for at in undecided:
            if at.what in (What.GRADIENT, What.SUM):
                self._end_undecided(step, at)
        if self._writer is None:
            return
        lines = self._writer.outline().lines
        checkpoints = checkpoints_of(lines, self._writer.kept_steps())
        way = way_back_before(checkpoints, audited_step=self._last_alike)
        self._go_back_to(way)
        for at in undecided:
            self._writer.ledger.event(
                "undecided",
                step=step,
                attempt=self._number,
                generation=self._writer.fence.generation,
                what=at.what.value,
                shown={str(rank): f"{shown:016x}" for rank, shown in at.shown.items()},
                nodes={str(rank): self._nodes[rank] for rank in at.shown},
                **way.fields(),
            )

    def _name_later(self, step: int, shown: Sequence[Shown]) -> None:
        """Has the ledger name who was wrong in this step before the run went back, where that was
        undecided."""
        if self._writer is None:
            return
        lines = self._writer.outline().lines
        last = [at for at in lines if at.get("event") in ("undecided", "named")][-1:]
        for at in last:
            if at["event"] == "named" or at["step"] != step:
                continue
            before = {int(rank): int(checksum, 16) for rank, checksum in at["shown"].items()}
            for corruption in named_later(What(at["what"]), before, shown):
                node = at["nodes"][str(corruption.rank)]
                self._writer.ledger.event("named", step=step, **_fields(corruption), node=node)

    def _end_undecided(self, step: int, undecided: Undecided) -> NoReturn:
        """Has the ranks take their self-tests again, of which they know the right answer: whoever
        gives another one now is wrong. Raises `CorruptionError` where that tells some apart, and
        `UserError` where all give the right one, or none does."""
        is_right = tested_again(self._plan, self._state.device) == self._self_test
        passes = self._group.gather(is_right)
        shown = undecided.shown
        right = [checksum for rank, checksum in shown.items() if passes[rank]]
        wrong = [rank for rank in shown if not passes[rank]]
        if not right or not wrong:
            raise UserError(self._why_undecided(step, undecided))
        corruptions: list[Corruption] = []
        for rank in wrong:
            at = Corruption(undecided.what, rank, shown[rank], right[0], repeats=True)
            corruptions.append(at)
        raise CorruptionError(self._decided(step, corruptions).reason)

    def _why_undecided(self, step: int, undecided: Undecided) -> str:
        names = " and ".join(f"rank {rank} on {self._nodes[rank]}" for rank in undecided.shown)
        when = f"at step {step}" if step else "in the self-test"
        return (
            f"{names} differ {when} in bits that must be the same. Each gives its own answer again, and nobody can "
            "tell which is wrong, also not by their self-tests: nothing of the step was stored. Give the run a third "
            "worker, which decides it, or leave one of these nodes out; the same --run-id continues it"
        )


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

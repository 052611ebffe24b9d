"""Judges each audited step of one attempt, the same on every rank, and asks again where a step's
figures cannot be trusted.

The verdict itself every rank draws from the same table; what becomes of a worker that is wrong rank 0
decides (`jobs/sentinel/consequences.py`).
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from jobs.exact.audited_gradient import AuditedGradient, AuditedStep
from jobs.exact.audits.audit import Shown, holders_of
from jobs.exact.audits.checksum import checksums_of_state, from_halves, halves_of
from jobs.exact.audits.excerpt import Repeated
from jobs.run.run_plan import RunPlan
from jobs.sentinel.consequences import Audited, AuditedAttempt, Consequences, Decision
from jobs.sentinel.measures import Measure
from jobs.sentinel.proven_part import NOT_AUDITED
from jobs.sentinel.second_time import Recurrence, Taking, wrong_at_first
from jobs.sentinel.verdict import (
    CLEAN,
    Corruption,
    Undecided,
    Verdict,
    What,
    disputed_turns,
    of_copies,
    of_repeated,
    of_self_tests,
    of_state,
    of_turns,
)
from jobs.training.kernels import tested_again
from jobs.training.run_writer import RunWriter
from raymill.errors import UserError
from raymill.state.stored_state import hash_of_weights
from raymill.state.train_state import TrainState
from raymill.step_timer import StepTimer
from raymill.workers.worker_group import WorkerGroup


class CorruptionError(Exception):
    """A worker was found wrong, and its node has no part in the run any more: all workers end, to
    be started on other nodes."""


class Sentinel:
    """The audits of one attempt, as one rank sees them; rank 0 has the run's writer."""

    def __init__(
        self,
        plan: RunPlan,
        gradient: AuditedGradient,
        state: TrainState,
        group: WorkerGroup,
        attempt: AuditedAttempt,
        *,
        writer: RunWriter | None,
    ) -> None:
        self._plan, self._gradient, self._state, self._group = plan, gradient, state, group
        self._attempt, self._writer = attempt, writer
        self._consequences: Consequences | None = None  # rank 0 draws them
        if writer:
            uri = plan.config.storage.uri
            self._consequences = Consequences(writer, attempt, storage_uri=uri)
        # The step before which all copies of the state were the same
        self._last_alike = attempt.first_step
        self._owed = attempt.owed
        self._began_s = 0.0  # to judge, when something differed
        self._num_verdicts = 0  # that have named somebody
        self.update_again: Repeated | None = None
        """The findings of ranks that made the update of this step again."""
        self.proven = NOT_AUDITED
        """How far the run is proven."""
        if gradient.audits.every_steps:
            self.proven = replace(attempt.proven, to_step=attempt.proven.to_step or 0)
            self._tell_publisher()

    def cleared(self, step: int, measured: AuditedStep, timer: StepTimer) -> AuditedStep | None:
        """Returns the figures of a step in which nothing is in dispute any more, and None where the
        run must go back. Raises `CorruptionError` where a worker's node has no part in the run any
        more, and `UserError` where nobody can tell who is wrong."""
        while measured.shown:
            self._began_s = time.perf_counter()
            verdict = self._verdict(step, measured, timer)
            if verdict.is_clean:
                self._last_alike = step
                self._prove(step - 1)
                if self._consequences:
                    self._consequences.name_later(step, measured.shown)
                return measured
            if verdict.undecided:
                self._settle(step, verdict.undecided)
                return None
            match self._carried_out(step, verdict.corruptions):
                case Measure.TAKEN_AGAIN:
                    measured = self._gradient.of_step(step, timer, audit=measured.audit)
                case _:
                    return None
        return measured

    def asked_again(
        self, step: int, first: AuditedStep, reason: str, timer: StepTimer
    ) -> AuditedStep | None:
        """Takes a step again whose figures cannot be trusted, for the reason given, and has another
        rank compute each of its lanes too. Returns the figures that stand: the same ones where the
        data is at fault, and others where a worker was wrong. Returns None, and raises, as
        `cleared` does."""
        if not self._gradient.audits.every_steps:
            return first
        began_s, num_verdicts = time.perf_counter(), self._num_verdicts
        before = self._taking(first, self._gradient.watched())
        again = self.cleared(step, self._gradient.audited_again(step, timer), timer)
        if again is None:
            return None
        after = self._taking(again, [row.own_turn for row in again.shown])
        is_same = after.repeats(before)
        if is_same and not self._state.is_finite() and self.goes_back_from(step):
            return None
        corruptions = [] if is_same else wrong_at_first(before, after)
        if corruptions:
            self._carried_out(step, corruptions)
        if self._num_verdicts > num_verdicts:
            return again
        # Whoever was wrong in this step is named the next time
        self._gradient.watches |= not is_same
        if self._consequences:
            seconds = round(time.perf_counter() - began_s, 3)
            self._consequences.tell_asked_again(
                step,
                reason=reason,
                found=f"loss {again.loss}, gradient norm {again.norm}",
                differs=not is_same,
                seconds=seconds,
            )
        return again

    def goes_back_from(self, step: int) -> bool:
        """Returns whether the run must go back since the weights before a step are not finite, and
        not all that hold them have made them so. Raises what `cleared` does."""
        if not self._gradient.audits.every_steps:
            return False
        if self._update_was_wrong(step - 1):
            return True
        self._began_s = time.perf_counter()
        own = from_halves(halves_of(checksums_of_state(self._state)).tolist())
        rows = [Shown(0, 0, *row) for row in self._group.gather(own)]
        verdict = of_copies(rows, holders=self._holders)
        if verdict.is_clean:
            return self._goes_back_to_see(step, rows)
        if verdict.undecided:
            self._settle(step, verdict.undecided)
        else:
            self._carried_out(step, verdict.corruptions)
        return True

    def _goes_back_to_see(self, step: int, rows: Sequence[Shown]) -> bool:
        """Has the run go back once where each rank has updated a part of the weights alone: whether
        that was right shows if they come to the same again."""
        if not self._state.sharding.is_sole_copy:
            return False
        weights = of_state(rows, What.WEIGHTS)
        alone = [Undecided(What.WEIGHTS, dict(enumerate(weights)))]
        if self._recurrence(step, alone).repeated:
            return False
        self._go_back(step, alone)
        return True

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
            self._carried_out(0, verdict.corruptions)

    def goes_back_after(self, step: int) -> bool:
        """Returns whether the run must go back though a step is taken: an update was wrong, or the
        step refutes what was stored. Raises what `cleared` does."""
        return self._update_was_wrong(step) or self._is_refuted(step)

    def _update_was_wrong(self, step: int) -> bool:
        again, self.update_again = self.update_again, None
        self._began_s = time.perf_counter()
        verdict = of_repeated(What.UPDATE, again) if again else CLEAN
        if verdict.undecided:
            self._end_undecided(step, verdict.undecided[0])
        if verdict.corruptions:
            self._carried_out(step, verdict.corruptions)
        return bool(verdict.corruptions)

    def _is_refuted(self, step: int) -> bool:
        """Proves a step, where the run owes that. Returns whether the run must go back further,
        since these weights are others than those that were stored."""
        owed = self._owed
        if owed is None or owed.proof is None or owed.proof.step != step:
            return False
        self._owed = None
        found = hash_of_weights(self._state, self._group, step=step)
        told: tuple[bool, bool] | None = None
        if self._consequences:
            way = self._consequences.of_proof(owed, owed.proof, found)
            told = found == owed.proof.parameter_hash, way is not None
        is_proven, goes_back = self._group.broadcast(told)
        if is_proven:
            self._prove(step)
        return bool(goes_back)

    def _verdict(self, step: int, measured: AuditedStep, timer: StepTimer) -> Verdict:
        verdict = of_copies(measured.shown, holders=self._holders)
        if not verdict.is_clean:
            return verdict  # wrong weights have wrong gradients
        audit = measured.audit
        assert audit is not None, "it has shown checksums"
        disputed = disputed_turns(audit, measured.shown)
        if not disputed:
            return of_repeated(What.SUM, measured.sums) if measured.sums else CLEAN
        ranks = [turn.rank for turn in disputed]
        answers = self._gradient.answers(step, audit, ranks, timer)
        return of_turns(audit, measured.shown, disputed, answers)

    @property
    def _holders(self) -> list[list[int]]:
        sharding, vectors = self._state.sharding, next(iter(self._state.vectors))
        return [holders_of(sharding, "values"), holders_of(sharding, vectors)]

    def _taking(self, measured: AuditedStep, answers: Sequence[int | None]) -> Taking:
        figures = (measured.loss, measured.norm, measured.num_counted)
        return Taking(figures, self._gradient.exact.totals.losses(), answers)

    def _prove(self, step: int) -> None:
        """Has the run be proven up to a step, also where that is an earlier one."""
        self.proven = self.proven.up_to(step)
        self._tell_publisher()

    def _tell_publisher(self) -> None:
        if self._writer:
            self._writer.publisher.proven_to = self.proven.to_step

    def _at(self, step: int) -> Audited:
        return Audited(
            step,
            began_s=self._began_s,
            last_alike=self._last_alike,
            every_steps=self._gradient.audits.every_steps,
            num_turns=len(self._gradient.passes.plan(max(step, 1)).turns),
        )

    def _carried_out(self, step: int, corruptions: Sequence[Corruption]) -> Measure:
        """Returns what rank 0 has decided, once the ledger says it. Raises `CorruptionError` where
        a node has no part in the run any more."""
        decision: Decision | None = None
        if self._consequences:
            decision = self._consequences.of_corruptions(self._at(step), corruptions)
        decided: Decision = self._group.broadcast(decision)
        self._num_verdicts += 1
        if decided.measure is Measure.LEFT_OUT:
            raise CorruptionError(decided.reason)
        return decided.measure

    def _settle(self, step: int, undecided: Sequence[Undecided]) -> None:
        """Has the run go back where ranks hold different copies, unless they did so before: then
        whoever alone does not repeat itself is wrong, or their self-tests decide. These decide at
        once about gradients and sums, which differ again however often they are computed. Raises
        what `_end_undecided` does."""
        for at in undecided:
            if at.what in (What.GRADIENT, What.SUM):
                self._end_undecided(step, at)
        known = self._recurrence(step, undecided)
        if known.wrong:
            self._carried_out(step, known.wrong)
        self._go_back(step, undecided)
        for at in known.repeated:
            self._end_undecided(step, at)

    def _recurrence(self, step: int, undecided: Sequence[Undecided]) -> Recurrence:
        known = self._consequences.recurrence(step, undecided) if self._consequences else None
        recurrence: Recurrence = self._group.broadcast(known)
        return recurrence

    def _go_back(self, step: int, undecided: Sequence[Undecided]) -> None:
        if self._consequences:
            self._consequences.of_undecided(self._at(step), undecided)

    def _end_undecided(self, step: int, undecided: Undecided) -> NoReturn:
        """Has the ranks take their self-tests again, of which they know the right answer: whoever
        gives another one now is wrong. Raises `CorruptionError` where that tells some apart, and
        `UserError` where all give the right one, or none does."""
        is_right = tested_again(self._plan, self._state.device) == self._self_test
        passes = self._group.gather(is_right)
        shown = undecided.shown
        right = [checksum for rank, checksum in shown.items() if passes[rank]]
        wrong = [rank for rank in shown if not passes[rank]]
        if right and wrong:
            corruptions: list[Corruption] = []
            for rank in wrong:
                at = Corruption(undecided.what, rank, shown[rank], right[0], repeats=True)
                corruptions.append(at)
            self._carried_out(step, corruptions)
        raise UserError(self._why_undecided(step, undecided))

    def _why_undecided(self, step: int, undecided: Undecided) -> str:
        nodes, names = self._attempt.nodes, list[str]()
        for rank, shown in undecided.shown.items():
            names.append(f"rank {rank} on {nodes[rank]} (checksum {shown:016x})")
        when = f"at step {step}" if step else "before the first step"
        return (
            f"{' and '.join(names)} differ {when} in bits that must be the same, of what is called "
            f"{undecided.what.value}. Each gives its own answer again, and nobody can tell which is wrong, also not by "
            "their self-tests: nothing of the step was stored. Give the run a third worker, which decides it, or leave "
            "one of these nodes out; the same --run-id continues it"
        )

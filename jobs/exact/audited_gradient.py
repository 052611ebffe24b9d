"""Has ranks compute parts of one another's steps again, beside the step itself."""

import time
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from torch import Tensor

from jobs.exact.audits.audit import Audit, Audits, Shown, worst_block
from jobs.exact.audits.checksum import (
    TurnChecksum,
    checksum_of_turns,
    checksums_of_state,
    from_halves,
    halves_of,
)
from jobs.exact.audits.excerpt import Excerpt, Repeated
from jobs.exact.audits.update_notes import UpdateNotes
from jobs.exact.batch_gradient import BatchGradient, OwnPasses
from jobs.exact.stock_gradient import StockGradient
from raymill.observer import StepObserver
from raymill.state.flat_layout import BLOCK
from raymill.state.span import Span
from raymill.state.train_state import TrainState
from raymill.step_timer import StepTimer
from raymill.sums.step_plan import StepPlan
from raymill.sums.step_totals import Measured
from raymill.workers.worker_group import WorkerGroup


class AuditedStep(NamedTuple):
    """The figures of a step's whole batch, equal on every rank, and what an audit of it brought."""

    loss: float  # nats per counted token
    norm: float  # of the gradient
    num_counted: int  # tokens that the loss counts
    audit: Audit | None = None  # what was computed twice
    shown: Sequence[Shown] = ()  # by rank
    sums: Repeated | None = None
    audit_s: float | None = None  # what this rank's audit took


class AuditedGradient:
    """Computes the gradient of every step, and audits some of them."""

    def __init__(
        self,
        gradient: BatchGradient | StockGradient,
        state: TrainState,
        group: WorkerGroup,
        *,
        nodes: Sequence[str] = (),
        doubtful: int | None = None,
    ) -> None:
        """`nodes` has the node of each rank where ranks are to audit one another. They audit the
        step `doubtful` in any case, and where each updates a part of the state alone, the step
        whose update led to it. Stock gradients are not audited."""
        self._stock = gradient if isinstance(gradient, StockGradient) else None
        self._exact = gradient if isinstance(gradient, BatchGradient) else None
        self.passes = gradient.passes
        self._state = state
        self._group = group
        also = range(0)
        if doubtful is not None:
            also = range(doubtful - state.sharding.is_sole_copy, doubtful + 1)
        train = self.passes.config.train
        is_audited = self._exact is not None and bool(nodes)
        self.audits = Audits.of(
            train.audit_every_steps if is_audited else 0,
            self.passes.plan_of_count(self.passes.schedule.full_lanes),
            nodes,
            seed=train.seed,
            also=also,
        )
        self.watches = False
        """Whether each step has a checksum made of all turns of this rank."""
        self._watched: Tensor | None = None  # the one of the last step

    @property
    def exact(self) -> BatchGradient:
        """The exact sum, which alone can be looked into."""
        assert self._exact is not None, "stock gradients cannot be looked into"
        return self._exact

    def of_step(self, step: int, timer: StepTimer, *, audit: Audit | None = None) -> AuditedStep:
        """Puts the gradient of the whole batch into the state's buffer; with a sharded optimizer,
        only this rank's parts of it. `audit` takes the place of the step's own."""
        if self._stock:
            return AuditedStep(*self._stock.of_step(step, timer)[:3])
        audit = audit or self._audit_of_step(step)
        # Rows of other ranks are read in time for the audit, one step before it
        turns: list[tuple[int, int]] = []
        for of_step in (step, min(step + 1, self.passes.schedule.max_steps)):
            if planned := self._audit_of_step(of_step):
                numbers = chain.from_iterable(self._other_turns(of_step, planned))
                turns += [(of_step, number) for number in numbers]
        with self.exact.in_use(step, timer, also=turns):
            measured, found = self._taken(step, audit, timer)
        measured = self.exact.mean(step, measured)
        return found._replace(loss=measured.loss, norm=measured.norm)

    def audited_again(self, step: int, timer: StepTimer) -> AuditedStep:
        """Takes the last step again, and has each rank compute all turns of another one."""
        plan, worst = self.passes.plan(step), worst_block(self.exact.totals.square_sums)
        return self.of_step(step, timer, audit=self.audits.of_all_turns(step, plan, around=worst))

    def watched(self) -> list[int | None]:
        """Returns by rank the checksum of all its turns of the last step; None where none was
        made."""
        answer: int | None = None
        if self._watched is not None:
            [answer] = from_halves(halves_of([self._watched]).tolist())
        return self._group.gather(answer)

    def answers(
        self, step: int, audit: Audit, subjects: Sequence[int], timer: StepTimer
    ) -> list[list[int]]:
        """Has every rank compute the turns of some ranks that an audit has checked. Returns their
        checksums: for each of those ranks, every rank's answer."""
        totals: list[Tensor] = []
        with self._state.weights_in_use(timer):
            for rank in subjects:
                turns = self._checked_of(step, audit, rank)
                totals.append(self._checksum_of(step, turns, timer))
        by_rank = self._group.gather(from_halves(halves_of(totals).tolist()))
        return [list(answers) for answers in zip(*by_rank, strict=True)]

    def notes_of_update(self, step: int) -> UpdateNotes | None:
        """Returns notes of the state before the update of a step, if others are to make that
        again."""
        audit = self._audit_of_step(step)
        if audit is None or not self._state.sharding.is_sole_copy:
            return None
        matrix = self.audits.matrix(step, self._state.layout)
        return UpdateNotes(self._excerpted(step, audit), matrix, self._state)

    def close(self) -> None:
        """Ends the work beside the training thread."""
        (self._stock or self.exact).close()

    def _taken(
        self, step: int, audit: Audit | None, timer: StepTimer
    ) -> tuple[Measured, AuditedStep]:
        """Returns the figures of a step's sum, before they are those of the mean, alone and with
        what the audit brought."""
        plan = self.passes.plan(step)
        observers: list[StepObserver] = []
        own_turns = _OwnTurns(self._checked_turns(plan, audit), plan, self._state)
        if own_turns.numbers:
            observers.append(own_turns)
        excerpt: Excerpt | None = None
        if audit:
            excerpt = Excerpt(self._excerpted(step, audit), plan, self._state)
            observers.append(excerpt)
        own = self.exact.add_up(step, timer, observers=observers)
        answer = own_turns.checksum(own) if own_turns.numbers else None
        shown: Tensor | None = None
        began = timer.moment()
        if audit and answer is not None:
            other = self._checksum_of(step, self._other_turns(step, audit), timer)
            self._keep_in_audit(step, audit, timer)
            shown = halves_of([answer, other, *checksums_of_state(self._state)])
        ended = timer.moment()
        measured = self.exact.finish(step, own, timer, shown=shown)
        self._watched = answer if len(own_turns.numbers) == len(plan.turns) else None
        if excerpt is None:
            return measured, AuditedStep(*measured[:3])
        audit_s = timer.between_s(began, ended) or 0.0
        begin_s = time.perf_counter()
        with timer.phase("sync"):
            sums = excerpt.repeated(self._group)
        audit_s += time.perf_counter() - begin_s
        rows = [Shown(*from_halves(numbers)) for numbers in measured.shown]
        return measured, AuditedStep(*measured[:3], audit, rows, sums, audit_s)

    def _audit_of_step(self, step: int) -> Audit | None:
        """Returns what is computed twice in a step, None where nothing is."""
        return self.audits.of_step(step, self.passes.plan(step))

    def _checked_turns(self, plan: StepPlan, audit: Audit | None) -> Sequence[int]:
        """Returns the numbers of this rank's turns of which a checksum is made."""
        if audit:
            return audit.checked_turns(self._group.rank, plan)
        return range(len(plan.turns)) if self.watches else ()

    def _excerpted(self, step: int, audit: Audit) -> Span:
        num_blocks = self._state.layout.size // BLOCK
        return self.audits.excerpt(
            step, self.passes.plan(step), num_blocks=num_blocks, around=audit.around
        )

    def _checked_of(self, step: int, audit: Audit, rank: int) -> list[list[int]]:
        """Returns the micro-batches of each turn of a rank that an audit checks."""
        turns = self.passes.plan(step).turns_of(rank)
        return [turns[number] for number in audit.checked_turns(rank, self.passes.plan(step))]

    def _other_turns(self, step: int, audit: Audit) -> list[list[int]]:
        """Returns those that this rank computes though they are another rank's."""
        return self._checked_of(step, audit, audit.subjects[self._group.rank])

    def _keep_in_audit(self, step: int, audit: Audit, timer: StepTimer) -> None:
        """Computes as many turns of others as the rank that has most of them to compute, where
        ranks gather weights together: what this brings is not used."""
        if self._state.gathered is None:
            return
        ranks = range(self._group.world_size)
        most = max(len(self._checked_of(step, audit, rank)) for rank in ranks)
        turns = self._other_turns(step, audit)
        for _ in range(most - len(turns)):
            self._checksum_of(step, [turns[-1]], timer)

    def _checksum_of(self, step: int, turns: Sequence[Sequence[int]], timer: StepTimer) -> Tensor:
        """Returns the checksum of some turns of any rank, which are computed for that alone."""
        totals: list[Tensor] = []
        losses: list[Tensor] = []
        for numbers in turns:
            checksum = TurnChecksum(self._state.layout, self._state.device)
            losses += [one[0] for one in self.exact.again(step, numbers, checksum, timer)]
            totals.append(checksum.total)
        return checksum_of_turns(totals, losses)


class _OwnTurns(StepObserver):
    """The checksum of some of this rank's turns, while it takes them."""

    def __init__(self, numbers: Sequence[int], plan: StepPlan, state: TrainState) -> None:
        self.numbers = numbers
        self._plan = plan
        self._turns = {
            plan.turns[number][0]: TurnChecksum(state.layout, state.device) for number in numbers
        }

    def gradient(self, numbers: Sequence[int], name: str, values: Tensor) -> None:
        turn = self._turns.get(numbers[0])
        if turn:
            turn.gradient(numbers, name, values)

    def checksum(self, own: OwnPasses) -> Tensor:
        """Returns the checksum once all turns are taken."""
        size = len(own.figures) // len(self._plan.turns)
        losses: list[Tensor] = []
        for number in self.numbers:
            losses += [one[0] for one in own.figures[number * size : (number + 1) * size]]
        return checksum_of_turns([turn.total for turn in self._turns.values()], losses)

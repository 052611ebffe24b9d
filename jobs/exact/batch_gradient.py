"""Computes the gradient of a step's whole batch: the exact sum over lanes, or stock
DistributedDataParallel.

B sequences in a micro-batch, T tokens of each, P parameters. A step's batch is as many lanes as the
schedule says, each of one micro-batch or of a few in order; its loss is the mean over all counted
tokens of all lanes.
"""

import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, partial, reduce
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cluster.settings.run import RunConfig, batch_schedule, way_to_compute
from jobs.exact.compute import MicroBatch, autocast, choose_operations, micro_batch, num_counted
from jobs.exact.dropout import dropout_seed, seed_dropout
from jobs.exact.state.flat_layout import BLOCK
from jobs.exact.state.span import Span
from jobs.exact.state.train_state import TrainState
from jobs.exact.sums.audit import Audit, Audits
from jobs.exact.sums.batch_sum import BatchSum
from jobs.exact.sums.checksum import (
    TurnChecksum,
    Witness,
    checksum_of_turns,
    checksums_of_state,
    from_halves,
    halves_of,
)
from jobs.exact.sums.excerpt import Excerpt
from jobs.exact.sums.silent_faults import corrupt
from jobs.exact.sums.step_plan import StepPlan
from jobs.exact.sums.step_totals import Measured, block_square_sums, norm_of
from jobs.exact.sums.update_notes import UpdateNotes
from jobs.run.step_timer import StepTimer
from jobs.run.storage_retry import patiently
from jobs.tokens.token_stream import TokenStream
from jobs.workers.worker_group import WorkerGroup
from model.decoder import Decoder
from model.linear_cross_entropy import IGNORE_INDEX

_MAX_PLANS = 4  # kept: a step needs its own and the next one's


class BatchGradient:
    """Computes this worker's lanes of every step, and their sum with the others'."""

    def __init__(
        self,
        config: RunConfig,
        state: TrainState,
        rows: TokenStream,
        group: WorkerGroup,
        *,
        eot_id: int | None,
        nodes: Sequence[str] = (),
        doubtful: int | None = None,
    ) -> None:
        """`nodes` has the node of each rank where ranks are to audit one another. They audit the
        step `doubtful` in any case, and where each updates a part of the state alone, the step
        whose update led to it."""
        self._config = config
        self._state = state
        self._rows = rows
        self._group = group
        self._eot_id = eot_id
        self._schedule = batch_schedule(config)
        self._left_out: Container[int] = ()
        choose_operations(state.decoder, config, state.gathered)
        self._loss = _ScaledLoss(state.decoder)
        self._lends = way_to_compute(config) == "cpu"
        self._loss_scale = config.train.numerics.loss_scale
        num_micro_batches = config.train.micro_batches_per_lane
        self._new_plan = partial(StepPlan, state.sharding, num_micro_batches=num_micro_batches)
        self._plan_of_count = lru_cache(maxsize=_MAX_PLANS)(self._new_plan)
        self._is_exact = config.train.exact
        also = range(0)
        if doubtful is not None:
            also = range(doubtful - state.sharding.is_sole_copy, doubtful + 1)
        self.audits = Audits.of(
            config.train.audit_every_steps if self._is_exact and nodes else 0,
            self._new_plan(self._schedule.full_lanes),
            nodes,
            seed=config.train.seed,
            also=also,
        )
        self.watches = False
        """Whether each step has a checksum made of all turns of this rank."""
        self._watched: Tensor | None = None  # the one of the last step
        if self._is_exact:
            # A batch that grows may have thousands of plans
            plans = (self._new_plan(count) for count in self._schedule.lane_counts)
            self._sum = BatchSum(state, group, plans, lends=self._lends)
        else:
            self._stock = (
                DistributedDataParallel(self._loss) if group.world_size > 1 else self._loss
            )

    def of_step(self, step: int, timer: StepTimer, *, audit: Audit | None = None) -> Measured:
        """Puts the gradient of the whole batch into the state's buffer; with a sharded optimizer,
        only this rank's parts of the gradient. `audit` takes the place of the step's own."""
        with timer.phase("load"):
            self._read_ahead(step)
        with self._state.weights_in_use(timer):
            measured = (
                self._exact_gradient(step, audit or self.audit_of_step(step), timer)
                if self._is_exact
                else self._stock_gradient(step, timer)
            )
        # Only now is it known how many tokens the batch counts: so far, the sums are divided by all
        # that it has.
        scale = self.scale(step, measured.num_counted)
        if scale != 1.0:
            self._state.gradient.mul_(scale)
        return measured._replace(loss=measured.loss * scale, norm=measured.norm * scale)

    def audited_again(self, step: int, timer: StepTimer) -> Measured:
        """Takes the last step again, and has each rank compute all turns of another one."""
        plan, worst = self._plan(step), self._sum.worst_block()
        return self.of_step(step, timer, audit=self.audits.of_all_turns(step, plan, around=worst))

    def losses(self) -> list[list[float]]:
        """Returns the losses of the last step by rank (`StepTotals.losses`)."""
        return self._sum.losses()

    def watched(self) -> list[int | None]:
        """Returns by rank the checksum of all its turns of the last step; None where none was
        made."""
        answer: int | None = None
        if self._watched is not None:
            [answer] = from_halves(halves_of([self._watched]).tolist())
        return self._group.gather(answer)

    def scale(self, step: int, num_counted: int) -> float:
        """Returns what makes the mean over so many counted tokens of what the passes of a step
        add up."""
        return self._schedule.step_tokens(step) / max(1, num_counted) / self._loss_scale

    @contextmanager
    def leaving_out(self, samples: Container[int]) -> Iterator[None]:
        """Lasts while the loss counts no token of these samples, given by their global indices: a
        step's loss is then the mean over the tokens of the others."""
        self._left_out = samples
        try:
            yield
        finally:
            self._left_out = ()

    def of_lane(self, step: int, lane: int, witness: Witness, timer: StepTimer) -> Tensor:
        """Returns a lane's part of the step's loss and the number of tokens that it counts (2,),
        before `scale`; the witness sees its gradient, and the state's buffer stays as it is. Where
        no other rank has a part of the gradient."""
        k = self._config.train.micro_batches_per_lane
        numbers = range(lane * k, (lane + 1) * k)
        return reduce(torch.add, self._again(step, numbers, witness, timer))

    @torch.no_grad()
    def losses_of(
        self, step: int, number: int, pieces: Sequence[tuple[int, slice]]
    ) -> list[tuple[float, int]]:
        """Returns the summed loss, in nats, of pieces of a micro-batch's rows, each given as its row
        there and its targets, with the number of tokens that it counts."""
        decoder = self._state.decoder
        batch, _ = self._micro_batch(step, number)
        self._seed_dropout(step, number)
        losses: list[tuple[float, int]] = []
        with autocast(self._config, self._state.device):
            hidden = decoder(batch.inputs, positions=batch.positions, mask=batch.mask)  # (B, T, C)
            for row, span in pieces:
                # The shapes of training, for which the head may be compiled
                targets = torch.full_like(batch.targets, IGNORE_INDEX)
                targets[row, span] = batch.targets[row, span]
                losses.append((float(decoder.loss_of(hidden, targets)), num_counted(targets)))
        return losses

    def _read_ahead(self, step: int) -> None:
        """Has this worker's rows of the step and of the next one read."""
        last = min(step + 1, self._schedule.max_steps)
        samples: list[range] = []
        for number_of_step in range(step, last + 1):
            turns = [*self._plan(number_of_step).turns]
            if audit := self.audit_of_step(number_of_step):
                turns += self._other_turns(number_of_step, audit)
            for numbers in turns:
                samples += [self._samples_of(number_of_step, number) for number in numbers]
        self._rows.read_ahead(np.concatenate(samples))

    def audit_of_step(self, step: int) -> Audit | None:
        """Returns what is computed twice in a step, None where nothing is."""
        return self.audits.of_step(step, self._plan(step))

    def num_turns(self, step: int) -> int:
        """Returns how many turns this rank takes in a step."""
        return len(self._plan(step).turns)

    def _checked_of(self, step: int, audit: Audit, rank: int) -> list[list[int]]:
        """Returns the micro-batches of each turn of a rank that an audit checks."""
        turns = self._plan(step).turns_of(rank)
        return [turns[number] for number in audit.checked_turns(rank, self._plan(step))]

    def _other_turns(self, step: int, audit: Audit) -> list[list[int]]:
        """Returns those that this rank computes though they are another rank's."""
        return self._checked_of(step, audit, audit.subjects[self._group.rank])

    def close(self) -> None:
        """Ends the work beside the training thread."""
        if self._is_exact:
            self._sum.close()

    def _exact_gradient(self, step: int, audit: Audit | None, timer: StepTimer) -> Measured:
        plan = self._plan(step)
        checked = self._checked_turns(plan, audit)
        own_turns = {turn: TurnChecksum(self._state.layout, self._state.device) for turn in checked}
        excerpt = Excerpt(self._excerpted(step, plan, audit), plan, self._state) if audit else None
        passes: list[Tensor] = []

        def backward(number: int) -> Tensor:
            passes.append(self._backward(self._loss, step, number, timer, scale=1.0))
            return passes[-1]

        losses = self._sum.add_up(plan, backward, timer, checksums=own_turns, excerpt=excerpt)
        self._keep_in_step(step, timer)
        answer = self._checksum_of_own(plan, own_turns, passes) if checked else None
        checksums: list[Tensor] = []
        began = timer.moment()
        if audit and answer is not None:
            other = self._checksum_of(step, self._other_turns(step, audit), timer)
            self._keep_in_audit(step, audit, timer)
            checksums = [answer, other, *checksums_of_state(self._state)]
        ended = timer.moment()
        with timer.phase("sync"):
            measured = self._sum.finish(step, plan, losses=losses, checksums=checksums)
        self._watched = answer if len(checked) == len(plan.turns) else None
        if excerpt is None:
            return measured
        audit_s = timer.between_s(began, ended) or 0.0
        begin_s = time.perf_counter()
        with timer.phase("sync"):
            sums = excerpt.repeated(self._group)
        audit_s += time.perf_counter() - begin_s
        return measured._replace(sums=sums, audit_s=audit_s, audit=audit)

    def _checked_turns(self, plan: StepPlan, audit: Audit | None) -> Sequence[int]:
        """Returns the numbers of this rank's turns of which a checksum is made."""
        if audit:
            return audit.checked_turns(self._group.rank, plan)
        return range(len(plan.turns)) if self.watches else ()

    def _excerpted(self, step: int, plan: StepPlan, audit: Audit) -> Span:
        num_blocks = self._state.layout.size // BLOCK
        return self.audits.excerpt(step, plan, num_blocks=num_blocks, around=audit.around)

    def notes_of_update(self, step: int) -> UpdateNotes | None:
        """Returns notes of the state before the update of a step, if others are to make that
        again."""
        audit = self.audit_of_step(step)
        if audit is None or not self._state.sharding.is_sole_copy:
            return None
        matrix = self.audits.matrix(step, self._state.layout)
        return UpdateNotes(self._excerpted(step, self._plan(step), audit), matrix, self._state)

    def _keep_in_step(self, step: int, timer: StepTimer) -> None:
        """Computes as often as the rank that has most to compute, where ranks of whole states
        gather frozen weights together: what this brings is not used."""
        if self._state.gathered is None or not self._state.sharding.is_whole:
            return
        plan = self._plan(step)
        own_numbers = [*chain.from_iterable(plan.turns)]
        most = max(map(len, plan.counted))
        if len(own_numbers) == most:
            return
        unused = TurnChecksum(self._state.layout, self._state.device)
        with self._sum.again(plan, unused, timer):
            for _ in range(most - len(own_numbers)):
                self._backward(self._loss, step, own_numbers[-1], timer, scale=1.0)

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

    def _checksum_of_own(
        self, plan: StepPlan, turns: Mapping[int, TurnChecksum], passes: Sequence[Tensor]
    ) -> Tensor:
        """Returns the checksum of some of this rank's turns, from the passes of all of them."""
        size = len(passes) // len(plan.turns)
        losses: list[Tensor] = []
        for turn in turns:
            losses += [one[0] for one in passes[turn * size : (turn + 1) * size]]
        return checksum_of_turns([checksum.total for checksum in turns.values()], losses)

    def _checksum_of(self, step: int, turns: Sequence[Sequence[int]], timer: StepTimer) -> Tensor:
        """Returns the checksum of some turns of any rank, which are computed for that alone."""
        totals: list[Tensor] = []
        losses: list[Tensor] = []
        for numbers in turns:
            checksum = TurnChecksum(self._state.layout, self._state.device)
            losses += [one[0] for one in self._again(step, numbers, checksum, timer)]
            totals.append(checksum.total)
        return checksum_of_turns(totals, losses)

    def _again(
        self, step: int, numbers: Sequence[int], witness: Witness, timer: StepTimer
    ) -> list[Tensor]:
        """Computes the micro-batches of a turn for a witness alone. Returns what `_backward` does
        of each."""
        with self._sum.again(self._plan(step), witness, timer):
            return [
                self._backward(self._loss, step, number, timer, scale=1.0) for number in numbers
            ]

    def answers(
        self, step: int, audit: Audit, subjects: Sequence[int], timer: StepTimer
    ) -> list[list[int]]:
        """Has every rank compute the turns of some ranks that an audit has checked. Returns their
        checksums: for each of those ranks, that of every rank."""
        totals: list[Tensor] = []
        with self._state.weights_in_use(timer):
            for rank in subjects:
                turns = self._checked_of(step, audit, rank)
                totals.append(self._checksum_of(step, turns, timer))
        by_rank = self._group.gather(from_halves(halves_of(totals).tolist()))
        return [list(answers) for answers in zip(*by_rank, strict=True)]

    def _stock_gradient(self, step: int, timer: StepTimer) -> Measured:
        """Uses stock DistributedDataParallel: local accumulation, one all-reduce overlapped with
        the last backward."""
        device = self._state.device
        world_size = self._group.world_size
        self._state.gradient.zero_()
        figures = torch.zeros(2, device=device)
        numbers = [*chain.from_iterable(self._plan(step).turns)]
        for number in numbers:
            message: AbstractContextManager[None] = nullcontext()
            if isinstance(self._stock, DistributedDataParallel):
                is_last = number == numbers[-1]
                self._stock.require_backward_grad_sync = is_last
                if is_last:  # DDP's own messages lie within it
                    message = self._group.message(device)
            # DDP takes the mean over ranks; the scale makes it their sum.
            with message:
                figures += self._backward(self._stock, step, number, timer, scale=float(world_size))
        with timer.phase("sync"):
            if world_size > 1:
                with self._group.message(device):
                    dist.all_reduce(figures)
            loss, count = figures.tolist()
            norm = norm_of(block_square_sums(self._state.gradient))
            return Measured(loss / world_size, norm, int(count))

    def _backward(
        self,
        loss_of: nn.Module,
        step: int,
        number: int,
        timer: StepTimer,
        *,
        scale: float,
    ) -> Tensor:
        """Returns `scale` and the loss scale times a micro-batch's share of the batch's loss, and
        the number of tokens that it counts (2,), after its gradient went to the parameters.

        Nothing in it waits for a GPU, which computes while the next rows are read.
        """
        config = self._config
        device = self._state.device
        with timer.phase("load"):
            batch, count = self._micro_batch(step, number)
        self._seed_dropout(step, number)
        scale *= self._loss_scale
        with timer.phase("forward"), autocast(config, device):
            loss: Tensor = loss_of(batch, timer, scale=scale / self._schedule.step_tokens(step))
        progress = self._group.meeting.progress
        progress.end_pass(device)
        with timer.phase("backward"):
            loss.backward()
        progress.end_pass(device)
        figures = torch.stack([loss.detach(), loss.new_full((), count)])
        corrupt("loss", figures)
        return figures

    def _micro_batch(self, step: int, number: int) -> tuple[MicroBatch, int]:
        """Returns a micro-batch, and the number of tokens that its loss counts."""
        samples = self._samples_of(step, number)
        rows = patiently(lambda: self._rows.samples(samples), "tokens")
        batch = micro_batch(rows, self._config, self._state.device, eot_id=self._eot_id)
        _, targets = rows
        left_out = [sample in self._left_out for sample in samples]
        if any(left_out):
            # Behind the mask, which tells conversations by targets that do not count
            targets = targets.masked_fill(torch.tensor(left_out)[:, None], IGNORE_INDEX)
            batch = batch._replace(targets=targets.to(self._state.device))
        return batch, num_counted(targets)

    def _seed_dropout(self, step: int, number: int) -> None:
        seed = dropout_seed(self._config.train.seed, step=step, micro_batch=number)
        seed_dropout(seed, self._state.device)

    def _plan(self, step: int) -> StepPlan:
        return self._plan_of_count(self._schedule.num_lanes(step))

    def _samples_of(self, step: int, number: int) -> range:
        """Returns the global indices of a micro-batch's samples: those of a step follow each
        other."""
        size = self._config.train.micro_batch_size
        first = number * size
        return self._schedule.samples(step)[first : first + size]


class _ScaledLoss(nn.Module):
    """The scaled loss as a forward pass, which DistributedDataParallel can wrap."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        batch: MicroBatch,
        timer: StepTimer,
        *,
        scale: float,
    ) -> Tensor:
        hidden = self.model(
            batch.inputs,
            positions=batch.positions,
            mask=batch.mask,
        )  # (B, T, C)
        with timer.phase("loss"):
            return self.model.loss_of(hidden, batch.targets, scale=scale)

"""Computes the gradient of a step's whole batch: the exact sum over lanes, or stock
DistributedDataParallel.

B sequences in a micro-batch, T tokens of each, P parameters. A step's batch is as many lanes as the
schedule says, each of one micro-batch or of a few in order; its loss is the mean over all counted
tokens of all lanes.
"""

import time
from collections.abc import Container, Iterator, Sequence
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
    checksums_of_state,
    from_halves,
    halves_of,
)
from jobs.exact.sums.excerpt import Excerpt
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
    ) -> None:
        """`nodes` has the node of each rank where ranks are to audit one another."""
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
        self.audits = Audits.of(
            config.train.audit_every_steps if self._is_exact and nodes else 0,
            self._new_plan(self._schedule.full_lanes),
            nodes,
            seed=config.train.seed,
        )
        if self._is_exact:
            # A batch that grows may have thousands of plans
            plans = (self._new_plan(count) for count in self._schedule.lane_counts)
            self._sum = BatchSum(state, group, plans, lends=self._lends)
        else:
            self._stock = (
                DistributedDataParallel(self._loss) if group.world_size > 1 else self._loss
            )

    def of_step(self, step: int, timer: StepTimer) -> Measured:
        """Puts the gradient of the whole batch into the state's buffer; with a sharded optimizer,
        only this rank's parts of the gradient."""
        with timer.phase("load"):
            self._read_ahead(step)
        with self._state.weights_in_use(timer):
            measured = (
                self._exact_gradient(step, timer)
                if self._is_exact
                else self._stock_gradient(step, timer)
            )
        # Only now is it known how many tokens the batch counts: so far, the sums are divided by all
        # that it has.
        scale = self.scale(step, measured.num_counted)
        if scale != 1.0:
            self._state.gradient.mul_(scale)
        return measured._replace(loss=measured.loss * scale, norm=measured.norm * scale)

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
                turns.append(self._other_turn(number_of_step, audit))
            for numbers in turns:
                samples += [self._samples_of(number_of_step, number) for number in numbers]
        self._rows.read_ahead(np.concatenate(samples))

    def audit_of_step(self, step: int) -> Audit | None:
        """Returns what is computed twice in a step, None where nothing is."""
        return self.audits.of_step(step, self._plan(step))

    def num_turns(self, step: int) -> int:
        """Returns how many turns this rank takes in a step."""
        return len(self._plan(step).turns)

    def _other_turn(self, step: int, audit: Audit) -> list[int]:
        """Returns the micro-batches of the turn that this rank computes though it is another
        rank's."""
        subject = audit.subjects[self._group.rank]
        return self._plan(step).turns_of(subject)[audit.turns[subject]]

    def close(self) -> None:
        """Ends the work beside the training thread."""
        if self._is_exact:
            self._sum.close()

    def _exact_gradient(self, step: int, timer: StepTimer) -> Measured:
        plan = self._plan(step)
        audit = self.audit_of_step(step)
        own_checksum = TurnChecksum(self._state.layout, self._state.device) if audit else None
        excerpt = Excerpt(self._excerpted(step, plan), plan, self._state) if audit else None
        losses = self._sum.add_up(
            plan,
            lambda number: self._backward(self._loss, step, number, timer, scale=1.0),
            timer,
            checked_turn=audit.turns[self._group.rank] if audit else None,
            checksum=own_checksum,
            excerpt=excerpt,
        )
        self._keep_in_step(step, timer)
        checksums: list[Tensor] = []
        began = timer.moment()
        if audit and own_checksum:
            other = self._checksum_of(step, self._other_turn(step, audit), timer)
            checksums = [own_checksum.total, other, *checksums_of_state(self._state)]
        ended = timer.moment()
        with timer.phase("sync"):
            measured = self._sum.finish(step, plan, losses=losses, checksums=checksums)
        if excerpt is None:
            return measured
        audit_s = timer.between_s(began, ended) or 0.0
        begin_s = time.perf_counter()
        with timer.phase("sync"):
            sums = excerpt.repeated(self._group)
        audit_s += time.perf_counter() - begin_s
        return measured._replace(sums=sums, audit_s=audit_s)

    def _excerpted(self, step: int, plan: StepPlan) -> Span:
        num_blocks = self._state.layout.size // BLOCK
        return self.audits.excerpt(step, plan, num_blocks=num_blocks)

    def notes_of_update(self, step: int) -> UpdateNotes | None:
        """Returns notes of the state before the update of a step, if others are to make that
        again."""
        if self.audit_of_step(step) is None or not self._state.sharding.is_sole_copy:
            return None
        matrix = self.audits.matrix(step, self._state.layout)
        return UpdateNotes(self._excerpted(step, self._plan(step)), matrix, self._state)

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

    def _checksum_of(self, step: int, numbers: Sequence[int], timer: StepTimer) -> Tensor:
        """Returns the checksum of the gradient of any rank's turn, which is computed for that
        alone."""
        checksum = TurnChecksum(self._state.layout, self._state.device)
        self._again(step, numbers, checksum, timer)
        return checksum.total

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
        self, step: int, turns: Sequence[tuple[int, int]], timer: StepTimer
    ) -> list[list[int]]:
        """Has every rank compute some turns of a step, each given as its rank and its number there.
        Returns their checksums: for each turn, that of every rank."""
        totals: list[Tensor] = []
        with self._state.weights_in_use(timer):
            for rank, turn in turns:
                numbers = self._plan(step).turns_of(rank)[turn]
                totals.append(self._checksum_of(step, numbers, timer))
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
        return torch.stack([loss.detach(), loss.new_full((), count)])

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

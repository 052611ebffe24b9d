"""Computes the gradient of a step's whole batch: the exact sum over lanes, or stock DistributedDataParallel.

B sequences in a micro-batch, T tokens of each, P parameters. A step's batch is as many lanes as the schedule says, each
of one micro-batch or of a few in order; its loss is the mean over all counted tokens of all lanes.
"""

import hashlib
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cluster.settings.run import RunConfig, batch_schedule, way_to_compute
from jobs.exact.bucket_exchange import BucketExchange
from jobs.exact.compute import MicroBatch, autocast, choose_operations, micro_batch, num_counted
from jobs.exact.flat_layout import at, end_to_end
from jobs.exact.lane_sums import LaneSums
from jobs.exact.peers import Peers
from jobs.exact.shard_sums import ShardSums
from jobs.exact.side_thread import side_work
from jobs.exact.step_plan import StepPlan
from jobs.exact.step_totals import Measured, StepTotals, block_square_sums, norm_of
from jobs.exact.train_state import TrainState
from jobs.run.step_timer import StepTimer
from jobs.run.storage_retry import patiently
from jobs.tokens.token_stream import TokenStream
from jobs.workers.worker_group import WorkerGroup
from model.cpu_ops.loans import Places, lent, weight_copies
from model.gpt import GPT
from model.operations import product_type
from model.training_memory import large_zeros

_MAX_PLANS = 4  # kept: a step needs its own and the next one's
_MAX_WAITING = 3  # buckets on their way to the owners of their parts, beside the one that is being sent


class BatchGradient:
    """Computes this worker's lanes of every step, and their sum with the others'."""

    def __init__(
        self, config: RunConfig, state: TrainState, rows: TokenStream, group: WorkerGroup, *, eot_id: int | None
    ) -> None:
        self._config, self._state, self._rows, self._group = config, state, rows, group
        self._schedule, self._eot_id = batch_schedule(config), eot_id
        choose_operations(state.model, config, state.gathered)
        self._loss = _ScaledLoss(state.model)
        self._rounded, lends = None, way_to_compute(config) == "cpu"
        if lends and config.train.numerics.is_rounded and not state.gathered:
            dtype = product_type(config.train.numerics)
            self._rounded = large_zeros(state.layout.boundary, dtype=dtype, device=state.device)
        self._is_exact = config.train.exact
        k = config.train.micro_batches_per_lane
        self._new_plan = partial(StepPlan, state.mesh, num_micro_batches=k)
        self._plan_of_count = lru_cache(maxsize=_MAX_PLANS)(self._new_plan)
        if self._is_exact:
            self._sum_up(lends)
        else:
            self._stock = DistributedDataParallel(self._loss) if group.world_size > 1 else self._loss

    def _sum_up(self, lends: bool) -> None:
        """Makes what the exact sum needs: its buffers, the sums of a turn, and the exchange between the groups."""
        state, group = self._state, self._group
        mesh = state.mesh
        num_buffers = most_subtrees = 0
        for num_lanes in self._schedule.lane_counts:  # a batch that grows may have thousands
            plan = self._new_plan(num_lanes)
            num_buffers = max(num_buffers, plan.num_buffers)
            most_subtrees = max(most_subtrees, plan.num_subtrees)
        more = (large_zeros(len(state.gradient), device=state.device) for _ in range(1, num_buffers))
        buffers = [state.gradient, *more]
        self._totals = StepTotals(state.layout, mesh, group, device=state.device)
        self._exchange = BucketExchange(
            end_to_end(state.owned) if state.sums_shards else state.layout.buckets,
            buffers,
            Peers(mesh.counterparts, group),
            most_subtrees=most_subtrees,
            sharded=state.shard == "optimizer",
        )
        self._side_work = side_work(state.device, max_waiting=_MAX_WAITING if state.sums_shards else 0)
        self._sums: LaneSums | ShardSums
        if state.sums_shards:
            on_final = self._exchange.exchange
            self._sums = ShardSums(state, buffers, self._side_work, lends=lends, on_final=on_final)
        else:
            exchange = self._exchange.exchange
            on_final = partial(self._side_work.submit, exchange) if group.world_size > 1 else exchange
            self._sums = LaneSums(state, buffers, lends=lends, on_final=on_final)

    def of_step(self, step: int, timer: StepTimer) -> Measured:
        """Puts the gradient of the whole batch into the state's buffer; with a sharded optimizer, only this rank's own
        parts of it."""
        steps = range(step, min(step + 1, self._schedule.max_steps) + 1)  # the next step's rows are read ahead
        with timer.phase("load"):
            samples = [self._samples_of(each, n) for each in steps for turn in self._plan(each).turns for n in turn]
            self._rows.read_ahead(np.concatenate(samples))
        with self._state.weights_in_use(), lent(weight_copies, self._rounded_weights()):
            measured = self._exact_gradient(step, timer) if self._is_exact else self._stock_gradient(step, timer)
        # Only now is it known how many tokens the batch counts: so far, the sums are divided by all that it has.
        scale = self._schedule.step_tokens(step) / max(1, measured.num_counted)
        if scale != 1.0:
            self._state.gradient.mul_(scale)
        return Measured(measured.loss * scale, measured.norm * scale, measured.num_counted)

    def close(self) -> None:
        """Ends the work beside the training thread."""
        if self._is_exact:
            self._side_work.close()

    def _rounded_weights(self) -> Places:
        """Returns the matrices as the lanes of a step compute with them, valid for that step only."""
        state, rounded = self._state, self._rounded
        if rounded is None:
            return {}
        rounded.copy_(at(state.values, range(len(rounded))))
        return {
            weights: state.layout.view(rounded, name, weights)
            for name, weights in state.model.named_parameters()
            if state.layout.places[name].start < len(rounded)
        }

    def _exact_gradient(self, step: int, timer: StepTimer) -> Measured:
        plan, losses = self._plan(step), list[Tensor]()
        self._exchange.begin(plan.subtrees, plan.num_lanes)
        for turn, numbers in enumerate(plan.turns):
            with self._sums.turn(plan, turn):
                losses += [self._backward(self._loss, step, number, timer, scale=1.0) for number in numbers]
        counted = losses[: len(plan.counted[self._group.rank])]
        with timer.phase("sync"):
            self._side_work.wait()
            return self._totals.finish(step, plan, block_sums=self._exchange.block_sums, losses=counted)

    def _stock_gradient(self, step: int, timer: StepTimer) -> Measured:
        """Uses stock DistributedDataParallel: local accumulation, one all-reduce overlapped with the last backward."""
        self._state.gradient.zero_()
        figures, world_size = torch.zeros(2, device=self._state.device), self._group.world_size
        numbers = [number for turn in self._plan(step).turns for number in turn]
        for number in numbers:
            message: AbstractContextManager[None] = nullcontext()
            if isinstance(self._stock, DistributedDataParallel):
                self._stock.require_backward_grad_sync = number == numbers[-1]
                if number == numbers[-1]:  # DDP's own messages lie within it
                    message = self._group.message(self._state.device)
            # DDP takes the mean over ranks; the scale makes it their sum.
            with message:
                figures += self._backward(self._stock, step, number, timer, scale=float(world_size))
        with timer.phase("sync"):
            if world_size > 1:
                with self._group.message(self._state.device):
                    dist.all_reduce(figures)
            loss, count = figures.tolist()
            return Measured(loss / world_size, norm_of(block_square_sums(self._state.gradient)), int(count))

    def _backward(self, loss_of: nn.Module, step: int, number: int, timer: StepTimer, *, scale: float) -> Tensor:
        """Returns `scale` times a micro-batch's share of the batch's loss and the number of tokens that it counts (2,),
        after its gradient went to the parameters.

        Nothing in it waits for a GPU, which computes while the next rows are read.
        """
        config, device = self._config, self._state.device
        with timer.phase("load"):
            rows = patiently(lambda: self._rows.samples(self._samples_of(step, number)), "tokens")
            batch = micro_batch(rows, config, device, eot_id=self._eot_id)
        _seed(dropout_seed(config.train.seed, step=step, micro_batch=number), device)
        with timer.phase("forward"), autocast(config, device):
            loss: Tensor = loss_of(batch, timer, scale=scale / self._schedule.step_tokens(step))
        progress = self._group.meeting.progress
        progress.end_pass(device)
        with timer.phase("backward"):
            loss.backward()
        progress.end_pass(device)
        return torch.stack([loss.detach(), loss.new_full((), num_counted(rows[1]))])

    def _plan(self, step: int) -> StepPlan:
        return self._plan_of_count(self._schedule.num_lanes(step))

    def _samples_of(self, step: int, number: int) -> range:
        """Returns the global indices of a micro-batch's samples: those of a step follow each other."""
        size = self._config.train.micro_batch_size
        return self._schedule.samples(step)[number * size : (number + 1) * size]


def dropout_seed(seed: int, *, step: int, micro_batch: int) -> int:
    """Returns 63 bits of BLAKE2b: the same for any rank that computes the rows, and in any version of Python."""
    digest = hashlib.blake2b(f"dropout:{seed}:{step}:{micro_batch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _seed(seed: int, device: torch.device) -> None:
    """Does what torch.manual_seed does, which takes 0.5 ms to record the stack for each kind of unused device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


class _ScaledLoss(nn.Module):
    """The scaled loss as a forward pass, which DistributedDataParallel can wrap."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch, timer: StepTimer, *, scale: float) -> Tensor:
        hidden = self.model(batch.inputs, positions=batch.positions, mask=batch.mask)  # (B, T, C)
        with timer.phase("loss"):
            return self.model.loss_of(hidden, batch.targets, scale=scale)

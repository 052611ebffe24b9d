"""Computes the gradient of a step's whole batch: the exact sum over lanes, or stock DistributedDataParallel.

B sequences in a micro-batch, T tokens of each, P parameters. A step's batch is as many lanes as the schedule says, each
of one micro-batch or of a few in order; its loss is the mean over all counted tokens of all lanes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cluster.settings.run import RunConfig, batch_schedule, way_to_compute
from jobs.exact.bucket_exchange import BucketExchange, gradient_norm
from jobs.exact.compute import MicroBatch, autocast, choose_operations, micro_batch
from jobs.exact.exact_reduce import lane_steps, maximal_subtrees, tree_sum
from jobs.exact.flat_layout import at
from jobs.exact.lane_sums import LaneSums
from jobs.exact.train_state import TrainState
from jobs.run.step_timer import StepTimer
from jobs.run.storage_retry import patiently
from jobs.tokens.batch_plan import Indices, lanes_of_rank, micro_batch_samples
from jobs.tokens.token_stream import TokenStream
from jobs.workers.worker_group import WorkerGroup
from model.cpu_ops.loans import Places, lent, weight_copies
from model.gpt import GPT
from model.training_memory import large_zeros


@dataclass(frozen=True)
class Measured:
    """The figures of a step's whole batch, equal on every rank."""

    loss: float  # nats per token
    norm: float  # of the gradient


class BatchGradient:
    """Computes this worker's lanes of every step, and their sum with the others'."""

    def __init__(
        self, config: RunConfig, state: TrainState, rows: TokenStream, group: WorkerGroup, *, eot_id: int | None
    ) -> None:
        self._config, self._state, self._rows, self._group = config, state, rows, group
        self._schedule, self._eot_id = batch_schedule(config), eot_id
        choose_operations(state.model, config)
        self._loss = _ScaledLoss(state.model)
        self._rounded, lends = None, way_to_compute(config) == "cpu"
        if lends and config.train.precision == "bf16":
            self._rounded = large_zeros(state.layout.boundary, dtype=torch.bfloat16, device=state.device)
        self._is_exact = config.train.exact
        if self._is_exact:
            lane_counts = self._schedule.lane_counts
            self._lane_steps = {count: lane_steps(self._own(count), num_lanes=count) for count in lane_counts}
            num_buffers = 1 + max(step.buffer for steps in self._lane_steps.values() for step in steps)
            more = [large_zeros(state.layout.size, device=state.device) for _ in range(1, num_buffers)]
            buffers = [state.gradient, *more]
            self.exchange = BucketExchange(
                state.layout, buffers, group, lane_counts=lane_counts, sharded=state.is_sharded
            )
            self._sums = LaneSums(
                state.model,
                state.layout,
                buffers,
                num_micro_batches=config.train.micro_batches_per_lane,
                lends=lends,
                on_final=self.exchange.start,
            )

        else:
            self._stock = DistributedDataParallel(self._loss) if group.world_size > 1 else self._loss

    def of_step(self, step: int, timer: StepTimer) -> Measured:
        """Puts the gradient of the whole batch into the state's buffer; with a sharded optimizer, only this rank's own
        parts of it."""
        steps = range(step, min(step + 1, self._schedule.max_steps) + 1)  # the next step's rows are read ahead
        with timer.phase("load"):
            samples = [self._samples_of(each, number) for each in steps for number in self._numbers(self._lanes(each))]
            self._rows.read_ahead(np.concatenate(samples))
        with lent(weight_copies, self._rounded_weights()):
            return self._exact_gradient(step, timer) if self._is_exact else self._stock_gradient(step, timer)

    def close(self) -> None:
        """Ends the work beside the training thread."""
        if self._is_exact:
            self.exchange.close()

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
        losses: dict[range, Tensor] = {}
        lanes, num_lanes = self._lanes(step), self._schedule.num_lanes(step)
        self.exchange.begin(step, num_lanes)
        for lane, lane_step in zip(lanes, self._lane_steps[num_lanes], strict=True):
            with self._sums.lane(lane_step, is_last=lane == lanes[-1]):
                of_lane = [self._backward(self._loss, step, n, timer, scale=1.0) for n in self._numbers([lane])]
                losses[range(lane, lane + 1)] = reduce(torch.add, of_lane)
        subtrees = maximal_subtrees(lanes, root=range(num_lanes))
        with timer.phase("sync"):
            return Measured(*self.exchange.finish([tree_sum(subtree, losses.get) for subtree in subtrees]))

    def _stock_gradient(self, step: int, timer: StepTimer) -> Measured:
        """Uses stock DistributedDataParallel: local accumulation, one all-reduce overlapped with the last backward."""
        self._state.gradient.zero_()
        loss, world_size = torch.zeros((), device=self._state.device), self._group.world_size
        numbers = self._numbers(self._lanes(step))
        for number in numbers:
            if isinstance(self._stock, DistributedDataParallel):
                self._stock.require_backward_grad_sync = number == numbers[-1]
            # DDP takes the mean over ranks; the scale makes it their sum.
            loss += self._backward(self._stock, step, number, timer, scale=float(world_size))
        with timer.phase("sync"):
            if world_size > 1:
                dist.all_reduce(loss)
            return Measured(float(loss) / world_size, gradient_norm(self._state.gradient))

    def _backward(self, loss_of: nn.Module, step: int, number: int, timer: StepTimer, *, scale: float) -> Tensor:
        """Returns `scale` times a micro-batch's share of the batch's loss, after its gradient went to the parameters.

        Nothing in it waits for a GPU, which computes while the next rows are read.
        """
        config, device = self._config, self._state.device
        with timer.phase("load"):
            rows = patiently(lambda: self._rows.samples(self._samples_of(step, number)), "tokens")
            batch = micro_batch(rows, config, device, eot_id=self._eot_id)
        _seed(dropout_seed(config.train.seed, step=step, micro_batch=number), device)
        with timer.phase("forward"), autocast(config, device):
            loss: Tensor = loss_of(batch, timer, scale=scale / self._schedule.step_tokens(step))
        with timer.phase("backward"):
            loss.backward()
        return loss.detach()

    def _lanes(self, step: int) -> range:
        return self._own(self._schedule.num_lanes(step))

    def _own(self, num_lanes: int) -> range:
        return lanes_of_rank(self._group.rank, world_size=self._group.world_size, num_lanes=num_lanes)

    def _numbers(self, lanes: Sequence[int]) -> list[int]:
        """Returns the numbers, within a step, of the micro-batches of these lanes."""
        of_lane = self._config.train.micro_batches_per_lane
        return [lane * of_lane + number for lane in lanes for number in range(of_lane)]

    def _samples_of(self, step: int, number: int) -> Indices:
        size = self._config.train.micro_batch_size
        return micro_batch_samples(self._schedule.samples(step), number, micro_batch_size=size)


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

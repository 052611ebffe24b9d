"""Computes the gradient of a step's whole batch: the exact sum over lanes, or stock DistributedDataParallel.

B sequences in a micro-batch, T tokens of each, P parameters. A step's batch is as many micro-batches ("lanes") as the
schedule says; its loss is the mean over all counted tokens of all lanes.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cluster.settings.run import RunConfig, batch_schedule
from jobs.exact.bucket_exchange import BucketExchange, gradient_norm
from jobs.exact.exact_reduce import lane_steps, maximal_subtrees, tree_sum
from jobs.exact.flat_layout import at
from jobs.exact.lane_sums import LaneSums
from jobs.exact.train_state import TrainState
from jobs.run.step_timer import StepTimer
from jobs.run.storage_retry import patiently
from jobs.tokens.batch_plan import Indices, lane_sample_indices, lanes_of_rank
from jobs.tokens.token_stream import TokenStream
from jobs.workers.worker_group import WorkerGroup
from model.gpt import GPT
from model.training_memory import Places, large_zeros, lent, weight_copies


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
        self._schedule = batch_schedule(config)
        self._loss = _LaneLoss(state.model, eot_id)
        self._rounded = None
        if config.train.precision == "bf16":
            self._rounded = large_zeros(state.layout.boundary, dtype=torch.bfloat16, device=state.device)
        self._ddp = None if config.train.exact else DistributedDataParallel(self._loss)
        if config.train.exact:
            lane_counts = self._schedule.lane_counts
            self._lane_steps = {count: lane_steps(self._own(count), num_lanes=count) for count in lane_counts}
            num_buffers = 1 + max(step.buffer for steps in self._lane_steps.values() for step in steps)
            more = [large_zeros(state.layout.size, device=state.device) for _ in range(1, num_buffers)]
            buffers = [state.gradient, *more]
            self.exchange = BucketExchange(
                state.layout, buffers, group, lane_counts=lane_counts, sharded=state.is_sharded
            )
            self._sums = LaneSums(state.model, state.layout, buffers, on_final=self.exchange.start)

    def of_step(self, step: int, timer: StepTimer) -> Measured:
        """Puts the gradient of the whole batch into the state's buffer; with a sharded optimizer, only this rank's own
        parts of it."""
        steps = range(step, min(step + 1, self._schedule.max_steps) + 1)  # the next step's rows are read ahead
        with timer.phase("load"):
            samples = [self._samples_of(each, lane) for each in steps for lane in self._lanes(each)]
            self._rows.read_ahead(np.concatenate(samples))
        with lent(weight_copies, self._rounded_weights()):
            return self._ddp_gradient(self._ddp, step, timer) if self._ddp else self._exact_gradient(step, timer)

    def close(self) -> None:
        """Ends the work beside the training thread."""
        if self._ddp is None:
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
        self.exchange.begin(num_lanes)
        for lane, lane_step in zip(lanes, self._lane_steps[num_lanes], strict=True):
            with self._sums.lane(lane_step, is_last=lane == lanes[-1]):
                losses[range(lane, lane + 1)] = self._lane_backward(self._loss, step, lane, timer, scale=1.0)
        subtrees = maximal_subtrees(lanes, root=range(num_lanes))
        with timer.phase("sync"):
            return Measured(*self.exchange.finish([tree_sum(subtree, losses.get) for subtree in subtrees]))

    def _ddp_gradient(self, ddp: DistributedDataParallel, step: int, timer: StepTimer) -> Measured:
        """Uses stock DistributedDataParallel: local accumulation, one all-reduce overlapped with the last backward."""
        self._state.gradient.zero_()
        loss = torch.zeros((), device=self._state.device)
        lanes = self._lanes(step)
        for lane in lanes:
            ddp.require_backward_grad_sync = lane == lanes[-1]
            # DDP takes the mean over ranks; the scale makes it their sum.
            loss += self._lane_backward(ddp, step, lane, timer, scale=float(self._group.world_size))
        with timer.phase("sync"):
            dist.all_reduce(loss)
            return Measured(float(loss) / self._group.world_size, gradient_norm(self._state.gradient))

    def _lane_backward(self, loss_of: nn.Module, step: int, lane: int, timer: StepTimer, *, scale: float) -> Tensor:
        """Returns `scale` times the lane's share of the batch's loss, after its gradient went to the parameters."""
        config, state = self._config, self._state
        with timer.phase("load"):
            batch = patiently(lambda: self._rows.samples(self._samples_of(step, lane)), "tokens")
            inputs, targets = (part.to(state.device) for part in batch)  # (B, T) each
        _seed(dropout_seed(config.train.seed, step=step, lane=lane), state.device)
        with timer.phase("forward"), autocast(config, state.device):
            loss: Tensor = loss_of(inputs, targets, timer, scale=scale / self._schedule.step_tokens(step))
        with timer.phase("backward"):
            loss.backward()
        return loss.detach()

    def _lanes(self, step: int) -> range:
        return self._own(self._schedule.num_lanes(step))

    def _own(self, num_lanes: int) -> range:
        return lanes_of_rank(self._group.rank, world_size=self._group.world_size, num_lanes=num_lanes)

    def _samples_of(self, step: int, lane: int) -> Indices:
        size = self._schedule.micro_batch_size
        return lane_sample_indices(self._schedule.samples(step), lane, micro_batch_size=size)


def dropout_seed(seed: int, *, step: int, lane: int) -> int:
    """Returns 63 bits of BLAKE2b: the same for any rank that computes the lane, and in any version of Python."""
    digest = hashlib.blake2b(f"dropout:{seed}:{step}:{lane}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _seed(seed: int, device: torch.device) -> None:
    """Does what torch.manual_seed does, which takes 0.5 ms to record the stack for each kind of unused device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    assert config.train.precision != "auto", "the precision is decided before a run starts"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.train.precision == "bf16")


class _LaneLoss(nn.Module):
    """The scaled loss as a forward pass, which DistributedDataParallel can wrap."""

    def __init__(self, model: GPT, eot_id: int | None) -> None:
        super().__init__()
        self.model, self.eot_id = model, eot_id

    def forward(self, inputs: Tensor, targets: Tensor, timer: StepTimer, *, scale: float) -> Tensor:
        hidden = self.model.hidden(inputs, eot_id=self.eot_id)  # (B, T, C)
        with timer.phase("loss"):
            return self.model.loss_of(hidden, targets, scale=scale)

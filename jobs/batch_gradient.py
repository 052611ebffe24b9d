"""The gradient of a step's whole batch: the exact sum over lanes, or stock DistributedDataParallel.

B sequences in a micro-batch, T tokens of each, P parameters. A step's batch is `num_lanes` micro-batches; its loss is
the mean over all counted tokens of all lanes.
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cluster.config import RunConfig, max_steps, num_lanes, tokens_per_step
from jobs.batch_plan import Indices, lane_sample_indices, lanes_of_rank
from jobs.exact_reduce import exchange, reduce_lanes
from jobs.step_timer import StepTimer
from jobs.token_stream import TokenStream
from jobs.train_state import TrainState
from jobs.worker_group import WorkerGroup
from model.gpt import GPT


class BatchGradient:
    """This worker's lanes of every step, and their sum with the others'."""

    def __init__(
        self, config: RunConfig, state: TrainState, rows: TokenStream, group: WorkerGroup, *, eot_id: int | None
    ) -> None:
        self._config, self._state, self._rows, self._group = config, state, rows, group
        self._lanes = lanes_of_rank(group.rank, world_size=group.world_size, num_lanes=num_lanes(config))
        self._loss = _LaneLoss(state.model, eot_id)
        self._ddp = None if config.train.exact else DistributedDataParallel(self._loss)

    def of_step(self, step: int, timer: StepTimer) -> Tensor:
        """The gradient and, behind it, the loss of the whole batch (P + 1,), equal on every rank."""
        steps = range(step, min(step + 1, max_steps(self._config)) + 1)  # the next one's rows come meanwhile
        self._rows.read_ahead(np.concatenate([self._samples_of(s, lane) for s in steps for lane in self._lanes]))
        if self._ddp is not None:
            return self._ddp_gradient(self._ddp, step, timer)

        def lane_value(lane: int) -> Tensor:
            self._state.gradient.zero_()
            self._lane_backward(self._loss, step, lane, timer, scale=1.0)
            return self._state.gradient.clone()

        lanes = num_lanes(self._config)
        sums = reduce_lanes(self._lanes, num_lanes=lanes, lane_value=lane_value)
        with timer.phase("sync"):
            return exchange(sums, rank=self._group.rank, world_size=self._group.world_size, num_lanes=lanes)

    def _ddp_gradient(self, ddp: DistributedDataParallel, step: int, timer: StepTimer) -> Tensor:
        """Stock DistributedDataParallel: local accumulation, one all-reduce overlapped with the last backward."""
        gradient = self._state.gradient
        gradient.zero_()
        for lane in self._lanes:
            ddp.require_backward_grad_sync = lane == self._lanes[-1]
            # DDP takes the mean over ranks; this sum wants their total.
            self._lane_backward(ddp, step, lane, timer, scale=float(self._group.world_size))
        with timer.phase("sync"):
            loss = gradient[-1] / self._group.world_size
            dist.all_reduce(loss)
            gradient[-1] = loss
        return gradient

    def _lane_backward(self, loss_of: nn.Module, step: int, lane: int, timer: StepTimer, *, scale: float) -> None:
        """Adds `scale` times the lane's share of the batch's gradient and loss to the gradient buffer."""
        config, state = self._config, self._state
        with timer.phase("load"):
            batch = self._rows.samples(self._samples_of(step, lane))
            inputs, targets = (part.to(state.device) for part in batch)  # (B, T) each
        # Dropout, if any, is a function of (seed, step, lane), whichever rank computes the lane.
        torch.manual_seed(hash((config.train.seed, step, lane)) % 2**63)
        with timer.phase("forward"), autocast(config, state.device):
            loss = loss_of(inputs, targets) * (scale / tokens_per_step(config))
        with timer.phase("backward"):
            loss.backward()
        state.gradient[-1] += loss.detach()

    def _samples_of(self, step: int, lane: int) -> Indices:
        train = self._config.train
        sizes = {"global_batch_size": train.global_batch_size, "micro_batch_size": train.micro_batch_size}
        return lane_sample_indices(step - 1, lane, **sizes)


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.train.precision == "bf16")


class _LaneLoss(nn.Module):
    """The summed loss as a forward pass: what DistributedDataParallel wraps."""

    def __init__(self, model: GPT, eot_id: int | None) -> None:
        super().__init__()
        self.model, self.eot_id = model, eot_id

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(inputs, targets, eot_id=self.eot_id)

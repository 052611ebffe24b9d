"""Computes the gradient of a step's whole batch as stock DistributedDataParallel does: what the exact
sum is compared with."""

from contextlib import AbstractContextManager, nullcontext
from itertools import chain

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from jobs.exact.lane_passes import LanePasses
from raymill.state.train_state import TrainState
from raymill.step_timer import StepTimer
from raymill.sums.step_totals import Measured, block_square_sums, norm_of
from raymill.workers.worker_group import WorkerGroup


class StockGradient:
    """Local accumulation, and one all-reduce overlapped with the last backward."""

    def __init__(self, passes: LanePasses, state: TrainState, group: WorkerGroup) -> None:
        self.passes = passes
        self._state = state
        self._group = group
        self._loss: nn.Module = passes.loss
        if group.world_size > 1:
            self._loss = DistributedDataParallel(passes.loss)

    def of_step(self, step: int, timer: StepTimer) -> Measured:
        """Puts the gradient of the whole batch into the state's buffer."""
        world_size = self._group.world_size
        numbers = [*chain.from_iterable(self.passes.plan(step).turns)]
        with timer.phase("load"):
            self.passes.read_ahead(step)
        self._state.gradient.zero_()
        figures = torch.zeros(2, device=self._state.device)
        with self._state.weights_in_use(timer):
            for number in numbers:
                # DDP takes the mean over ranks; the scale makes it their sum.
                with self._messages(is_last=number == numbers[-1]):
                    figures += self.passes.take(
                        step, number, timer, loss_of=self._loss, scale=float(world_size)
                    )
        with timer.phase("sync"):
            if world_size > 1:
                with self._group.message(self._state.device):
                    dist.all_reduce(figures)
            loss, count = figures.tolist()
            norm = norm_of(block_square_sums(self._state.gradient))
        scale = self.passes.scale(step, int(count))
        if scale != 1.0:
            self._state.gradient.mul_(scale)
        return Measured(loss / world_size * scale, norm * scale, int(count))

    def close(self) -> None:
        """Ends nothing: there are no threads beside training."""

    def _messages(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Has DDP exchange gradients in the last pass; its own messages lie within the context."""
        if not isinstance(self._loss, DistributedDataParallel):
            return nullcontext()
        self._loss.require_backward_grad_sync = is_last
        return self._group.message(self._state.device) if is_last else nullcontext()

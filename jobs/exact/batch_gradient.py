"""Computes the gradient of a step's whole batch as the exact sum over lanes.

A step's batch is as many lanes as the schedule says, each of one micro-batch or of a few in order;
its loss is the mean over all counted tokens of all lanes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import chain

import torch
from torch import Tensor

from jobs.exact.audits.silent_faults import silent_faults
from jobs.exact.compute import gradient_norm
from jobs.exact.lane_passes import LanePasses
from raymill.observer import StepObserver
from raymill.state.train_state import TrainState
from raymill.step_timer import StepTimer
from raymill.sums.batch_sum import BatchSum
from raymill.sums.step_totals import Measured, StepTotals
from raymill.workers.worker_group import WorkerGroup


@dataclass(frozen=True)
class OwnPasses:
    """The results of the passes of this worker's micro-batches of a step."""

    figures: Sequence[Tensor]  # (2,) of each pass, in order (`LanePasses.take`)
    losses: Sequence[Tensor]  # those that count


class BatchGradient:
    """Computes this worker's lanes of every step, and their sum with the others'."""

    def __init__(self, passes: LanePasses, state: TrainState, group: WorkerGroup) -> None:
        self.passes = passes
        self._state = state
        self._group = group
        # A batch that grows may have thousands of plans
        plans = map(passes.plan_of_count, passes.schedule.lane_counts)
        norm = gradient_norm(passes.config)
        self._sum = BatchSum(state, group, plans, lends=passes.is_lent_memory, norm=norm)

    def of_step(self, step: int, timer: StepTimer) -> Measured:
        """Puts the gradient of the whole batch into the state's buffer; with a sharded optimizer,
        only this rank's parts of the gradient."""
        with self.in_use(step, timer):
            measured = self.finish(step, self.add_up(step, timer), timer)
        return self.mean(step, measured)

    @contextmanager
    def in_use(
        self, step: int, timer: StepTimer, *, also: Sequence[tuple[int, int]] = ()
    ) -> Iterator[None]:
        """Lasts while the model computes for a step; the rows of other micro-batches may be read
        too, each given by its step and its number."""
        with timer.phase("load"):
            self.passes.read_ahead(step, also=also)
        with self._state.weights_in_use(timer):
            yield

    def add_up(
        self, step: int, timer: StepTimer, *, observers: Sequence[StepObserver] = ()
    ) -> OwnPasses:
        """Computes this worker's lanes, whose gradients are added to the others' meanwhile."""
        figures: list[Tensor] = []

        def backward(number: int) -> Tensor:
            figures.append(self.passes.take(step, number, timer))
            return figures[-1]

        plan = self.passes.plan(step)
        observers = [*silent_faults(self._state), *observers]
        losses = self._sum.add_up(plan, backward, timer, observers=observers)
        if self._state.gathered is not None and self._state.sharding.is_whole:
            # Ranks of whole states gather frozen weights together, so all compute equally often
            most = max(map(len, plan.counted))
            [*numbers] = chain.from_iterable(plan.turns)
            for _ in range(most - len(numbers)):
                self.again(step, numbers[-1:], StepObserver(), timer)
        return OwnPasses(figures, losses)

    def finish(
        self, step: int, summed: OwnPasses, timer: StepTimer, *, shown: Tensor | None = None
    ) -> Measured:
        """Returns the figures of the whole batch once its sum is there, with the numbers (n,) that
        each rank shows all others."""
        with timer.phase("sync"):
            return self._sum.finish(step, self.passes.plan(step), losses=summed.losses, shown=shown)

    def mean(self, step: int, measured: Measured) -> Measured:
        """Turns the sum in the state's buffer, and its figures, into the mean over the tokens that
        count. Only now is their number known: so far, the sums are divided by the number of all
        tokens of the batch."""
        scale = self.passes.scale(step, measured.num_counted)
        if scale != 1.0:
            self._state.gradient.mul_(scale)
        return measured._replace(loss=measured.loss * scale, norm=measured.norm * scale)

    def again(
        self, step: int, numbers: Sequence[int], observer: StepObserver, timer: StepTimer
    ) -> list[Tensor]:
        """Computes the micro-batches of a turn, of this worker or of another, for an observer
        alone. Returns what `LanePasses.take` does of each."""
        observers = [*silent_faults(self._state), observer]
        with self._sum.again(self.passes.plan(step), numbers, timer, observers=observers):
            return [self.passes.take(step, number, timer) for number in numbers]

    def of_lane(self, step: int, lane: int, observer: StepObserver, timer: StepTimer) -> Tensor:
        """Returns a lane's part of the step's loss and the number of tokens that it counts (2,),
        before `scale`; the observer sees its gradient, and the state's buffer stays as it is. Where
        no other rank has a part of the gradient."""
        k = self.passes.config.train.micro_batches_per_lane
        numbers = range(lane * k, (lane + 1) * k)
        return reduce(torch.add, self.again(step, numbers, observer, timer))

    @property
    def totals(self) -> StepTotals:
        """The totals gathered in the last step."""
        return self._sum.totals

    def close(self) -> None:
        """Ends the work beside the training thread."""
        self._sum.close()

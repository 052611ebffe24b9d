"""Sums the gradients of a step's lanes over all ranks, for any computation of a lane."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from raymill.memory import large_zeros
from raymill.observer import StepObserver
from raymill.side_thread import side_work
from raymill.state.peers import Peers
from raymill.state.train_state import TrainState
from raymill.step_timer import StepTimer
from raymill.sums.bucket_exchange import BucketExchange
from raymill.sums.lane_sums import LaneSums
from raymill.sums.shard_sums import ShardSums
from raymill.sums.step_faults import Told, refuse_what_differs
from raymill.sums.step_plan import StepPlan
from raymill.sums.step_totals import FAST_NORM, BlockNorm, Measured, StepTotals
from raymill.workers.worker_group import WorkerGroup

# Buckets on their way to the owners of their parts, beside the one that is being sent
_MAX_WAITING = 3


class BatchSum:
    """Puts the gradient of a whole batch into the state's buffer; with a sharded optimizer, only
    this rank's parts of it."""

    def __init__(
        self,
        state: TrainState,
        group: WorkerGroup,
        plans: Iterable[StepPlan],
        *,
        lends: bool = False,
        norm: BlockNorm = FAST_NORM,
    ) -> None:
        """`plans` has all that `add_up` is going to get. With `lends` backward is lent memory that
        `model.cpu_ops` writes gradients into."""
        self._state = state
        sums_parts = state.sharding.divided.gradient
        num_buffers = max(plan.num_buffers for plan in plans)
        buffers = [state.gradient]
        while len(buffers) < num_buffers:
            buffers.append(large_zeros(len(state.gradient), device=state.device))
        self._buffers = buffers
        self._names = [name for name, _ in state.model.named_parameters()]
        self.totals = StepTotals(
            state.layout, state.sharding, group, device=state.device, norm=norm.whole
        )
        owners = state.sharding.owners
        self._exchange = BucketExchange(
            state.owned.homes if sums_parts else state.layout.buckets,
            buffers,
            Peers(state.sharding.counterparts, group),
            parts=state.layout.parts_of_owners(owners) if owners else None,
            square_sums=norm.of_blocks,
        )
        self._side_work = side_work(state.device, max_waiting=_MAX_WAITING if sums_parts else 0)
        self._sums: LaneSums | ShardSums
        exchange = self._exchange.exchange
        if sums_parts:
            self._sums = ShardSums(state, buffers, self._side_work, lends=lends, on_final=exchange)
        elif group.world_size > 1:
            submit = partial(self._side_work.submit, exchange)
            self._sums = LaneSums(state, buffers, lends=lends, on_final=submit)
        else:
            self._sums = LaneSums(state, buffers, lends=lends, on_final=exchange)

    def add_up(
        self,
        plan: StepPlan,
        backward: Callable[[int], Tensor],
        timer: StepTimer,
        *,
        observers: Sequence[StepObserver] = (),
    ) -> list[Tensor]:
        """Calls `backward` with the number of each micro-batch of this rank, in order: it brings
        gradients to the parameters and returns what `finish` is to get of them (2,)."""
        for observer in observers:
            observer.begin(plan, self._buffers)
        self._sums.odd = None
        losses: list[Tensor] = []
        subtrees = plan.subtrees[self._state.sharding.group]
        self._exchange.begin(plan.teams, subtrees=subtrees, observers=observers)
        for turn, numbers in enumerate(plan.turns):
            with self._sums.turn(plan, turn, observers), self._side_work.timed_by(timer):
                for number in numbers:
                    losses.append(backward(number))
        return losses[: len(plan.counted[self._state.sharding.rank])]

    @contextmanager
    def again(
        self,
        plan: StepPlan,
        numbers: Sequence[int],
        timer: StepTimer,
        *,
        observers: Sequence[StepObserver],
    ) -> Iterator[None]:
        """Lasts for the passes of a turn whose gradients only the observers want: the turn of these
        micro-batches."""
        with self._sums.again(plan, numbers, observers), self._side_work.timed_by(timer):
            yield

    def finish(
        self,
        step: int,
        plan: StepPlan,
        *,
        losses: Sequence[Tensor],
        shown: Tensor | None = None,
        learning_rate: float = 0.0,
    ) -> Measured:
        """Waits for the last sums, and returns the figures of the batch (`StepTotals.finish`).
        Raises `UserError`, the same on all ranks, where a lane gave a parameter no gradient, or
        where their learning rates differ."""
        self._side_work.wait()
        self._exchange.wait()
        measured = self.totals.finish(
            step,
            plan,
            block_sums=self._exchange.block_sums,
            losses=losses,
            shown=shown,
            told=Told.of(learning_rate, self._sums.odd, self._names),
        )
        refuse_what_differs(step, measured.told, self._names)
        return measured

    def close(self) -> None:
        """Ends the work beside the training thread."""
        self._side_work.close()
        self._exchange.close()

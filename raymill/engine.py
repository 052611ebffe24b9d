"""The exact engine for any PyTorch module: the same bits for any number of workers, without
raymill's data, models and runs.

    exact = ExactEngine(model, loss, num_lanes=8, rule=AdamW(0.9, 0.95, weight_decay=0.1))
    while (step := exact.num_steps) < 1000:
        figures = exact.step(lambda lane: batch_of(step, lane), learning_rate=1e-3)

A step's batch is a fixed number of lanes, whatever the number of workers. Each worker computes some
of them, and their gradients are added along a fixed tree (`sums.exact_reduce`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raymill.any_module import AnyModule
from raymill.dropout import dropout_seed, seed_dropout
from raymill.errors import UserError
from raymill.files.safetensors_file import safetensors_pieces
from raymill.files.stored_tensors import StoredTensors
from raymill.first_lanes import buffers_of, changed_buffer, fault_of
from raymill.observer import StepObserver
from raymill.rules.update_rule import UpdateRule
from raymill.state.shard import Shard, divided_by
from raymill.state.sharding import Sharding
from raymill.state.state_shares import StateShares
from raymill.state.stored_state import hash_of_weights, own_stretches, restore
from raymill.state.train_state import ALONE, TrainState
from raymill.state_files import file_name, state_in, write_beside, write_facts
from raymill.step_timer import StepTime, StepTimer
from raymill.sums.batch_sum import BatchSum
from raymill.sums.step_plan import StepPlan
from raymill.sums.step_totals import Measured
from raymill.workers.worker_group import WorkerGroup

Batch = TypeVar("Batch")

_NUM_CHECKED_LANES = 2


@dataclass(frozen=True)
class StepFigures:
    """The measurements of a step, equal on every worker but for its time."""

    loss: float  # the mean over lanes
    gradient_norm: float  # before it is clipped
    time: StepTime  # of this worker, by phase


class ExactEngine(Generic[Batch]):
    """Trains a module with the same bits for any number of workers, also one that changes.

    What it needs of the loss, a function of the module and one lane's batch:

    - it returns a scalar, of which the engine takes the mean over all lanes;
    - it depends on nothing but the weights, the batch, and torch's default random generator, which
      is seeded by step and lane before each call. So does the batch on step and lane;
    - it gives each trained parameter a gradient, in one part.

    Before the first step each worker computes its first two lanes twice. What shows a difference
    there, or a buffer that the forward pass changes, is refused by name. So is in each step what
    any worker sees of the others: a parameter that a lane gave no gradient, learning rates that
    differ, and a loss or a norm that is not finite. Then nothing is applied, on any worker.

    Where torch.distributed has been initialized, by `torchrun`, by Ray Train's `TorchTrainer` or by
    hand, all its processes are the workers. All call each method together, in the same order.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Batch], Tensor],
        *,
        num_lanes: int,
        rule: UpdateRule,
        shard: Shard = "none",
        grad_clip: float = 0.0,
        seed: int = 0,
        may_be_not_finite: bool = False,
        observers: Sequence[StepObserver] = (),
    ) -> None:
        """`model` is in fp32 on its device, with the same weights on every worker; its parameters
        become views of the engine's buffers. `shard` divides the rule's vectors among workers
        ("optimizer"), and the sums of the gradient too ("gradients"). 0 does not clip. With
        `may_be_not_finite` a step is applied also where its loss or its gradient is NaN or
        infinite, as plain PyTorch does. The observers see each step.

        Turns on `torch.use_deterministic_algorithms`. Raises `UserError` for what cannot be
        trained exactly.
        """
        self._model = AnyModule(model)
        self._loss = loss
        self._seed = seed
        self._num_lanes = num_lanes
        self._grad_clip = grad_clip
        self._may_be_not_finite = may_be_not_finite
        self._observers = observers
        self._group = _group()
        if num_lanes < self._group.world_size:
            raise UserError(
                f"{self._group.world_size} workers share {num_lanes} lanes, and each needs one: have "
                "more lanes, or fewer workers"
            )
        if divided_by(shard).values:
            raise UserError(
                f'shard="{shard}" gathers the weights of a decoder\'s blocks while they compute, which a '
                'module in general does not tell: use "gradients"'
            )
        torch.use_deterministic_algorithms(True)
        sharding = Sharding.of(
            divided_by(shard),
            num_holders=self._group.world_size,
            rank=self._group.rank,
            world_size=self._group.world_size,
        )
        self._state = TrainState(
            self._model,
            rule,
            device=self._model.device,
            grad_clip=grad_clip,
            group=self._group,
            sharding=sharding,
        )
        self._plan = StepPlan(sharding, num_lanes, num_micro_batches=1)
        self._sum = BatchSum(self._state, self._group, [self._plan])
        self._timer = StepTimer()
        self._buffers: dict[str, str] | None = None  # as they were before the first step
        self._require_equal_weights()

    @property
    def model(self) -> nn.Module:
        """The module, whose parameters are the trained weights."""
        return self._model.module

    @property
    def num_steps(self) -> int:
        """The number of steps taken so far, also before the state was loaded."""
        return self._state.num_updates

    @property
    def lanes(self) -> Sequence[int]:
        """The numbers of the lanes that this worker computes in a step, in order."""
        return [*chain.from_iterable(self._plan.turns)]

    def step(self, batch_of: Callable[[int], Batch], *, learning_rate: float) -> StepFigures:
        """Takes one step on the batch of all lanes: `batch_of` gives one lane's, the same whenever
        and wherever it is called.

        Raises `UserError` on all workers for a loss that cannot be exact, in the first step or
        later, for learning rates that differ, and for what is not finite: the state is then as
        before, and another step may be tried. Raises `LostPeerError` if a message did not
        arrive."""
        step, learning_rate = self.num_steps + 1, float(learning_rate)

        def backward(lane: int) -> Tensor:
            return self._backward(step, lane, batch_of)

        if self._buffers is None:
            self._check(backward)
        losses = self._sum.add_up(self._plan, backward, self._timer, observers=self._observers)
        with self._timer.phase("sync"):
            measured = self._sum.finish(
                step, self._plan, losses=losses, learning_rate=learning_rate
            )
        if not self._may_be_not_finite:
            self._require_finite(step, measured)
        for observer in self._observers:
            observer.update(measured, learning_rate=learning_rate)
        with self._timer.phase("update"):
            self._state.apply(norm=measured.norm, learning_rate=learning_rate)
        for observer in self._observers:
            observer.end(measured)
        return StepFigures(measured.loss, measured.norm, self._timer.take())

    def weights_hash(self) -> str:
        """Returns the SHA-256 of the trained weights, by name, shape and bytes."""
        return hash_of_weights(self._state, self._group, step=self.num_steps)

    def save(self, folder: str | Path) -> None:
        """Writes what this worker has to store into a folder: nothing, where another one has the
        same. Files of all workers in one folder are the whole state. All workers call together;
        `exact.json` is written last, with the SHA-256 of each file. Raises `UserError` on all where
        a buffer has changed since the first step."""
        changed = changed_buffer(self._model, self._buffers or {})
        self._refuse(changed and f"step {self.num_steps}: {changed}")
        written: dict[str, object] = {}
        if self._state.sharding.writes:
            written = self._write_share(Path(folder))
        files: dict[str, object] = {}
        for of_worker in self._group.gather(written):
            files |= of_worker
        if self._state.sharding.writes and self._state.sharding.place == 0:
            write_facts(Path(folder), self._facts, files)
        self._group.gather("saved")  # else another worker could load what is not a state yet

    def load(self, folder: str | Path) -> None:
        """Loads the state that any number of workers has saved, however they had divided it. All
        workers call together, and each reads all files through. Raises `UserError` on all if the
        state was trained with other lanes, or another seed, rule or `grad_clip`, and if a file is
        not the one that was saved."""
        stored: StoredTensors | None = None
        problem: str | None = None
        try:
            stored = state_in(Path(folder), self._facts)
        except UserError as error:
            problem = str(error)
        self._refuse(problem)
        assert stored is not None
        restore(self._state, stored)

    def close(self) -> None:
        """Ends the threads beside training."""
        self._sum.close()
        self._state.close()

    @property
    def _facts(self) -> dict[str, object]:
        """The facts that decide the bits, besides the loss and its batches."""
        return {
            "num_lanes": self._num_lanes,
            "seed": self._seed,
            "rule": repr(self._state.rule),
            "grad_clip": self._grad_clip,
        }

    def _write_share(self, folder: Path) -> dict[str, object]:
        """Writes this worker's share of the state. Returns what vouches for its file, by name."""
        state, sharding = self._state, self._state.sharding
        flat: dict[str, Tensor] = {}
        for name, views in StateShares(state).own_views().items():
            flat[name] = torch.cat([torch.empty(0), *(view.cpu() for view in views)])
        weights, vectors = own_stretches(state, flat)
        name = file_name(sharding.place, sharding.num_holders)
        return {name: write_beside(folder / name, safetensors_pieces(weights | vectors))}

    def _backward(self, step: int, lane: int, batch_of: Callable[[int], Batch]) -> Tensor:
        """Returns a lane's share of the loss, and 1 (2,), after its gradient went to the
        parameters."""
        with self._timer.phase("load"):
            batch = batch_of(lane)
        seed = dropout_seed(self._seed, step=step, micro_batch=lane)
        seed_dropout(seed, self._model.device)
        with self._timer.phase("forward"):
            loss = self._loss(self._model.module, batch)
            if loss.dim():
                raise UserError(
                    f"the loss of lane {lane} has the shape {tuple(loss.shape)}, expected a scalar"
                )
            loss = loss.float() / self._num_lanes
        with self._timer.phase("backward"):
            loss.backward()
        return torch.stack([loss.detach(), torch.ones_like(loss)])

    def _check(self, backward: Callable[[int], Tensor]) -> None:
        buffers = buffers_of(self._model)
        self._refuse(fault_of(self._model, backward, self.lanes[:_NUM_CHECKED_LANES]))
        self._buffers = buffers

    def _refuse(self, fault: str | None) -> None:
        """Raises `UserError` on all workers where one of them has a fault."""
        for rank, other in enumerate(self._group.gather(fault)):
            if other:
                raise UserError(f"worker {rank}: {other}")

    def _require_finite(self, step: int, measured: Measured) -> None:
        if math.isfinite(measured.loss) and math.isfinite(measured.norm):
            return
        wrong: dict[int, float] = {}
        for lanes, losses in zip(self._plan.counted, self._sum.totals.losses(), strict=True):
            for lane, loss in zip(lanes, losses, strict=False):
                if not math.isfinite(loss):
                    wrong[lane] = loss
        what = f"the gradient has the norm {measured.norm}"
        if wrong:
            what = f"the loss of lane {min(wrong)} is {wrong[min(wrong)]}"
        raise UserError(
            f"step {step}: {what}, and nothing was applied. Leave that batch out, lower the learning rate, or let "
            "the engine apply it (may_be_not_finite=True)"
        )

    def _require_equal_weights(self) -> None:
        hashes = self._group.gather(self.weights_hash())
        for rank, other in enumerate(hashes):
            if other != hashes[0]:
                raise UserError(
                    f"worker {rank} begins with other weights than worker 0: seed torch before the model "
                    "is made, or load the same weights on all"
                )


def _group() -> WorkerGroup:
    """Returns torch.distributed's workers, or this process alone."""
    if dist.is_available() and dist.is_initialized():
        return WorkerGroup(dist.get_rank(), dist.get_world_size())
    return ALONE

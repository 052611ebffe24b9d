"""One rank of a world in this process, on tensors that have no memory: the state, the sums and the
updates of a run, around a model that only touches its weights."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from cluster.settings.run import RunConfig
from jobs.exact.run_state import run_state
from jobs.exact.run_values import run_sharding
from model.config import GPTConfig
from model.gpt import GPT
from raymill.state.shard import Shard
from raymill.state.train_state import TrainState
from raymill.step_timer import StepTimer
from raymill.sums.batch_sum import BatchSum
from raymill.sums.step_plan import StepPlan
from raymill.sums.step_totals import Measured, StepTotals
from raymill.workers.worker_group import WorkerGroup
from tests.jobs.ranks.program import NothingThereError, Program, Recorder

META = torch.device("meta")
NODE = 8  # ranks
_SIZE = {"n_layer": 3, "n_head": 8, "n_embd": 1024, "vocab_size": 16384, "n_positions": 64}
"""54 million values, so that the parts of 512 ranks have dozens of blocks."""


def config_of(
    shard: Shard,
    *,
    lanes: int,
    group: int | None = None,
    precision: str = "fp32",
    micro_batches: int = 1,
    model: Mapping[str, int] = _SIZE,
) -> RunConfig:
    """Returns a run of so many lanes, of which `group` ranks hold a copy together."""
    return RunConfig.model_validate(
        {
            "model": model,
            "train": {
                "global_batch_size": lanes * micro_batches,
                "micro_batch_size": 1,
                "micro_batches_per_lane": micro_batches,
                "max_tokens": 10**9,
                "precision": precision,
                "compute": "plain",
            },
            "scaling": {"max_workers": 1, "shard": shard, "shard_group": group},
        }
    )


class OneRank:
    """Takes the steps of one rank."""

    def __init__(self, config: RunConfig, *, rank: int, world_size: int) -> None:
        assert isinstance(config.model, GPTConfig)
        with META:
            model = GPT(config.model)
        group = WorkerGroup(rank, world_size)
        sharding = run_sharding(config.scaling, rank=rank, world_size=world_size)
        self.state = run_state(model, config.train, device=META, group=group, sharding=sharding)
        k = config.train.micro_batches_per_lane
        num_lanes = config.train.global_batch_size // k
        self.plan = StepPlan(self.state.sharding, num_lanes, num_micro_batches=k)
        self._sums = BatchSum(self.state, group, [self.plan])
        self._passes = _passes(self.state)

    def step(self, number: int) -> None:
        """Takes a step, as `BatchGradient.of_step` does, and the update."""
        timer = StepTimer()
        with self.state.weights_in_use(timer):
            losses = self._sums.add_up(self.plan, self._backward, timer)
            self._sums.finish(number, self.plan, losses=losses)
        self.state.apply(norm=0.0, learning_rate=0.0, timer=timer)

    def _backward(self, number: int) -> Tensor:
        loss = self._passes()
        loss.backward()
        return torch.stack([loss.detach(), torch.ones_like(loss.detach())])

    def held(self) -> dict[str, int]:
        """Returns the bytes that this rank keeps from step to step, by their name in a plan."""
        buffers = self._sums._buffers
        gathered = self.state.gathered
        return {
            "weights": self.state.values.nbytes,
            "gradients": self.state.gradient.nbytes,
            "lane_sums": sum(buffer.nbytes for buffer in buffers[1:]),
            "optimizer": sum(vector.nbytes for vector in self.state.vectors.values()),
            "two_blocks": sum(slot.nbytes for slot in gathered._slots) if gathered else 0,
        }

    def received_bytes(self) -> int:
        """Returns the bytes in which the sums of others arrive."""
        return self._sums._exchange._room._memory.nbytes


def program_of(config: RunConfig, *, rank: int, world_size: int) -> Program:
    """Returns what a rank sends and receives in a step and its update."""
    recorder = Recorder(rank, world_size)
    with recorder.in_place_of_torch(), nothing_to_read():
        one = OneRank(config, rank=rank, world_size=world_size)
        one.step(1)
    recorder.program.held = one.held()
    recorder.program.received_bytes = one.received_bytes()
    return recorder.program


def programs_of(config: RunConfig, world_size: int) -> list[Program]:
    """Returns what each rank of a world does."""
    return [program_of(config, rank=rank, world_size=world_size) for rank in range(world_size)]


@contextmanager
def nothing_to_read(at_the_end: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Lasts while the figures of a step end where they would be read, as tensors have no values:
    then `at_the_end` is called."""
    finish = StepTotals.finish

    def until_read(*arguments: Any, **named: Any) -> Measured:
        # It must end so: torch's own error is that of a rank alone, which receives nothing
        expected = "nobody has sent it|Cannot copy out of meta tensor"
        with pytest.raises((NothingThereError, NotImplementedError), match=expected):
            finish(*arguments, **named)
        at_the_end()
        return Measured(0.0, 0.0, 1)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StepTotals, "finish", until_read)
        yield


def _passes(state: TrainState) -> Callable[[], Tensor]:
    """Returns a forward pass that reads each weight, and whose backward pass reads them again, in
    the order of a decoder's."""
    model = cast(nn.Module, state.model)
    blocks: list[nn.Module] = list(cast(Any, model).blocks)
    of_blocks = {id(one) for block in blocks for one in block.parameters()}
    outside = [one for one in model.parameters() if id(one) not in of_blocks]
    compute: Callable[..., Tensor] = _block
    if state.gathered:
        compute = state.gathered.in_turn(_block)

    def forward() -> Tensor:
        x: Tensor = _Read.apply(torch.ones((), device=META), *outside)
        for block in blocks:
            x = compute(block, x)
        return x

    return forward


def _block(block: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = _Read.apply(x, *block.parameters())
    return y


class _Read(torch.autograd.Function):
    """Reads weights, forward and backward, and gives each a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(*weights)
        return torch.stack([x, *(one.sum(dtype=x.dtype) for one in weights)]).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(one.clone() for one in ctx.saved_tensors)

"""The steps of a training loop with PyTorch's own parts, DistributedDataParallel or FSDP2, for
`bench_exact` and `bench_sharded`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cluster.settings.run import RunConfig, batch_schedule
from jobs.exact.compute import choose_operations
from model.gpt import GPT
from raymill.workers.worker_group import WorkerGroup
from tests.gpu.made_runs import MadeRows

RATE = 1e-4


class Loss(nn.Module):
    """The summed loss as a forward pass, which can be wrapped."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(inputs, targets)


@dataclass(frozen=True)
class Wrapped:
    module: nn.Module
    synchronize: Callable[[bool], None]  # whether the next backward's gradients go to other ranks


Wrap = Callable[[Loss], Wrapped]


def ddp(loss: Loss) -> Wrapped:
    module = DistributedDataParallel(loss)
    return Wrapped(module, partial(setattr, module, "require_backward_grad_sync"))


def fsdp2(
    loss: Loss,
    *,
    keeps_weights: bool = False,
    keeps_gradients: bool = False,
    prefetches: bool = False,
) -> Wrapped:
    """Shards each block, and what remains with the root.

    `keeps_weights` has them whole from forward to backward; `keeps_gradients` adds up whole ones of
    all micro-batches but the last, and then sends the sum; `prefetches` gathers the next block's
    weights beside the work on a block.
    """
    blocks = list(loss.model.transformer.h)
    for block in blocks:
        fully_shard(block, reshard_after_forward=not keeps_weights)
    fully_shard(loss)
    if prefetches:
        _prefetch(blocks)
    root: Any = loss
    return Wrapped(loss, root.set_requires_gradient_sync if keeps_gradients else lambda _: None)


def _prefetch(blocks: list[Any]) -> None:
    """Starts each block's gather before the block that is computed before it.

    What `set_modules_to_forward_prefetch` starts ends before it returns on a CPU, whose streams do
    nothing.
    """

    def unshard(block: Any, *_: Any) -> None:
        block.unshard(async_op=True)

    for earlier, later in pairwise(blocks):
        earlier.register_forward_pre_hook(partial(unshard, later))
        later.register_full_backward_pre_hook(partial(unshard, earlier))
    for block in blocks:
        # itself, which it has: nothing of the default
        block.set_modules_to_backward_prefetch([block])


class StockTrainer:
    """Takes the steps of the loop; each rank has as many of a step's lanes, in order."""

    def __init__(self, config: RunConfig, group: WorkerGroup, wrap: Wrap) -> None:
        torch.set_num_threads(1)
        self._config, self._rank, self._rows = config, group.rank, MadeRows.of(config)
        schedule = batch_schedule(config)
        self._num_lanes = schedule.num_lanes(1)
        # Both take the mean of the ranks' gradients
        self._scale = group.world_size / schedule.step_tokens(1)
        self._own_lanes = self._num_lanes // group.world_size
        assert self._own_lanes * group.world_size == self._num_lanes
        self._model = GPT(config.model)
        self._model.init_weights(0)
        choose_operations(self._model, config)
        self._wrapped = wrap(Loss(self._model))
        groups: list[list[nn.Parameter]] = [[], []]  # decayed, not decayed
        for parameter in self._model.parameters():
            groups[parameter.dim() < 2].append(parameter)
        self._optimizer = torch.optim.AdamW(
            [
                {"params": groups[0], "weight_decay": 0.1},
                {"params": groups[1], "weight_decay": 0.0},
            ],
            lr=RATE,
            betas=(0.9, 0.95),
            fused=True,
        )

    def step(self, number: int) -> float:
        """Takes the step of this number; returns the seconds that it waited for the others'
        losses."""
        self._optimizer.zero_grad()
        total, size = torch.zeros(()), self._config.train.micro_batch_size
        for lane in range(self._own_lanes):
            first = ((number - 1) * self._num_lanes + self._rank * self._own_lanes + lane) * size
            inputs, targets = self._rows.samples(range(first, first + size))
            self._wrapped.synchronize(lane == self._own_lanes - 1)
            loss = self._wrapped.module(inputs, targets) * self._scale
            loss.backward()
            total += loss.detach()
        start = time.perf_counter()
        dist.all_reduce(total)
        waited_s = time.perf_counter() - start
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        return waited_s

    def kept(self) -> dict[str, list[Tensor]]:
        """Returns what a rank keeps of weights, gradients and moments."""
        parameters = list(self._model.parameters())
        moments = [
            value
            for of in self._optimizer.state.values()
            for name, value in of.items()
            if name != "step"
        ]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        kept = {"weights": parameters, "gradients": gradients, "moments": moments}
        return {name: [_local(value) for value in values] for name, values in kept.items()}

    def weights(self, *, step: int) -> dict[str, Tensor]:
        """Returns the whole weights; all ranks call together."""
        named = self._model.named_parameters()
        return {
            name: value.full_tensor() if isinstance(value, DTensor) else value
            for name, value in named
        }

    def close(self) -> None:
        pass


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value

"""The proof's training by PyTorch's own DistributedDataParallel and FSDP2.

Both have what raymill has: the weights at first, the rows, dropout that is seeded by step and lane,
deterministic algorithms, one thread, AdamW by the same kernel, and the mean gradient over the same
lanes. Each worker adds up its own lanes before anything is sent. What is left to differ is the
order of additions.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from raymill.dropout import dropout_seed, seed_dropout
from raymill.files.safetensors_file import parameter_hash
from raymill.proof.rows import NUM_LANES
from raymill.proof.task import LEARNING_RATE, RULE, BatchOf, Block, loss, network

STATE = "state.pt"


class PeerTraining:
    """The usual loop around a module that PyTorch synchronizes."""

    def __init__(
        self, module: nn.Module, wrapped: nn.Module, synchronize: Callable[[bool], None], seed: int
    ) -> None:
        """`synchronize` says whether the next backward pass sends gradients."""
        self.num_steps = 0
        self._module = module
        self._wrapped = wrapped
        self._synchronize = synchronize
        self._seed = seed
        self._device = next(module.parameters()).device
        groups = [
            {"params": [*_with_sides(wrapped, least=2)], "weight_decay": RULE.weight_decay},
            {"params": [*_with_sides(wrapped, most=1)], "weight_decay": 0.0},
        ]
        betas = (RULE.beta1, RULE.beta2)
        self._optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=betas, fused=True)

    def step(self, batch_of: BatchOf) -> float:
        step, total = self.num_steps + 1, torch.zeros((), device=self._device)
        lanes = range(dist.get_rank(), NUM_LANES, dist.get_world_size())
        self._optimizer.zero_grad()
        for lane in lanes:
            self._synchronize(lane == lanes[-1])
            batch = batch_of(lane)
            seed_dropout(dropout_seed(self._seed, step=step, micro_batch=lane), total.device)
            share = loss(self._wrapped, batch) / len(lanes)
            share.backward()
            total += share.detach()
        self._optimizer.step()
        self.num_steps = step
        dist.all_reduce(total)
        return total.item() / dist.get_world_size()

    def save(self, folder: Path) -> None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, moments = get_state_dict(self._wrapped, self._optimizer, options=options)
        if dist.get_rank() == 0:
            begun = folder / f".{STATE}"
            torch.save({"weights": weights, "moments": moments, "step": self.num_steps}, begun)
            begun.replace(folder / STATE)

    def load(self, folder: Path) -> None:
        state = torch.load(folder / STATE, weights_only=True)
        set_state_dict(
            self._wrapped,
            self._optimizer,
            model_state_dict=state["weights"],
            optim_state_dict=state["moments"],
            options=StateDictOptions(full_state_dict=True),
        )
        self.num_steps = state["step"]

    def weights_hash(self) -> str:
        weights: dict[str, Tensor] = {}
        for name, value in self._module.named_parameters():
            weights[name] = value.full_tensor() if isinstance(value, DTensor) else value
        return parameter_hash(weights)


def ddp(seed: int, device: torch.device) -> PeerTraining:
    module = network(seed).to(device)
    wrapped = DistributedDataParallel(module)

    def synchronize(sends: bool) -> None:
        wrapped.require_backward_grad_sync = sends  # as its no_sync() does

    return PeerTraining(module, wrapped, synchronize, seed)


def fsdp2(seed: int, device: torch.device) -> PeerTraining:
    module = network(seed).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in module:
        if isinstance(layer, Block):
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    sharded = cast(FSDPModule, module)
    return PeerTraining(module, module, sharded.set_requires_gradient_sync, seed)


def _with_sides(module: nn.Module, *, least: int = 0, most: int = 9) -> Iterator[nn.Parameter]:
    for parameter in module.parameters():
        if least <= parameter.dim() <= most:
            yield parameter

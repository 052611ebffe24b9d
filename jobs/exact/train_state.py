"""Holds and updates the state that a training step changes: the weights and AdamW's moments, in flat buffers.

The model's parameters and gradients are views into flat fp32 buffers (`flat_layout`), so a lane's gradient is summed,
clipped and applied as one vector. With `train.shard_optimizer` (ZeRO-1, arXiv 1910.02054) a rank holds moments only of
the parts that it owns, and updates only those weights, which it then sends to all: the same bits, because AdamW works
value by value.
"""

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw  # the optimizer's class imports torch._dynamo, which takes a second

from cluster.settings.run import TrainConfig
from jobs.exact.bucket_exchange import gather_parts
from jobs.exact.flat_layout import FlatLayout, at, shared
from jobs.run.step_timer import StepTimer
from jobs.workers.worker_group import WorkerGroup
from model.gpt import GPT
from model.shapes import parameter_shapes
from model.training_memory import large_zeros

MOMENTS = ("exp_avg", "exp_avg_sq")

_EPSILON = 1e-8
"""Of AdamW: added to the root of the second moment."""

ALONE = WorkerGroup(rank=0, world_size=1)


@dataclass(frozen=True)
class StatePart:
    """The state in a rank's own parts of the flat buffers, or in all of them, as of rank 0 of 1, where nothing is
    sharded. The parts of all ranks together make the whole state, whatever the size of the world that reads them."""

    rank: int
    world_size: int
    tensors: dict[str, Tensor]  # "values" and MOMENTS, the parts end to end
    num_updates: int


class TrainState:
    """The model, its flat buffers and its optimizer."""

    def __init__(self, model: GPT, config: TrainConfig, *, device: torch.device, group: WorkerGroup = ALONE) -> None:
        self.model, self.device, self.num_updates = model, device, 0
        self.layout = layout = FlatLayout.of(parameter_shapes(model.config))
        self._group, self._config = group, config
        self.is_sharded = config.shard_optimizer and group.world_size > 1
        self.values = large_zeros(layout.size, device=device)  # (P,)
        self.gradient = large_zeros(layout.size, device=device)  # (P,)
        for name, parameter in model.named_parameters():
            view = layout.view(self.values, name, parameter)
            view.copy_(parameter.detach())
            parameter.data, parameter.grad = view, layout.view(self.gradient, name, parameter)
        own_parts = layout.parts(group.rank, world_size=group.world_size)
        self.owned = own_parts if self.is_sharded else [range(layout.size)]  # places of this rank's moments
        self._moments = {name: large_zeros(sum(map(len, self.owned)), device=device) for name in MOMENTS}
        self._updates: dict[float, tuple[list[Tensor], ...]] = {}  # AdamW's lists of tensors, by weight decay
        self._list_updates()

    def _list_updates(self) -> None:
        """Lists the stretches of this rank's places that AdamW treats alike, as views of the flat buffers."""
        decayed, undecayed = range(self.layout.boundary), range(self.layout.boundary, self.layout.size)
        start = 0
        for place in self.owned:
            for half, weight_decay in ((decayed, self._config.weight_decay), (undecayed, 0.0)):
                if stretch := shared(place, half):
                    own = range(start, start := start + len(stretch))
                    moments = [at(flat, own) for flat in self._moments.values()]
                    count = torch.zeros((), device=self.device)  # of updates, which AdamW's kernel counts up
                    lists = self._updates.setdefault(weight_decay, ([], [], [], [], []))
                    views = (at(self.values, stretch), at(self.gradient, stretch), *moments, count)
                    for tensors, view in zip(lists, views, strict=True):
                        tensors.append(view)

    def apply(self, *, norm: float, learning_rate: float, timer: StepTimer | None = None) -> None:
        """Takes one AdamW step, on every rank, with the gradient of the whole batch and its norm.

        With a sharded optimizer, the exchange of the weights is phase `sync` of the timer.
        """
        grad_clip = self._config.grad_clip
        if grad_clip and norm > grad_clip:
            for place in self.owned:
                at(self.gradient, place).mul_(grad_clip / norm)
        for weight_decay, (values, gradients, exp_avgs, exp_avg_sqs, counts) in self._updates.items():
            adamw(
                *(values, gradients, exp_avgs, exp_avg_sqs, [], counts),
                fused=True,
                amsgrad=False,
                maximize=False,
                lr=learning_rate,
                weight_decay=weight_decay,
                beta1=self._config.beta1,
                beta2=self._config.beta2,
                eps=_EPSILON,
            )
        self.num_updates += 1
        if not self.is_sharded:
            return
        with timer.phase("sync") if timer else nullcontext():
            for bucket in self.layout.buckets:
                gather_parts(self.values, bucket, self._group)

    def flat_moments(self) -> dict[str, Tensor]:
        """Returns AdamW's moments (P,) for a checkpoint, as views unless the optimizer is sharded.

        With a sharded optimizer all ranks must call together; rank 0 gets the moments, the others an empty dict.
        """
        if not self.is_sharded:
            return dict(self._moments)
        whole = {name: self._on_rank_0(own) for name, own in self._moments.items()}
        return {name: flat for name, flat in whole.items() if flat is not None}

    def by_parameter(self, flat: Tensor) -> dict[str, Tensor]:
        """Returns views of a flat buffer (P,)."""
        return {name: self.layout.view(flat, name, weights) for name, weights in self.model.named_parameters()}

    def is_finite(self) -> bool:
        """Reports whether every weight is finite, in one pass and without allocating."""
        return all(math.isfinite(float(bound)) for bound in self.values.aminmax())

    def load_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads the tensors of `checkpoint_moments`; each rank takes the parts that it owns."""
        self._set_num_updates(int(tensors["step"]))
        for moment, own in self._moments.items():
            flat = torch.zeros_like(self.values)
            for name, parameter in self.model.named_parameters():
                self.layout.view(flat, name, parameter).copy_(tensors[f"{moment}.{name}"])
            own.copy_(_joined(flat, self.owned))

    def own_state(self) -> StatePart:
        """Returns this rank's part of the state until the next update: its share where the optimizer is sharded, else
        the whole."""
        owner = self._group if self.is_sharded else ALONE
        tensors = {"values": _joined(self.values, self.owned), **self._moments}
        return StatePart(owner.rank, owner.world_size, tensors, self.num_updates)

    def load_state(self, parts: Iterable[StatePart]) -> None:
        """Loads the state from parts that together make the whole, from a world of any size."""
        whole = {name: torch.zeros_like(self.values) for name in MOMENTS} | {"values": self.values}
        num_loaded = 0
        for part in parts:
            places = self.layout.parts(part.rank, world_size=part.world_size)
            num_loaded += sum(map(len, places))
            self._set_num_updates(part.num_updates)
            for name, values in part.tensors.items():
                _spread(values, whole[name], places)
        assert num_loaded == self.layout.size, f"{num_loaded} of {self.layout.size} values"
        for moment, own in self._moments.items():
            own.copy_(_joined(whole[moment], self.owned))

    def _set_num_updates(self, number: int) -> None:
        self.num_updates = number
        for *_, counts in self._updates.values():
            for count in counts:
                count.fill_(number)

    def _on_rank_0(self, own: Tensor) -> Tensor | None:
        """Returns the whole of a sharded moment (P,) on rank 0."""
        if self._group.rank:
            dist.send(own, 0)
            return None
        flat = torch.zeros_like(self.values)
        for rank in range(self._group.world_size):
            places = self.layout.parts(rank, world_size=self._group.world_size)
            part = own if rank == 0 else own.new_empty(sum(map(len, places)))
            if rank:
                dist.recv(part, rank)
            _spread(part, flat, places)
        return flat


def _joined(flat: Tensor, places: list[range]) -> Tensor:
    """Returns the places of a flat buffer end to end: a view of one place, a copy of several."""
    pieces = [at(flat, place) for place in places]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _spread(values: Tensor, flat: Tensor, places: list[range]) -> None:
    """Copies values that lie end to end to their places in a flat buffer."""
    for place, piece in zip(places, values.split([len(place) for place in places]), strict=True):
        at(flat, place).copy_(piece)


def checkpoint_moments(state: TrainState, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint, from flat moments (P,)."""
    tensors = {"step": torch.tensor(state.num_updates, dtype=torch.int64)}
    for moment in MOMENTS:
        tensors |= {f"{moment}.{name}": view for name, view in state.by_parameter(flat[moment]).items()}
    return tensors

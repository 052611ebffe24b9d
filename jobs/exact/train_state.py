"""Holds and updates the state that a training step changes: the weights and AdamW's moments, in flat buffers.

The model's parameters and gradients are views into flat fp32 buffers (`flat_layout`), so a lane's gradient is summed,
clipped and applied as one vector. With `scaling.shard=optimizer` (ZeRO-1, arXiv 1910.02054) a rank holds moments of
the parts that it owns alone, and updates only those weights, which it then sends to all: the same bits, because AdamW
works value by value.
"""

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw  # the optimizer's class imports torch._dynamo, which takes a second

from cluster.settings.run import Shard, TrainConfig
from jobs.exact.bucket_exchange import gather_parts
from jobs.exact.flat_layout import FlatLayout, at, end_to_end, part_of, shared, stretches
from jobs.exact.host_copies import HostCopies
from jobs.run.step_timer import StepTimer
from jobs.workers.worker_group import WorkerGroup
from model.gpt import GPT
from model.shapes import parameter_shapes
from model.training_memory import large_zeros

MOMENTS = ("exp_avg", "exp_avg_sq")

_EPSILON = 1e-8
"""Of AdamW: added to the root of the second moment."""

ALONE = WorkerGroup(rank=0, world_size=1)


class StatePiece(NamedTuple):
    """Some of the state's values, which lie end to end."""

    name: str  # "values" or one of MOMENTS
    places: list[range]  # in the flat buffer
    values: Tensor


class TrainState:
    """The model, its flat buffers and its optimizer."""

    def __init__(
        self,
        model: GPT,
        config: TrainConfig,
        *,
        device: torch.device,
        group: WorkerGroup = ALONE,
        shard: Shard = "none",
    ) -> None:
        self.model, self.device, self.num_updates = model, device, 0
        self.layout = layout = FlatLayout.of(parameter_shapes(model.config))
        self._group, self._config = group, config
        self.copies = HostCopies(device)
        self.is_sharded = shard != "none" and group.world_size > 1
        self.values = large_zeros(layout.size, device=device)  # (P,)
        self.gradient = large_zeros(layout.size, device=device)  # (P,)
        for name, parameter in model.named_parameters():
            view = layout.view(self.values, name, parameter)
            view.copy_(parameter.detach())
            parameter.data, parameter.grad = view, layout.view(self.gradient, name, parameter)
        own_parts = layout.parts(group.rank, world_size=group.world_size)
        self.owned = own_parts if self.is_sharded else [range(layout.size)]  # places of this rank's moments
        self.moments = {name: large_zeros(sum(map(len, self.owned)), device=device) for name in MOMENTS}
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
                    moments = [at(flat, own) for flat in self.moments.values()]
                    count = torch.zeros((), device=self.device)  # of updates, which AdamW's kernel counts up
                    lists = self._updates.setdefault(weight_decay, ([], [], [], [], []))
                    views = (at(self.values, stretch), at(self.gradient, stretch), *moments, count)
                    for tensors, view in zip(lists, views, strict=True):
                        tensors.append(view)

    def apply(self, *, norm: float, learning_rate: float, timer: StepTimer | None = None) -> None:
        """Takes one AdamW step, on every rank, with the gradient of the whole batch and its norm, once the copies of
        the state before it are taken.

        With a sharded optimizer, the exchange of the weights is phase `sync` of the timer.
        """
        self.copies.wait(timer)
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

    def gather_moments(self, flat: Mapping[str, Tensor], *, step: int) -> None:
        """Brings a sharded optimizer's moments after a step together in rank 0's `flat`, on its host (P,), bucket by
        bucket: no GPU has to hold more. All ranks call together; those of the others are left as they are."""
        rank, world_size = self._group.rank, self._group.world_size
        for bucket, own_place in zip(self.layout.buckets, end_to_end(self.owned), strict=True):
            parts = [part_of(bucket, each, world_size=world_size) for each in range(world_size)]
            longest = max(map(len, parts))
            for name, own in self.moments.items():
                sent = own.new_zeros(longest)
                sent[: len(own_place)] = at(own, own_place)
                received = list(own.new_empty(world_size, longest)) if rank == 0 else None
                dist.gather(sent, received)
                for part, values in zip(parts, received or [], strict=False):
                    at(flat[name], part).copy_(values[: len(part)])
        self._group.prove(step, self.device)

    def by_parameter(self, flat: Tensor) -> dict[str, Tensor]:
        """Returns views of a flat buffer (P,)."""
        return {name: self.layout.view(flat, name, weights) for name, weights in self.model.named_parameters()}

    def is_finite(self) -> bool:
        """Reports whether every weight is finite, in one pass and without allocating."""
        return all(math.isfinite(float(bound)) for bound in self.values.aminmax())

    def load_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads the tensors of `checkpoint_moments`; each rank takes the parts that it owns."""
        self._set_num_updates(int(tensors["step"]))
        for moment in MOMENTS:
            for name, place in self.layout.places.items():
                self._load(StatePiece(moment, [place], tensors[f"{moment}.{name}"].flatten()))

    def share(self, rank: int, *, world_size: int) -> dict[str, list[Tensor]]:
        """Returns views of the state in a rank's parts of the flat buffers, which lie end to end in the order of
        `FlatLayout.parts`; where the optimizer is sharded, that rank must be this one. The shares of all ranks of any
        world make the whole state."""
        parts = self.layout.parts(rank, world_size=world_size)
        of_moments = end_to_end(parts) if self.is_sharded else parts
        moments = {name: [at(moment, part) for part in of_moments] for name, moment in self.moments.items()}
        return {"values": [at(self.values, part) for part in parts], **moments}

    def load_state(self, num_updates: int, pieces: Iterable[StatePiece]) -> None:
        """Loads the whole state; each rank takes the moments of the parts that it owns. A piece is used before the next
        one is asked for."""
        self._set_num_updates(num_updates)
        num_loaded = 0
        for piece in pieces:
            num_loaded += len(piece.values)
            self._load(piece)
        expected = (1 + len(MOMENTS)) * self.layout.size
        assert num_loaded == expected, f"{num_loaded} of {expected} values"

    def _load(self, piece: StatePiece) -> None:
        target, places = (self.values, [range(self.layout.size)])
        if piece.name != "values":
            target, places = self.moments[piece.name], self.owned
        for source, own in stretches(piece.places, places):
            at(target, own).copy_(at(piece.values, source))

    def _set_num_updates(self, number: int) -> None:
        self.num_updates = number
        for *_, counts in self._updates.values():
            for count in counts:
                count.fill_(number)


def checkpoint_moments(state: TrainState, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint, from flat moments (P,)."""
    tensors = {"step": torch.tensor(state.num_updates, dtype=torch.int64)}
    for moment in MOMENTS:
        tensors |= {f"{moment}.{name}": view for name, view in state.by_parameter(flat[moment]).items()}
    return tensors

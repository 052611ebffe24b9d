"""Holds and updates the state that a training step changes: the weights and AdamW's moments, in flat buffers.

The model's parameters and gradients are views into flat fp32 buffers (`flat_layout`), so a lane's gradient is summed,
clipped and applied as one vector. With `scaling.shard` a rank holds some of it of the parts that it owns alone (ZeRO,
arXiv 1910.02054): the moments, with `gradients` the gradient too, and with `parameters` the weights too, which it
gathers to compute (`gathered_weights`). It updates its own parts, and else sends them to all: the same bits, because
AdamW works value by value.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw  # the optimizer's class imports torch._dynamo, which takes a second

from cluster.settings.run import Shard
from cluster.settings.train import TrainConfig
from jobs.exact.flat_layout import NUM_SENDINGS, FlatLayout, at, end_to_end, moved, part_of, shared, stretches
from jobs.exact.gathered_weights import GatheredWeights
from jobs.exact.host_copies import HostCopies
from jobs.exact.peers import Peers
from jobs.exact.side_thread import side_work
from jobs.exact.step_plan import Mesh
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


class _Update(NamedTuple):
    """The values that are updated by one call for each weight decay."""

    buckets: Sequence[range]  # the parts of which they are, if they are sent
    lists: dict[float, tuple[list[Tensor], ...]]  # AdamW's lists of tensors, by weight decay


class TrainState:
    """The model, its flat buffers and its optimizer.

    `values`, `gradient` and `moments` are flat: of the whole layout (P,), or where they are sharded, of the places in
    `owned`, end to end.
    """

    def __init__(
        self,
        model: GPT,
        config: TrainConfig,
        *,
        device: torch.device,
        group: WorkerGroup = ALONE,
        shard: Shard = "none",
        group_size: int | None = None,
    ) -> None:
        """A group of `group_size` workers holds one copy of what is sharded; all of them if None. A model on torch's
        device `meta` has no values yet, and takes no memory beside the state's."""
        self.model, self.device, self.num_updates = model, device, 0
        self.shapes = parameter_shapes(model.config)
        self.layout = layout = FlatLayout.of(self.shapes)
        self._group, self.config = group, config
        self.copies = HostCopies(device)
        in_group = (group_size or group.world_size) if shard in ("gradients", "parameters") else group.world_size
        self.shard: Shard = shard if in_group > 1 else "none"
        self.sums_shards = self.shard in ("gradients", "parameters")
        self.mesh = Mesh(group.rank, group.world_size, in_group if self.sums_shards else 1)
        holders = self.mesh.members if self.sums_shards else [*range(group.world_size)]
        self.peers = Peers(holders, group)
        """Those that together hold one copy of what is sharded."""
        own_parts = layout.parts(self.peers.index, world_size=len(self.peers))
        self.owned = [range(layout.size)] if self.shard == "none" else own_parts
        self._own_places = end_to_end(self.owned)
        num_owned = sum(map(len, self.owned))
        self.gradient = large_zeros(num_owned if self.sums_shards else layout.size, device=device)
        self.moments = {name: large_zeros(num_owned, device=device) for name in MOMENTS}
        self.values = large_zeros(num_owned if self.shard == "parameters" else layout.size, device=device)
        if not any(parameter.is_meta for parameter in model.parameters()):
            self.load_weights(model.named_parameters())
        self.gathered: GatheredWeights | None = None
        if self.shard == "parameters":
            bf16 = config.precision == "bf16"
            has_flat_copy = device.type == "cpu" and config.compute in ("auto", "cpu")  # for its own operations
            apart = bf16 and not has_flat_copy
            self.gathered = GatheredWeights(model, layout, self.values, self.peers, bf16=bf16, apart=apart)
        else:
            views = self.by_parameter(self.values)
            model.load_state_dict({name: view.data for name, view in views.items()}, assign=True)
            for name, parameter in model.named_parameters():
                parameter.grad = None if self.sums_shards else layout.view(self.gradient, name, parameter)
        self._side_work = side_work(device) if self.sends_weights else None
        num_places = len(self.owned)
        starts = [n * num_places // NUM_SENDINGS for n in range(NUM_SENDINGS)] if self.sends_weights else [0]
        self._updates = [
            self._update_of(range(start, stop)) for start, stop in pairwise([*starts, num_places]) if start < stop
        ]

    @property
    def is_sharded(self) -> bool:
        return self.shard != "none"

    def is_divided(self, name: str) -> bool:
        """Reports whether each rank holds its own parts alone of "values", "gradient" or one of MOMENTS. The lengths do
        not tell: all blocks of a very small model may be one rank's."""
        match name:
            case "values":
                return self.shard == "parameters"
            case "gradient":
                return self.sums_shards
        return self.is_sharded

    @property
    def num_copies(self) -> int:
        """How many groups hold a copy each of what is sharded."""
        return self.mesh.num_groups if self.sums_shards else 1

    @property
    def is_of_first_copy(self) -> bool:
        """Whether this rank's parts belong to the first copy of what is sharded."""
        return self.mesh.number == 0 or not self.sums_shards

    @property
    def sends_weights(self) -> bool:
        """Whether an update ends with the others' parts of the weights."""
        return self.shard in ("optimizer", "gradients")

    def weights_in_use(self) -> AbstractContextManager[None]:
        """Lasts while the model computes, between two updates: all ranks enter and leave together, and compute as often
        as each other meanwhile, where the weights are sharded."""
        return self.gathered.in_use() if self.gathered else nullcontext()

    def close(self) -> None:
        """Ends the work beside the training thread."""
        self.copies.close()
        if self.gathered:
            self.gathered.close()
        if self._side_work:
            self._side_work.close()

    def _update_of(self, numbers: range) -> "_Update":
        """Lists the stretches of some of this rank's places, as views of the flat buffers."""
        update = _Update(self.layout.buckets[numbers.start : numbers.stop], {})
        places, own_places = self.owned[numbers.start : numbers.stop], self._own_places[numbers.start : numbers.stop]
        decayed, undecayed = range(self.layout.boundary), range(self.layout.boundary, self.layout.size)
        for place, own_place in zip(places, own_places, strict=True):
            for half, weight_decay in ((decayed, self.config.weight_decay), (undecayed, 0.0)):
                if stretch := shared(place, half):
                    own = moved(stretch, place.start, own_place.start)
                    count = torch.zeros((), device=self.device)  # of updates, which AdamW's kernel counts up
                    lists = update.lists.setdefault(weight_decay, ([], [], [], [], []))
                    flats = {"values": self.values, "gradient": self.gradient, **self.moments}
                    views = [at(flat, own if self.is_divided(name) else stretch) for name, flat in flats.items()]
                    for tensors, view in zip(lists, (*views, count), strict=True):
                        tensors.append(view)
        return update

    def apply(self, *, norm: float, learning_rate: float, timer: StepTimer | None = None) -> None:
        """Takes one AdamW step, on every rank, with the gradient of the whole batch and its norm, once the copies of
        the state before it are taken.

        With a sharded optimizer, the updated weights of some buckets go round while those of the next ones are
        computed; what is left of that in the end is phase `sync` of the timer.
        """
        self.copies.wait(timer)
        self.num_updates += 1  # from here on this is not the state of the step before, whatever fails
        grad_clip = self.config.grad_clip
        scale = grad_clip / norm if grad_clip and norm > grad_clip else 1.0
        for update in self._updates:
            self._take(update, scale=scale, learning_rate=learning_rate)
            if self._side_work:
                self._side_work.submit(self._send, update.buckets)
        if self._side_work:
            with timer.phase("sync") if timer else nullcontext():
                self._side_work.wait()

    def _take(self, update: "_Update", *, scale: float, learning_rate: float) -> None:
        """Takes the step of some of this rank's places, with their gradients times `scale`."""
        for weight_decay, (values, gradients, exp_avgs, exp_avg_sqs, counts) in update.lists.items():
            if scale != 1.0:
                for gradient in gradients:
                    gradient.mul_(scale)
            adamw(
                *(values, gradients, exp_avgs, exp_avg_sqs, [], counts),
                fused=True,
                amsgrad=False,
                maximize=False,
                lr=learning_rate,
                weight_decay=weight_decay,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                eps=_EPSILON,
            )

    def _send(self, buckets: Sequence[range]) -> None:
        """Brings the weights of some buckets together, each part from the rank that has updated it."""
        for bucket in buckets:
            self.peers.gather(self.values, bucket)

    def brought(self, own: Tensor, span: range, *, bucket: int) -> Tensor:
        """Returns the values at a stretch of a bucket on rank 0, from the owners of its parts; all ranks call together,
        and the others get nothing. `own` has this one's parts of all buckets, end to end."""
        num_peers, own_place = len(self.peers), self._own_places[bucket]
        parts = [part_of(self.layout.buckets[bucket], n, world_size=num_peers) for n in range(num_peers)]
        both = [shared(part, span) for part in parts]
        received = own.new_empty(len(span) if self._group.rank == 0 else 0)
        if self.is_of_first_copy:
            start = parts[self.peers.index].start
            sources = [at(own, moved(place, start, own_place.start)) for place in [both[self.peers.index]] if place]
            targets = [(n, [at(received, moved(place, span.start))]) for n, place in enumerate(both) if place]
            self.peers.pass_on([(0, sources)], targets if self._group.rank == 0 else [])
        return received

    @property
    def parts(self) -> dict[str, Tensor]:
        """The values and the moments, each whole or as far as they are this rank's."""
        return {"values": self.values, **self.moments}

    def by_parameter(self, flat: Tensor) -> dict[str, Tensor]:
        """Returns views of a flat buffer (P,)."""
        return {name: self.layout.view(flat, name, weights) for name, weights in self.model.named_parameters()}

    def is_finite(self) -> bool:
        """Reports whether every weight is finite, in one pass and without allocating; on all ranks alike."""
        own = not len(self.values) or all(math.isfinite(float(bound)) for bound in self.values.aminmax())
        return all(self._group.gather(own)) if self.shard == "parameters" else own

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Loads parameters by name. One is used before the next one is asked for."""
        for name, values in weights:
            self._load(StatePiece("values", [self.layout.places[name]], values.detach().flatten()))

    def share(self, rank: int, *, world_size: int) -> dict[str, list[Tensor]]:
        """Returns views of the state in a rank's parts of the flat buffers, which lie end to end in the order of
        `FlatLayout.parts`; where the optimizer is sharded, that rank must be this one. The shares of all ranks of any
        world make the whole state."""
        parts = self.layout.parts(rank, world_size=world_size)
        return {
            name: [at(flat, part) for part in (end_to_end(parts) if self.is_divided(name) else parts)]
            for name, flat in self.parts.items()
        }

    def load_state(self, num_updates: int, pieces: Iterable[StatePiece]) -> None:
        """Loads the whole state; each rank takes the moments of the parts that it owns. A piece is used before the next
        one is asked for."""
        self.set_num_updates(num_updates)
        num_loaded = 0
        for piece in pieces:
            num_loaded += len(piece.values)
            self._load(piece)
        expected = (1 + len(MOMENTS)) * self.layout.size
        assert num_loaded == expected, f"{num_loaded} of {expected} values"

    def _load(self, piece: StatePiece) -> None:
        target = self.parts[piece.name]
        places = self.owned if self.is_divided(piece.name) else [range(self.layout.size)]
        for source, own in stretches(piece.places, places):
            at(target, own).copy_(at(piece.values, source))

    def set_num_updates(self, number: int) -> None:
        self.num_updates = number
        for update in self._updates:
            for *_, counts in update.lists.values():
                for count in counts:
                    count.fill_(number)

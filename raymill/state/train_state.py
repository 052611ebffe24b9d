"""Holds and updates the state that a training step changes: weights and the update rule's vectors,
in flat buffers.

The model's parameters and gradients are views into flat fp32 buffers (`flat_layout`) of P values,
so a gradient is summed, clipped and applied as one vector. The weights come in an order of their
own: those that decay lie before `layout.boundary`. With `scaling.shard`, a rank keeps part of this
state only for the parts it owns (ZeRO, arXiv 1910.02054): of the rule's vectors, with `gradients`
of the gradient too, and with `parameters` of the weights too, which it gathers to compute
(`gathered_weights`). It updates its own parts, and sends them to all that keep the weights whole:
the same bits, because the rule (`rules`) works value by value, or on matrices that no part cuts.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from raymill.memory import large_zeros
from raymill.rules.rules import all_vectors, matrices_of, matrix_costs, vectors_of
from raymill.rules.update_rule import Stretch, UpdateRule
from raymill.side_thread import side_work
from raymill.state.bundle import Bundle, bundles_of
from raymill.state.flat_layout import FlatLayout
from raymill.state.gathered_weights import GatheredWeights, RoundedMatrices, Rounding, gatherable
from raymill.state.host_copies import HostCopies
from raymill.state.messages import numbers_of_sendings
from raymill.state.peers import Peers
from raymill.state.sharding import Sharding
from raymill.state.span import PackedSpans, Span
from raymill.step_timer import StepTimer
from raymill.trainable import Trainable
from raymill.workers.worker_group import WorkerGroup

ALONE = WorkerGroup(rank=0, world_size=1)


class _Sending(NamedTuple):
    """What is updated at a time. Where other ranks need the new weights, it is sent while the next
    is updated."""

    bundles: Sequence[Bundle]  # of which these stretches are this rank's parts
    stretches: Sequence[Stretch]


class TrainState:
    """The model, its flat buffers and its optimizer.

    `values`, `gradient` and each of the update rule's `vectors` are flat, with the packed values of
    the spans in `kept`: of the whole layout (P,), or where they are divided, of those in `owned`.
    Some of the rule's vectors exist for some parameters only.
    """

    def __init__(
        self,
        model: Trainable,
        rule: UpdateRule,
        *,
        device: torch.device,
        grad_clip: float = 0.0,
        rounding: Rounding | None = None,
        group: WorkerGroup = ALONE,
        sharding: Sharding | None = None,
        frozen: GatheredWeights | None = None,
    ) -> None:
        """Without `sharding` each rank holds a whole copy. A gradient whose norm is above `grad_clip`
        is scaled down to it; 0 does not clip. `rounding` has matrices of blocks as parameters of
        another type. `frozen` are weights beside the state that several ranks hold together. A model on
        torch's device `meta` has no values yet: it takes no memory beside the state's."""
        self.model = model
        self.device = device
        self.num_updates = 0
        self.shapes = {name: tuple(weights.shape) for name, weights in model.named_parameters()}
        self.rule = rule
        self._grad_clip = grad_clip
        self._rounding = rounding
        self.matrices = matrices_of(self.rule, model.hidden_matrices)
        costs = matrix_costs(self.rule, model.hidden_matrices)
        self.layout = FlatLayout.of(self.shapes, matrix_costs=costs)
        self.copies = HostCopies(device)
        self.sharding = sharding or Sharding(rank=group.rank, world_size=group.world_size)
        self.peers = Peers(self.sharding.holders, group)
        """The ranks that together hold one copy of the state, this rank among them; there may be
        several copies."""
        self._receivers = Peers(self.sharding.seated_holders, group)  # of updated weights
        self.group = group
        self.owned = self.layout.whole
        if not self.sharding.is_whole:
            self.owned = self.layout.parts(
                self.sharding.place, world_size=self.sharding.num_holders
            )
        self._kept = {name: self._spans_kept(name) for name in self._names_of_parts}
        self.gradient = self._zeros("gradient")
        self.vectors = {name: self._zeros(name) for name in all_vectors(self.rule)}
        self.values = self._zeros("values")
        if not any(parameter.is_meta for parameter in model.parameters()):
            self.load_weights(model.named_parameters())
        self.gathered = frozen
        """The values that all ranks have to gather together so that the model can compute."""
        self._rounded: RoundedMatrices | None = None
        if self.sharding.divided.values:
            self.gathered = self._gathered_weights()
        else:
            if rounding:
                self._rounded = RoundedMatrices(
                    self.layout, self.values, dtype=rounding.dtype, apart=rounding.apart
                )
            self._make_parameters_views()
        self._side_work = side_work(device) if self.sharding.sends_values else None
        self._sendings = [self._sending_of(numbers) for numbers in self._numbers_of_sendings()]

    def _zeros(self, name: str) -> Tensor:
        size = self.kept(name).num_values
        return large_zeros(size, device=self.device)

    @property
    def _names_of_parts(self) -> Sequence[str]:
        return ("gradient", "values", *all_vectors(self.rule))

    def _spans_kept(self, name: str) -> PackedSpans:
        extent = self.extent(name)
        if not self.sharding.is_divided(name):
            return extent
        return self.owned if extent is self.layout.whole else self.owned & extent

    def _gathered_weights(self) -> GatheredWeights:
        return GatheredWeights(
            gatherable(self.model),
            self.layout,
            self.values,
            self.peers,
            block_type=self.matrix_type,
            apart=self._rounding is not None and self._rounding.apart,
        )

    @property
    def matrix_type(self) -> torch.dtype:
        """The type in which the model has the matrices of blocks, and in which they, and their
        gradients, travel."""
        return self._rounding.dtype if self._rounding else torch.float32

    def _make_parameters_views(self) -> None:
        views = self.by_parameter(self.values)
        if self._rounded:
            for name, matrix in self._rounded.views(self.layout.places).items():
                views[name] = matrix.view(views[name].shape)
        self.model.adopt({name: view.data for name, view in views.items()})
        for name, parameter in self.model.named_parameters():
            parameter.grad = None
            is_sum = parameter.dtype == self.gradient.dtype
            if is_sum and not self.sharding.divided.gradient:
                parameter.grad = self.layout.view(self.gradient, name, parameter)

    def kept(self, name: str) -> PackedSpans:
        """Returns the spans of the layout that this rank has of "values", "gradient" or one of the
        rule's vectors."""
        return self._kept[name]

    def extent(self, name: str) -> PackedSpans:
        """Returns the spans of the layout for which there are values of this name on all ranks
        together: one of the rule's vectors may exist for its matrices alone, or for all else."""
        is_of_matrices = name in self.rule.matrix_vectors
        is_of_others = name in self.rule.vectors
        if is_of_matrices and not is_of_others:
            return self.layout.in_matrices
        if is_of_others and not is_of_matrices:
            return self.layout.outside_matrices
        return self.layout.whole

    def weights_in_use(self, timer: StepTimer | None = None) -> AbstractContextManager[None]:
        """Lasts while the model computes, between two updates: its matrices are rounded anew.

        Where the weights are sharded, each use gathers them from all ranks: so all enter and leave
        together, and call the model equally often. The timer learns how long the model waits.
        """
        if self.gathered:
            return self.gathered.in_use(timer)
        if self._rounded:
            self._rounded.refresh()
        return nullcontext()

    def close(self) -> None:
        """Ends the work beside the training thread."""
        self.copies.close()
        if self.gathered:
            self.gathered.close()
        if self._side_work:
            self._side_work.close()

    def _numbers_of_sendings(self) -> list[range]:
        """Returns the numbers of the owned spans that are updated at a time: all, or if others wait
        for them, some."""
        count = len(self.owned.spans)
        return numbers_of_sendings(count) if self.sharding.sends_values else [range(count)]

    def _sending_of(self, numbers: range) -> _Sending:
        """Lists the stretches of some of this rank's spans."""
        stretches: list[Stretch] = []
        for number in numbers:
            span = self.owned.spans[number]
            decayed = span & Span(0, self.layout.boundary)
            undecayed = span & Span(self.layout.boundary, self.layout.size)
            for part, decays in ((decayed, True), (undecayed, False)):
                for name, place in self.layout.stretches(part):
                    stretches.append(self._stretch(name, place, decays=decays))
        bundles: list[Bundle] = []
        if self.sharding.sends_values:
            buckets = self.layout.buckets[numbers.start : numbers.stop]
            sharding = self.sharding
            owners = [rank % sharding.num_holders for rank in sharding.seated_holders]
            parts = self.layout.parts_of_owners(owners, numbers=numbers)
            bundles = bundles_of(buckets, sharding.num_holders, parts=parts)
        return _Sending(bundles, stretches)

    def _stretch(self, name: str | None, place: Span, *, decays: bool) -> Stretch:
        """Returns views of the flat buffers at a place of the layout, which is that of a matrix if
        it has a name."""
        matrix = self.matrices[name] if name else None

        def view(part: str, flat: Tensor) -> Tensor:
            return self.kept(part).home_of(place).of(flat)

        return Stretch(
            values=view("values", self.values),
            gradient=view("gradient", self.gradient),
            vectors=[view(part, self.vectors[part]) for part in vectors_of(self.rule, matrix)],
            count=torch.zeros((), device=self.device),
            decays=decays,
            matrix=matrix,
        )

    def apply(self, *, norm: float, learning_rate: float, timer: StepTimer | None = None) -> None:
        """Updates the weights by the rule, on every rank, with the gradient of the whole batch and
        its norm, once the copies of the state before it are taken.

        Where other holders wait for the updated weights, those of some buckets go round while the
        next ones are computed; what is left of that in the end is phase `sync` of the timer.
        """
        self.copies.wait(timer)
        # From here on this is not the state of the step before, whatever fails
        self.num_updates += 1
        scale = self.clipping(norm)
        for sending in self._sendings:
            if scale != 1.0:
                for stretch in sending.stretches:
                    stretch.gradient.mul_(scale)
            self.rule.update(sending.stretches, learning_rate=learning_rate)
            if self._side_work:
                self._side_work.submit(self._send, sending.bundles)
        if self._side_work:
            with timer.phase("sync") if timer else nullcontext():
                self._side_work.wait()

    def clipping(self, norm: float) -> float:
        """Returns what a gradient of this norm is multiplied with before an update."""
        is_clipped = self._grad_clip and norm > self._grad_clip
        return self._grad_clip / norm if is_clipped else 1.0

    def _send(self, bundles: Sequence[Bundle]) -> None:
        """Brings the weights of some buckets together, each part from the rank that has updated
        it."""
        for bundle in bundles:
            bundle.gather(self._receivers, self.values)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The values and the rule's vectors, each whole, or if it is divided, this rank's own
        values."""
        return {"values": self.values, **self.vectors}

    def by_parameter(self, flat: Tensor) -> dict[str, Tensor]:
        """Returns views of a flat buffer (P,)."""
        views: dict[str, Tensor] = {}
        for name, weights in self.model.named_parameters():
            views[name] = self.layout.view(flat, name, weights)
        return views

    def is_finite(self) -> bool:
        """Reports whether every weight is finite on every rank, in one pass and without allocating;
        all ranks call together."""
        is_finite = True
        if len(self.values):
            smallest, largest = self.values.aminmax()
            is_finite = math.isfinite(float(smallest)) and math.isfinite(float(largest))
        return all(self.group.gather(is_finite))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Loads parameters by name. One is used before the next one is asked for."""
        for name, values in weights:
            self.load("values", [self.layout.places[name]], values.detach().flatten())

    def load(self, name: str, places: Sequence[Span], values: Tensor) -> None:
        """Loads what this rank keeps of "values" or one of the rule's vectors, from the values of
        some places of the layout, which lie end to end."""
        for in_values, in_target in PackedSpans(places).overlaps(self.kept(name)):
            in_target.of(self.parts[name]).copy_(in_values.of(values))

    def set_num_updates(self, number: int) -> None:
        self.num_updates = number
        for sending in self._sendings:
            for stretch in sending.stretches:
                stretch.count.fill_(number)

"""Measures what a step does to each layer: the norms of its gradient and its weights, and the ratio
of its update."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, assert_never

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.exact.run_state import decoder_of
from model.architecture import ParameterNames
from model.config import GPTConfig, Shape
from model.decoders import foreign_layer
from model.foreign_config import ForeignConfig
from raymill.state.train_state import TrainState
from raymill.step_timer import StepTimer
from raymill.workers.worker_group import WorkerGroup


class LayerStatistics:
    """Measures one step in every `every_steps`; 0 never."""

    def __init__(
        self, state: TrainState, group: WorkerGroup, timer: StepTimer, *, every_steps: int
    ) -> None:
        self._state, self._group, self._timer, self._every_steps = state, group, timer, every_steps
        self._layer_of = _layers_by_name(decoder_of(state).config)
        layers = [self._layer_of(name) for name, _ in state.model.named_parameters()]
        self._layers = list(dict.fromkeys(layers))
        self.fields: dict[str, Any] | None = None
        """The ledger's event `layers` of the last update, where that was measured, on rank 0."""

    @contextmanager
    def around_update(self, step: int) -> Iterator[None]:
        """Measures the update that is made inside; before it the gradient is the whole batch's, not
        yet clipped.

        All ranks take part, as with a sharded optimizer each has a part of the gradient.
        """
        self.fields, state = None, self._state
        if not self._every_steps or step % self._every_steps:
            yield
            return
        with self._timer.phase("statistics"):
            gradient = self._square_sums(state.gradient, is_divided=not state.sharding.is_whole)
            before = state.values.clone()
        yield
        if self._group.rank and not state.gathered:
            return
        with self._timer.phase("statistics"):
            is_divided = state.sharding.divided.values
            weight = self._square_sums(before, is_divided=is_divided)
            update = self._square_sums(before.sub_(state.values), is_divided=is_divided)
            ratios = _rounded((update / weight).sqrt())
            self.fields = {
                "layers": self._layers,
                "gradient_norm": _rounded(gradient.sqrt()),
                "weight_norm": _rounded(weight.sqrt()),
                # None of zero weights
                "update_ratio": [ratio if math.isfinite(ratio) else None for ratio in ratios],
            }

    def _square_sums(self, flat: Tensor, *, is_divided: bool) -> Tensor:
        """Returns the sum of squares of each layer (L,), in float64, over a flat buffer, of which
        each rank of a group has its own parts if that is divided."""
        state = self._state
        sums = torch.zeros(len(self._layers), dtype=torch.float64, device=flat.device)
        layout = state.layout
        for name, in_parameter, packed in layout.pieces(
            state.owned if is_divided else layout.whole
        ):
            place = (
                in_parameter.shifted(layout.places[name].start)
                if len(flat) == layout.size
                else packed
            )
            values = place.of(flat)
            norm = torch.linalg.vector_norm(values, dtype=torch.float64)
            sums[self._layers.index(self._layer_of(name))] += norm.square()
        sums = sums.cpu()
        if is_divided:
            if state.sharding.copy:  # the first one has all of it
                sums.zero_()
            with self._group.message():
                dist.all_reduce(sums)
        return sums


def _layers_by_name(shape: Shape) -> Callable[[str], str]:
    """Returns what names the layer of a parameter."""
    match shape:
        case GPTConfig():
            return partial(layer_of, names=shape.network.parameters)
        case ForeignConfig():
            return foreign_layer.layer_of
        case _:
            assert_never(shape)


def layer_of(parameter: str, names: ParameterNames) -> str:
    """Returns `wte`, `wpe`, `h.0.attn`, `h.0.mlp` …, `ln_f`, or of Llama `embed_tokens`,
    `layers.0.self_attn`, `layers.0.mlp` …, `norm`; a norm counts with the layer that it
    precedes."""
    module, *parts = parameter.removeprefix(f"{names.prefix}.").split(".")
    if module != names.blocks:
        return module
    number, part, *_ = parts
    return f"{module}.{number}.{names.norms.get(part, part)}"


def _rounded(values: Tensor) -> list[float]:
    """Rounds to six digits, none of which depends on how many ranks the squares were summed
    over."""
    return [float(f"{value:.6g}") for value in values.tolist()]

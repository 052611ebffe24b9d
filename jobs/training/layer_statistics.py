"""Measures what a step does to each layer: the norms of its gradient and its weights, and the ratio of its update."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.exact.flat_layout import at
from jobs.exact.train_state import TrainState
from jobs.run.step_timer import StepTimer
from jobs.workers.worker_group import WorkerGroup


class LayerStatistics:
    """Measures one step in every `every_steps`; 0 never."""

    def __init__(self, state: TrainState, group: WorkerGroup, timer: StepTimer, *, every_steps: int) -> None:
        self._state, self._group, self._timer, self._every_steps = state, group, timer, every_steps
        self.fields: dict[str, Any] | None = None
        """The ledger's event `layers` of the last update, where that was measured, on rank 0."""

    @contextmanager
    def around_update(self, step: int) -> Iterator[None]:
        """Measures the update that is made inside; before it the gradient is the whole batch's, not yet clipped.

        All ranks take part, as with a sharded optimizer each has a part of the gradient.
        """
        self.fields = None
        if not self._every_steps or step % self._every_steps:
            yield
            return
        parameters = dict(self._state.model.named_parameters())
        with self._timer.phase("statistics"):
            gradient = self._gradient_square_sums()
            before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        yield
        if self._group.rank:
            return
        with self._timer.phase("statistics"):
            weight = square_sums(before)
            changes = {name: before[name].sub_(parameter.detach()) for name, parameter in parameters.items()}
            self.fields = _fields(*(layer_norms(sums) for sums in (gradient, weight, square_sums(changes))))

    def _gradient_square_sums(self) -> dict[str, float]:
        """Returns the sum of squares of each parameter's gradient, over the parts of all ranks."""
        state, layout = self._state, self._state.layout
        if not state.is_sharded:
            return square_sums({name: at(state.gradient, place) for name, place in layout.places.items()})
        parts = layout.parts(self._group.rank, world_size=self._group.world_size)
        own = {
            f"{name} {part.start}": at(state.gradient, shared)
            for name, place in layout.places.items()
            for part in parts
            if (shared := range(max(place.start, part.start), min(place.stop, part.stop)))
        }
        sums = dict.fromkeys(layout.places, 0.0)
        for name, value in square_sums(own).items():
            sums[name.split()[0]] += value
        total = torch.tensor(list(sums.values()), dtype=torch.float64, device=state.device)
        dist.all_reduce(total)
        return dict(zip(sums, total.tolist(), strict=True))


def square_sums(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns each tensor's sum of squares, in float64."""
    norms = torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors.values()])
    return dict(zip(tensors, norms.square().tolist(), strict=True))


def layer_norms(sums: Mapping[str, float]) -> dict[str, float]:
    """Returns the Euclidean norm of each layer, from its parameters' sums of squares."""
    layers: dict[str, float] = {}
    for name in sorted(sums, key=_place):
        layers[layer_of(name)] = layers.get(layer_of(name), 0.0) + sums[name]
    return {layer: math.sqrt(total) for layer, total in layers.items()}


def layer_of(parameter: str) -> str:
    """Returns `wte`, `wpe`, `h.0.attn`, `h.0.mlp` …, `ln_f`; a LayerNorm counts with the layer that it precedes."""
    parts = parameter.removeprefix("transformer.").split(".")
    if parts[0] != "h":
        return parts[0]
    return ".".join([*parts[:2], {"ln_1": "attn", "ln_2": "mlp"}.get(parts[2], parts[2])])


def _place(parameter: str) -> tuple[int, int, str]:
    """Orders parameters from the embeddings to the head."""
    parts = parameter.removeprefix("transformer.").split(".")
    stage = {"wte": 0, "wpe": 0, "h": 1}.get(parts[0], 2)
    return stage, int(parts[1]) if parts[0] == "h" else 0, parameter


def _fields(gradient: dict[str, float], weight: dict[str, float], update: dict[str, float]) -> dict[str, Any]:
    return {
        "layers": list(weight),
        "gradient_norm": [_rounded(gradient[layer]) for layer in weight],
        "weight_norm": [_rounded(weight[layer]) for layer in weight],
        "update_ratio": [_rounded(update[layer] / weight[layer]) if weight[layer] else None for layer in weight],
    }


def _rounded(value: float) -> float:
    """Rounds to six digits, none of which depends on how many ranks the squares were summed over."""
    return float(f"{value:.6g}")

"""Gives an adapted model the weights that its adapter stands on.

On a CPU they are the base's file itself, mapped into memory: the workers of a node share its pages,
and the system may drop them. A GPU has a copy. Where `scaling.shard` divides weights, each worker
has its own parts, and gathers the rest block by block, as it would weights that are trained
(`raymill.state.gathered_weights`).
"""

from pathlib import Path

import torch
from torch import Tensor

from jobs.run.base import ALIGNMENT_BYTES
from model.decoders.adapted import AdaptedModel, FrozenWeights
from model.files.checkpoint import stored_weights
from model.files.checkpoint_folder import WEIGHTS
from raymill.files.stored_tensors import stored_in
from raymill.memory import large_zeros
from raymill.state.flat_layout import FlatLayout
from raymill.state.gathered_weights import GatheredWeights
from raymill.state.peers import Peers
from raymill.state.sharding import Sharding
from raymill.state.span import PackedSpans
from raymill.workers.worker_group import WorkerGroup


def freeze(
    model: AdaptedModel,
    folder: Path,
    *,
    device: torch.device,
    sharding: Sharding,
    group: WorkerGroup,
) -> GatheredWeights | None:
    """Lets the model compute with the weights in a base's folder. Returns what gathers them, where
    `sharding` divides weights."""
    layout = FlatLayout.of({name: tuple(values.shape) for name, values in model.frozen.items()})
    if sharding.divided.values:
        parts = layout.parts(sharding.place, world_size=sharding.num_holders)
        return GatheredWeights(
            FrozenWeights(model),
            layout,
            _loaded(folder, layout, parts, device),
            Peers(sharding.holders, group),
            block_type=torch.float32,
            apart=False,
        )
    if device.type == "cpu":
        mapped = stored_weights(folder)
        model.adopt_frozen({name: _in_place(values) for name, values in mapped.items()})
    else:
        flat = _loaded(folder, layout, layout.whole, device)
        model.adopt_frozen(
            {name: layout.view(flat, name, values) for name, values in model.frozen.items()}
        )
    return None


def _loaded(folder: Path, layout: FlatLayout, spans: PackedSpans, device: torch.device) -> Tensor:
    """Returns the stored values of some spans of the layout, end to end."""
    flat = large_zeros(spans.num_values, device=device)
    stored_in(folder, [WEIGHTS]).load(
        (name, range(in_tensor.start, in_tensor.stop), packed.of(flat))
        for name, in_tensor, packed in layout.pieces(spans)
    )
    return flat


def _in_place(values: Tensor) -> Tensor:
    """Returns the tensor itself, or a copy where its place in memory is another kind of place than
    a buffer of the trainer would have."""
    return values if values.data_ptr() % ALIGNMENT_BYTES == 0 else values.clone()

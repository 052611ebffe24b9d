"""The training state as checkpoints hold it: tensors by name, whole or in the stretches that a worker has."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from jobs.exact.flat_layout import at
from jobs.exact.train_state import MOMENTS, TrainState
from jobs.workers.worker_group import WorkerGroup
from model.checkpoint import parameter_hash
from model.stored_tensors import StoredTensors, hashed_name, stretch_name


def restore(state: TrainState, stored: StoredTensors) -> None:
    """Loads the tensors of a checkpoint, of which each rank reads the values that it keeps."""
    num_updates = torch.empty(1, dtype=torch.int64)
    stored.load([("step", range(1), num_updates)])
    state.set_num_updates(int(num_updates))
    for part, flat in state.parts.items():
        places = state.owned if state.is_divided(part) else [range(state.layout.size)]
        pieces = state.layout.pieces(places)
        stored.load((stored_name(part, name), place, at(flat, own)) for name, place, own in pieces)


def moments_by_name(state: TrainState, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the whole tensors of a training state, from flat moments (P,)."""
    tensors = {"step": torch.tensor(state.num_updates, dtype=torch.int64)}
    for moment in MOMENTS:
        tensors |= {stored_name(moment, name): view for name, view in state.by_parameter(flat[moment]).items()}
    return tensors


def own_stretches(state: TrainState, flat: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the tensors of this worker's shard, weights and training state, from copies of the values and the moments
    in its own parts."""
    weights: dict[str, Tensor] = {}
    train_state = {} if state.peers.index else {"step": torch.tensor(state.num_updates, dtype=torch.int64)}
    for name, place, own in state.layout.pieces(state.owned):
        for part in ("values", *MOMENTS):
            tensors = weights if part == "values" else train_state
            tensors[stretch_name(stored_name(part, name), place.start)] = at(flat[part], own)
    return weights, train_state


def hash_of_weights(state: TrainState, group: WorkerGroup, *, step: int) -> str:
    """Returns the parameter hash on rank 0. Where the weights are sharded, all ranks call together, and rank 0 gets a
    stretch of a bucket at a time."""
    if state.gathered is None:
        return parameter_hash(state.by_parameter(state.values))
    starts = [bucket.start for bucket in state.layout.buckets]
    spans: dict[str, list[range]] = {}
    for name, _, span in state.layout.pieces(state.layout.buckets):
        spans.setdefault(name, []).append(span)
    digest = hashlib.sha256()
    for name in sorted(spans):
        digest.update(hashed_name(name, state.values.dtype, state.shapes[name]))
        for span in spans[name]:
            values = state.brought(state.values, span, bucket=bisect_right(starts, span.start) - 1)
            digest.update(values.cpu().numpy().data)
    group.prove(step, state.device)
    return digest.hexdigest() if group.rank == 0 else ""


def fill(flat: Tensor, pieces: Iterator[Tensor]) -> None:
    """Copies the pieces to the beginning of a vector, end to end."""
    end = 0
    for piece in pieces:
        flat[end : (end := end + len(piece))].copy_(piece)


def stored_name(part: str, parameter: str) -> str:
    """Returns the name by which a checkpoint has a part of the state's values of a parameter."""
    return parameter if part == "values" else f"{part}.{parameter}"

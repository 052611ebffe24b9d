"""The training state as files hold it: tensors by name, whole or in the stretches that a worker
has."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from raymill.files.safetensors_file import hashed_name, parameter_hash
from raymill.files.stored_tensors import StoredTensors, stretch_name
from raymill.state.span import PackedSpans, Span
from raymill.state.state_shares import StateShares
from raymill.state.train_state import TrainState
from raymill.workers.worker_group import WorkerGroup


def restore(state: TrainState, stored: StoredTensors) -> None:
    """Loads the tensors of a checkpoint, of which each rank reads the values that it keeps."""
    num_updates = torch.empty(1, dtype=torch.int64)
    stored.load([("step", range(1), num_updates)])
    state.set_num_updates(int(num_updates))
    for part, flat in state.parts.items():
        pieces = state.layout.pieces(state.kept(part))
        stored.load(
            (stored_name(part, name), range(in_parameter.start, in_parameter.stop), packed.of(flat))
            for name, in_parameter, packed in pieces
        )


def own_stretches(
    state: TrainState, flat: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the tensors of this worker's shard, weights and training state, from copies of the
    values and the update rule's vectors in its own parts."""
    weights: dict[str, Tensor] = {}
    train_state = (
        {} if state.sharding.place else {"step": torch.tensor(state.num_updates, dtype=torch.int64)}
    )
    shares = StateShares(state)
    for part in state.parts:
        tensors = weights if part == "values" else train_state
        spans = shares.own_spans(part)
        for name, in_parameter, packed in state.layout.pieces(spans):
            stretch = stretch_name(stored_name(part, name), in_parameter.start)
            tensors[stretch] = packed.of(flat[part])
    return weights, train_state


def hash_of_weights(state: TrainState, group: WorkerGroup, *, step: int) -> str:
    """Returns the parameter hash on rank 0. Where the weights are sharded, all ranks call together,
    and rank 0 gets a stretch of a bucket at a time."""
    if not state.sharding.divided.values:
        return parameter_hash(state.by_parameter(state.values))
    spans = stretches_by_name(state, "values")
    digest = hashlib.sha256()
    for name in sorted(spans):
        digest.update(hashed_name(name, state.values.dtype, state.shapes[name]))
        for piece in brought(state, "values", spans[name]):
            digest.update(piece)
    group.prove(step, state.device)
    return digest.hexdigest() if group.rank == 0 else ""


def stretches_by_name(state: TrainState, part: str) -> dict[str, list[Span]]:
    """Returns the stretches of each parameter, by buckets, for which all ranks together have values
    of the part: of "values", or of one of the rule's vectors."""
    buckets = PackedSpans(state.layout.buckets) & state.extent(part)
    spans: dict[str, list[Span]] = {}
    for name, in_parameter, _ in state.layout.pieces(buckets):
        start = state.layout.places[name].start
        spans.setdefault(name, []).append(in_parameter.shifted(start))
    return spans


def brought(state: TrainState, part: str, spans: Sequence[Span]) -> Iterator[memoryview]:
    """Yields the bytes of the part's values at some spans on rank 0; other ranks send theirs."""
    flat = state.parts[part]
    starts = [bucket.start for bucket in state.layout.buckets]
    for span in spans:
        if state.sharding.is_divided(part):
            bucket = bisect_right(starts, span.start) - 1
            values = StateShares(state).brought(part, span, bucket=bucket)
        else:
            values = state.kept(part).home_of(span).of(flat)
        yield values.cpu().view(torch.uint8).numpy().data


def stored_name(part: str, parameter: str) -> str:
    """Returns the name by which a checkpoint has a part of the state's values of a parameter."""
    return parameter if part == "values" else f"{part}.{parameter}"

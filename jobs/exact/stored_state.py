"""The training state as checkpoints hold it: tensors by name, whole or in the stretches that a
worker has."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from jobs.exact.state.span import PackedSpans, Span
from jobs.exact.state.train_state import TrainState
from jobs.workers.worker_group import WorkerGroup
from model.files.checkpoint import parameter_hash
from model.files.state_hash import WORDS, StateHashes, VectorsHash, words_in
from model.files.stored_tensors import StoredTensors, hashed_name, stretch_name

MOST_TRIES = 2
"""How often a state is loaded that did not arrive as it was stored."""


class DamagedStateError(RuntimeError):
    """What a worker loaded is not what was stored. Another attempt may load it rightly."""


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


def vectors_by_name(state: TrainState, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the whole tensors of a training state, from the update rule's flat vectors."""
    tensors = {"step": torch.tensor(state.num_updates, dtype=torch.int64)}
    for vector in state.vectors:
        for name, _, packed in state.layout.pieces(state.extent(vector)):
            values = packed.of(flat[vector])
            tensors[stored_name(vector, name)] = values.view(state.shapes[name])
    return tensors


def own_stretches(
    state: TrainState, flat: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the tensors of this worker's shard, weights and training state, from copies of the
    values and the update rule's vectors in its own parts."""
    weights: dict[str, Tensor] = {}
    train_state = (
        {} if state.sharding.place else {"step": torch.tensor(state.num_updates, dtype=torch.int64)}
    )
    place, num_holders = state.sharding.place, state.sharding.num_holders
    for part in state.parts:
        tensors = weights if part == "values" else train_state
        spans = state.spans_of_share(part, place, world_size=num_holders)
        for name, in_parameter, packed in state.layout.pieces(spans):
            stretch = stretch_name(stored_name(part, name), in_parameter.start)
            tensors[stretch] = packed.of(flat[part])
    return weights, train_state


def checksum_of(words: int) -> str:
    """Returns a sum of words as metadata has it."""
    return f"{words % WORDS:016x}"


def words_of_share(state: TrainState, parts: Iterable[str]) -> int:
    """Returns the sum of the words of what this rank stores of some parts of the state: of all of
    them, or of its stretches. The sums of all holders of one copy add up to that of the whole."""
    return words_in(_tensors_of_share(state, parts))


def _tensors_of_share(state: TrainState, parts: Iterable[str]) -> Iterator[Tensor]:
    """Yields views of the parameters' stretches in this rank's share; what lies between them is not
    stored."""
    place, num_holders = state.sharding.place, state.sharding.num_holders
    for part in parts:
        kept, flat = state.kept(part), state.parts[part]
        spans = state.spans_of_share(part, place, world_size=num_holders)
        for _, _, packed in state.layout.pieces(spans):
            for span in spans.cut(packed):
                yield kept.home_of(span).of(flat)


def restored(
    state: TrainState, stored: StoredTensors, group: WorkerGroup, *, checksum: str | None, name: str
) -> None:
    """Loads a checkpoint on all ranks, and compares what they hold with the checksum that was taken
    where its state was copied; earlier versions took none. Raises `DamagedStateError` where a rank
    has other bits, also when it is loaded once more."""
    for _ in range(MOST_TRIES):
        restore(state, stored)
        shares = group.gather((state.sharding.copy, words_of_share(state, state.parts)))
        sums: dict[int, int] = {}
        for copy, words in shares:
            sums[copy] = sums.get(copy, 0) + words
        are_right = [checksum in (None, checksum_of(sums[copy])) for copy, _ in shares]
        if all(are_right):
            return
    raise damaged_state(are_right, f"checkpoint {name}")


def damaged_state(are_right: Sequence[bool], source: str) -> DamagedStateError:
    """Returns the error of ranks that hold other bits than those that were stored."""
    wrong = ", ".join(str(rank) for rank, is_right in enumerate(are_right) if not is_right)
    return DamagedStateError(
        f"the state that rank {wrong} loaded from {source} has other bits than the state that was stored, {MOST_TRIES} "
        "times: its memory, its disk or its network alters them; take its node out of the cluster"
    )


def hash_of_weights(state: TrainState, group: WorkerGroup, *, step: int) -> str:
    """Returns the parameter hash on rank 0. Where the weights are sharded, all ranks call together,
    and rank 0 gets a stretch of a bucket at a time."""
    if not state.sharding.divided.values:
        return parameter_hash(state.by_parameter(state.values))
    spans = _stretches_by_name(state, "values")
    digest = hashlib.sha256()
    for name in sorted(spans):
        digest.update(hashed_name(name, state.values.dtype, state.shapes[name]))
        for piece in _brought(state, "values", spans[name]):
            digest.update(piece)
    group.prove(step, state.device)
    return digest.hexdigest() if group.rank == 0 else ""


def hashes_of_state(state: TrainState, group: WorkerGroup, *, step: int) -> StateHashes | None:
    """Returns the hashes of the whole state on rank 0, and None elsewhere; all ranks call
    together."""
    parameters = hash_of_weights(state, group, step=step)
    stretches: dict[str, tuple[str, list[Span]]] = {}
    for part in state.vectors:
        for name, spans in _stretches_by_name(state, part).items():
            stretches[stored_name(part, name)] = part, spans
    vectors = VectorsHash(state.num_updates)
    for name in sorted(stretches):
        part, spans = stretches[name]
        num_values = sum(map(len, spans))
        pieces = _brought(state, part, spans)
        vectors.add(name, state.parts[part].dtype, num_values=num_values, pieces=pieces)
    group.prove(step, state.device)
    return StateHashes(parameters, vectors.hexdigest()) if group.rank == 0 else None


def _stretches_by_name(state: TrainState, part: str) -> dict[str, list[Span]]:
    """Returns the stretches of each parameter, by buckets, for which all ranks together have values
    of the part: of "values", or of one of the rule's vectors."""
    buckets = PackedSpans(state.layout.buckets) & state.extent(part)
    spans: dict[str, list[Span]] = {}
    for name, in_parameter, _ in state.layout.pieces(buckets):
        start = state.layout.places[name].start
        spans.setdefault(name, []).append(in_parameter.shifted(start))
    return spans


def _brought(state: TrainState, part: str, spans: Sequence[Span]) -> Iterator[memoryview]:
    """Yields the bytes of the part's values at some spans on rank 0; other ranks send theirs."""
    flat = state.parts[part]
    starts = [bucket.start for bucket in state.layout.buckets]
    for span in spans:
        if state.sharding.is_divided(part):
            bucket = bisect_right(starts, span.start) - 1
            values = state.brought(part, span, bucket=bucket)
        else:
            values = state.kept(part).home_of(span).of(flat)
        yield values.cpu().view(torch.uint8).numpy().data


def fill(flat: Tensor, pieces: Iterator[Tensor]) -> None:
    """Copies the pieces to the beginning of a vector, end to end."""
    start = 0
    for piece in pieces:
        flat[start : start + len(piece)].copy_(piece)
        start += len(piece)


def cut_up(flat: Tensor, lengths: Mapping[str, int]) -> dict[str, Tensor]:
    """Returns the stretches of a vector that belong to some names, end to end."""
    stretches = flat.split([*lengths.values()])
    return dict(zip(lengths, stretches, strict=True))


def stored_name(part: str, parameter: str) -> str:
    """Returns the name by which a checkpoint has a part of the state's values of a parameter."""
    return parameter if part == "values" else f"{part}.{parameter}"

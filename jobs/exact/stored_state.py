"""The training state as checkpoints hold it: tensors by name, whole or in the stretches that a
worker has."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from model.files.state_hash import WORDS, StateHashes, VectorsHash, words_in
from raymill.files.stored_tensors import StoredTensors
from raymill.state.span import Span
from raymill.state.state_shares import StateShares
from raymill.state.stored_state import (
    brought,
    hash_of_weights,
    restore,
    stored_name,
    stretches_by_name,
)
from raymill.state.train_state import TrainState
from raymill.workers.worker_group import WorkerGroup

MOST_TRIES = 2
"""How often a state is loaded that did not arrive as it was stored."""


class DamagedStateError(RuntimeError):
    """A loaded state that is not the stored one. Another attempt may load it rightly."""


def checksum_of(words: int) -> str:
    """Returns a sum of words as metadata has it."""
    return f"{words % WORDS:016x}"


def words_of_share(state: TrainState, parts: Iterable[str]) -> int:
    """Returns the sum of the words of this rank's stored share of some parts of the state: of all
    of them, or of its stretches. The sums of all holders of one copy add up to the sum of the
    whole."""
    return words_in(_tensors_of_share(state, parts))


def _tensors_of_share(state: TrainState, parts: Iterable[str]) -> Iterator[Tensor]:
    """Yields views of the parameters' stretches in this rank's share; what lies between them is not
    stored."""
    shares = StateShares(state)
    for part in parts:
        kept, flat = state.kept(part), state.parts[part]
        spans = shares.own_spans(part)
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
    """Returns the error of ranks whose bits are not the stored ones."""
    wrong = ", ".join(str(rank) for rank, is_right in enumerate(are_right) if not is_right)
    return DamagedStateError(
        f"the state that rank {wrong} loaded from {source} has other bits than the state that was stored, {MOST_TRIES} "
        "times: its memory, its disk or its network alters them; take its node out of the cluster"
    )


def hashes_of_state(state: TrainState, group: WorkerGroup, *, step: int) -> StateHashes | None:
    """Returns the hashes of the whole state on rank 0, and None elsewhere; all ranks call
    together."""
    parameters = hash_of_weights(state, group, step=step)
    stretches: dict[str, tuple[str, list[Span]]] = {}
    for part in state.vectors:
        for name, spans in stretches_by_name(state, part).items():
            stretches[stored_name(part, name)] = part, spans
    vectors = VectorsHash(state.num_updates)
    for name in sorted(stretches):
        part, spans = stretches[name]
        num_values = sum(map(len, spans))
        pieces = brought(state, part, spans)
        vectors.add(name, state.parts[part].dtype, num_values=num_values, pieces=pieces)
    group.prove(step, state.device)
    return StateHashes(parameters, vectors.hexdigest()) if group.rank == 0 else None


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


def vectors_by_name(state: TrainState, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the whole tensors of a training state, from the update rule's flat vectors."""
    tensors = {"step": torch.tensor(state.num_updates, dtype=torch.int64)}
    for vector in state.vectors:
        for name, _, packed in state.layout.pieces(state.extent(vector)):
            values = packed.of(flat[vector])
            tensors[stored_name(vector, name)] = values.view(state.shapes[name])
    return tensors

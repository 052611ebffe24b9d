"""Hashes a training's whole state, so that one line of a ledger binds all of it.

    parameters   the parameter hash of the weights
    vectors      the number of updates, and behind it the update rule's vectors by name: each adds
                 `name \\0 dtype \\0 n \\0` and then its n values, as in the parameter hash
    state        both, the guard's memory, the step and the tokens seen, as canonical JSON

None of the three depends on how the state is divided among workers.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.files import checkpoint_folder as layout
from model.files.hf_config import read_shape
from model.files.stored_tensors import StoredTensors, hashed_name, stored_in
from model.shapes import parameter_shapes

COUNT = "step"
"""The tensor of a training state with the number of updates."""

Pieces = Iterable[bytes | memoryview]

_WORDS = 1 << 64
_PIECE_VALUES = 1 << 18  # stay in a processor's cache


@dataclass(frozen=True)
class StateHashes:
    """The hashes of a state's tensors."""

    parameters: str
    vectors: str

    def of_state(self, metadata: layout.Metadata) -> str:
        """Returns the hash of the state of which this is the metadata.

        The guard's rollbacks are left out: a run takes them from its ledger.
        """
        guard = metadata.guard and {**metadata.guard}
        if guard:
            del guard["rollbacks"]
        fields = {
            "parameters": self.parameters,
            "vectors": self.vectors,
            "guard": guard,
            "step": metadata.step,
            "tokens_seen": metadata.tokens_seen,
        }
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


class VectorsHash:
    """Takes a state's vectors one by one, in the order of their names.

    `words` is a checksum of what it took, the sum of the values' bits as whole numbers of 64 bits:
    it costs next to nothing, and tells what was read back from what was to be written.
    """

    def __init__(self, num_updates: int) -> None:
        self.words = 0
        self._digest = hashlib.sha256(hashed_name(COUNT, torch.int64, [1]))
        self._digest.update(num_updates.to_bytes(8, "little", signed=True))

    def add(self, name: str, dtype: torch.dtype, *, num_values: int, pieces: Pieces) -> None:
        self._digest.update(hashed_name(name, dtype, [num_values]))
        for piece in pieces:
            self._digest.update(piece)
            self.words = (self.words + words_of(piece)) % _WORDS

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def words_of(content: bytes | memoryview) -> int:
    """Returns the sum of the words of 64 bits, of which the last may be cut short."""
    num_words, left = divmod(len(content), 8)
    words = np.frombuffer(content, "<u8", count=num_words)
    last = bytes(content[len(content) - left :])
    return (int(words.sum(dtype=np.uint64)) + int.from_bytes(last, "little")) % _WORDS


def words_in(vectors: Iterable[Tensor]) -> int:
    """Returns the sum of the words of tensors on the CPU, as `VectorsHash` finds it."""
    total = 0
    for vector in vectors:
        for piece in vector.view(-1).split(_PIECE_VALUES):
            total += words_of(piece.view(torch.uint8).numpy().data)
    return total % _WORDS


@dataclass(frozen=True)
class StoredState:
    """What was read of a stored state."""

    hashes: StateHashes
    words: int  # of its vectors
    num_updates: int


def read_state(stored: StoredTensors, shapes: Mapping[str, Sequence[int]]) -> StoredState:
    """Reads all values of a state whose weights have these shapes, a part at a time. Raises
    `CheckpointError` where some are missing."""
    [count] = stored.contents(COUNT, num_values=1)
    num_updates = int.from_bytes(count, "little", signed=True)
    vectors = VectorsHash(num_updates)
    for name in stored.names:
        if name not in shapes and name != COUNT:
            num_values = stored.num_values(name)
            pieces = stored.contents(name, num_values=num_values)
            vectors.add(name, stored.dtype(name), num_values=num_values, pieces=pieces)
    hashes = StateHashes(stored.parameter_hash(shapes), vectors.hexdigest())
    return StoredState(hashes, vectors.words, num_updates)


def state_in(folder: Path) -> StoredState:
    """Reads the state in a checkpoint's folder, as `read_state` does."""
    files = layout.state_files(layout.manifest_files(folder), place=str(folder))
    return read_state(stored_in(folder, files), parameter_shapes(read_shape(folder)))

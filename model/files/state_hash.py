"""Hashes a training's whole state, so that one line of a ledger binds all of it.

    parameters   the parameter hash of the weights
    vectors      the number of updates, and behind it the update rule's vectors by name: each adds
                 `name \\0 dtype \\0 n \\0` and then its n values, as in the parameter hash
    state        both, the guard's memory, the step and the tokens seen, as canonical JSON

None of the three depends on how the state is divided among workers.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.files import checkpoint_folder as layout
from model.files.hf_config import read_shape
from model.files.tensor_contents import TensorContents, contents_in
from model.shapes import parameter_shapes
from raymill.files.safetensors_file import hashed_name

COUNT = "step"
"""The tensor of a training state with the number of updates."""

Pieces = Iterable[bytes | memoryview]

WORDS = 1 << 64
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
    """Takes a state's vectors one by one, in the order of their names."""

    def __init__(self, num_updates: int) -> None:
        self._digest = hashlib.sha256(hashed_name(COUNT, torch.int64, [1]))
        self._digest.update(num_updates.to_bytes(8, "little", signed=True))

    def add(self, name: str, dtype: torch.dtype, *, num_values: int, pieces: Pieces) -> None:
        self._digest.update(hashed_name(name, dtype, [num_values]))
        for piece in pieces:
            self._digest.update(piece)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def words_of(content: bytes | memoryview) -> int:
    """Returns the sum of the words of 64 bits, of which the last may be cut short.

    It costs next to nothing, and any flipped bit changes it: the same sum where a state is copied,
    written, read back and restored tells that all of them had the same bits.
    """
    num_words, left = divmod(len(content), 8)
    words = np.frombuffer(content, "<u8", count=num_words)
    last = bytes(content[len(content) - left :])
    return (int(words.sum(dtype=np.uint64)) + int.from_bytes(last, "little")) % WORDS


def words_in(tensors: Iterable[Tensor]) -> int:
    """Returns the sum of the words of tensors on their device, each of which begins with a word."""
    total = 0
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        if flat.device.type == "cpu":
            for piece in flat.split(_PIECE_VALUES):
                total += words_of(piece.view(torch.uint8).numpy().data)
        else:
            content = flat.view(torch.uint8)
            end = len(content) // 8 * 8
            total += int(content[:end].view(torch.int64).sum())  # modulo 2^64
            total += words_of(content[end:].cpu().numpy().data)
    return total % WORDS


@dataclass(frozen=True)
class StoredState:
    """Hashes and counts of a stored state."""

    hashes: StateHashes
    words: int  # of all its values, but the number of updates
    num_updates: int


def read_state(stored: TensorContents, shapes: Mapping[str, Sequence[int]]) -> StoredState:
    """Reads all values of a state whose weights have these shapes, a part at a time. Raises
    `CheckpointError` where some are missing."""
    [count] = stored.contents(COUNT, num_values=1)
    num_updates = int.from_bytes(count, "little", signed=True)
    vectors, words = VectorsHash(num_updates), _Words()
    for name in stored.names:
        if name not in shapes and name != COUNT:
            num_values = stored.num_values(name)
            pieces = words.counted(stored.contents(name, num_values=num_values))
            vectors.add(name, stored.dtype(name), num_values=num_values, pieces=pieces)
    parameters = stored.parameter_hash(shapes, seen=words.counted)
    return StoredState(StateHashes(parameters, vectors.hexdigest()), words.total, num_updates)


class _Words:
    """Adds up the words of pieces as they pass."""

    def __init__(self) -> None:
        self.total = 0

    def counted(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            self.total = (self.total + words_of(piece)) % WORDS
            yield piece


def state_in(folder: Path) -> StoredState:
    """Reads the state in a checkpoint's folder, as `read_state` does."""
    files = layout.state_files(layout.manifest_files(folder), place=str(folder))
    return read_state(contents_in(folder, files), parameter_shapes(read_shape(folder)))

"""Values of stored tensors: the same ones however they are cut and wherever they begin, in few and
small reads."""

import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import raymill.files.stored_tensors
from raymill.errors import CheckpointError
from raymill.files.safetensors_file import safetensors_pieces
from raymill.files.stored_tensors import StoredTensors, stretch_name

TENSORS = {
    "wide": torch.randn(40, 25, generator=torch.Generator().manual_seed(0)),
    "wide.bias": torch.arange(333, dtype=torch.int64),
    "half": torch.randn(7, 11, 5, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "one": torch.tensor(7, dtype=torch.int64),
}


class Files:
    """Safetensors in memory, and the reads of them."""

    def __init__(self, *files: dict[str, Tensor]) -> None:
        self.contents = {
            f"{n}": b"".join(safetensors_pieces(tensors)) for n, tensors in enumerate(files)
        }
        self.reads: list[range] = []

    def read(self, file: str, start: int, end: int) -> bytes:
        self.reads.append(range(start, end))
        return self.contents[file][start:end]

    @property
    def tensors(self) -> StoredTensors:
        return StoredTensors(self.contents, self.read, source="memory")


def all_values() -> Iterator[tuple[str, range, Tensor]]:
    for name, tensor in TENSORS.items():
        yield name, range(tensor.numel()), torch.empty(tensor.numel(), dtype=tensor.dtype)


def cut(rng: random.Random, num_files: int, *, num_cuts: int = 6) -> Files:
    files: list[dict[str, Tensor]] = [{} for _ in range(num_files)]
    for name, tensor in TENSORS.items():
        values = tensor.reshape(-1)
        cuts = sorted({0, len(values), *(rng.randrange(len(values)) for _ in range(num_cuts))})
        for start, stop in pairwise(cuts):
            rng.choice(files)[stretch_name(name, start)] = values[start:stop]
    return Files(*files)


@pytest.mark.parametrize("seed", range(10))
def test_any_place_has_the_values_of_the_tensor(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(raymill.files.stored_tensors, "READ_BYTES", rng.choice([64, 1000, 1 << 20]))
    files = cut(rng, rng.randint(1, 4)) if seed else Files(TENSORS)
    stored, wanted = files.tensors, []
    for name, tensor in TENSORS.items():
        for _ in range(5):
            start = rng.randrange(tensor.numel())
            place = range(start, rng.randint(start, tensor.numel()))
            wanted.append((name, place, torch.zeros(len(place), dtype=tensor.dtype)))
    files.reads.clear()
    stored.load(wanted)
    for name, place, found in wanted:
        assert torch.equal(found, TENSORS[name].reshape(-1)[place.start : place.stop])
    assert max(map(len, files.reads)) <= raymill.files.stored_tensors.READ_BYTES


def test_neighbors_in_a_file_are_one_read() -> None:
    files = cut(random.Random(1), 1, num_cuts=100)
    stored = files.tensors
    files.reads.clear()
    stored.load(all_values())
    assert len(files.reads) == 1


def test_what_is_not_there_is_an_error_in_words() -> None:
    files = cut(random.Random(2), 2)
    stored = files.tensors
    with pytest.raises(CheckpointError, match="memory has no tensor other"):
        stored.load([("other", range(3), torch.empty(3))])
    with pytest.raises(CheckpointError, match="memory has no values of tensor wide from 1000 on"):
        stored.load([("wide", range(990, 1001), torch.empty(11))])
    halves = {stretch_name("wide", 0): torch.zeros(10), stretch_name("wide", 20): torch.zeros(10)}
    with pytest.raises(CheckpointError, match="memory has no values of tensor wide from 10 on"):
        Files(halves).tensors.load([("wide", range(5, 25), torch.empty(20))])
    files.contents = {name: content[:-1] for name, content in files.contents.items()}
    with pytest.raises(CheckpointError, match="in memory is cut short"):
        stored.load(all_values())

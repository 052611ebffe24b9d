"""Whole stored tensors and the bytes of tensors: the same ones however they are cut."""

import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

import model.files.tensor_contents
from model.files.checkpoint import load_model, stored_parameter_hash
from model.files.checkpoint_folder import read_metadata, verify_checkpoint
from model.files.tensor_contents import TensorContents
from raymill.errors import CheckpointError
from raymill.files.safetensors_file import parameter_hash, safetensors_pieces
from raymill.files.stored_tensors import stretch_name
from tests.checkpoints import into_shards, write_tiny

TENSORS = {
    "wide": torch.randn(40, 25, generator=torch.Generator().manual_seed(0)),
    "half": torch.randn(7, 11, 5, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "one": torch.tensor(7, dtype=torch.int64),
}
SHAPES = {name: tensor.shape for name, tensor in TENSORS.items()}


def in_memory(*files: dict[str, Tensor]) -> TensorContents:
    contents = {f"{n}": b"".join(safetensors_pieces(tensors)) for n, tensors in enumerate(files)}
    return TensorContents(
        contents, lambda file, start, end: contents[file][start:end], source="memory"
    )


def cut(seed: int) -> list[dict[str, Tensor]]:
    rng = random.Random(seed)
    files: list[dict[str, Tensor]] = [{} for _ in range(3)]
    for name, tensor in TENSORS.items():
        values = tensor.reshape(-1)
        cuts = sorted({0, len(values), *(rng.randrange(len(values)) for _ in range(6))})
        for start, stop in pairwise(cuts):
            rng.choice(files)[stretch_name(name, start)] = values[start:stop]
    return files


@pytest.mark.parametrize("seed", range(5))
def test_whole_tensors_and_their_hash_are_the_same_however_they_are_cut(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.files.tensor_contents, "READ_BYTES", 64 if seed else 1 << 20)
    stored = in_memory(*cut(seed))
    assert stored.holds(SHAPES) and not stored.holds(SHAPES | {"wide": (25, 41)})
    whole = stored.whole(SHAPES)
    assert all(torch.equal(whole[name], tensor) for name, tensor in TENSORS.items())
    assert {name: tensor.dtype for name, tensor in whole.items()} == {
        name: tensor.dtype for name, tensor in TENSORS.items()
    }
    assert stored.parameter_hash(SHAPES) == parameter_hash(TENSORS)
    assert in_memory(TENSORS).parameter_hash(SHAPES) == parameter_hash(TENSORS)


def test_contents_that_are_not_all_there_are_an_error_in_words() -> None:
    halves = {stretch_name("wide", 0): torch.zeros(10), stretch_name("wide", 20): torch.zeros(10)}
    stored = in_memory(halves)
    with pytest.raises(CheckpointError, match="memory has no values of tensor wide from 10 on"):
        list(stored.contents("wide", num_values=30))
    with pytest.raises(CheckpointError, match="memory has no values of tensor one from 1 on"):
        list(in_memory(TENSORS).contents("one", num_values=2))


@pytest.mark.parametrize("count", [1, 3])
def test_a_checkpoint_in_shards_is_the_same_one(
    tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.files.tensor_contents, "_HASHED_BYTES", 4000)
    write_tiny(tmp_path)
    before, metadata = load_model(tmp_path).state_dict(), read_metadata(tmp_path)
    assert stored_parameter_hash(tmp_path) == metadata.parameter_hash
    into_shards(tmp_path, count)
    assert verify_checkpoint(tmp_path) == []
    after = load_model(tmp_path).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert stored_parameter_hash(tmp_path) == parameter_hash(after) == metadata.parameter_hash

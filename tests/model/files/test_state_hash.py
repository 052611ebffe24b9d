"""The hash of a whole state: of a checkpoint as it is stored, in any shards, and of each part of it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.config import GPTConfig, preset_fields
from model.files.checkpoint_folder import (
    TRAIN_STATE,
    WEIGHTS,
    fingerprint,
    manifest_files,
    read_metadata,
)
from model.files.state_hash import COUNT, StateHashes, VectorsHash, state_in, words_in, words_of
from model.files.tensor_contents import contents_in
from model.gpt import GPT
from model.text.tokenizer import train_bpe
from raymill.errors import CheckpointError
from tests.checkpoints import into_shards, metadata_of, save_model

GUARD = {"last_applied": 4, "skipped_in_a_row": 0, "losses": [2.5], "rollbacks": [[1, 2]]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with AdamW's vectors."""
    torch.manual_seed(3)
    tokenizer = train_bpe(["to be or not to be"], vocab_size=257)
    model = GPT(GPTConfig(**preset_fields({"preset": "tiny", "n_layer": 1, "vocab_size": 257})))
    model.init_weights(1)
    state = {COUNT: torch.tensor(4)}
    for vector in ("exp_avg", "exp_avg_sq"):
        for name, weights in model.named_parameters():
            state[f"{vector}.{name}"] = torch.rand_like(weights)
    metadata = replace(metadata_of(4), guard=GUARD)
    saved = tmp_path / "step-000000004"
    save_model(saved, model=model, tokenizer=tokenizer, metadata=metadata, train_state=state)
    return saved


def test_a_stored_state_has_the_hash_and_the_words_that_it_had_in_memory(folder: Path) -> None:
    tensors = load_file(folder / TRAIN_STATE)
    vectors = VectorsHash(int(tensors.pop(COUNT)))
    for name in sorted(tensors):
        content = tensors[name].reshape(-1).view(torch.uint8).numpy().data
        vectors.add(name, torch.float32, num_values=tensors[name].numel(), pieces=[content])
    state = state_in(folder)
    assert state.hashes == StateHashes(
        str(read_metadata(folder).parameter_hash), vectors.hexdigest()
    )
    weights = load_file(folder / WEIGHTS)
    assert state.words == words_in([*tensors.values(), *weights.values()])


@pytest.mark.parametrize("count", [1, 3])
def test_shards_cut_anywhere_change_no_hash(folder: Path, tmp_path: Path, count: int) -> None:
    shutil.copytree(folder, tmp_path / "sharded")
    into_shards(tmp_path / "sharded", count)
    assert state_in(tmp_path / "sharded").hashes == state_in(folder).hashes


def test_the_hash_has_what_a_resume_needs_and_not_what_the_ledger_has(folder: Path) -> None:
    hashes, metadata = state_in(folder).hashes, read_metadata(folder)
    known = {hashes.of_state(metadata)}
    for changed in (
        replace(metadata, step=5),
        replace(metadata, tokens_seen=metadata.tokens_seen + 1),
        replace(metadata, guard=GUARD | {"skipped_in_a_row": 1}),
        replace(metadata, guard=GUARD | {"losses": [2.25]}),
        replace(metadata, guard=None),
    ):
        known.add(hashes.of_state(changed))
    known |= {replace(hashes, vectors="0" * 64).of_state(metadata)}
    assert len(known) == 7
    for same in (
        replace(metadata, guard=GUARD | {"rollbacks": []}),
        replace(metadata, val_loss=1.0, generation=7, code_version="other"),
    ):
        assert hashes.of_state(same) in known


@pytest.mark.parametrize("num_bytes", [0, 3, 8, 8000, 8004])
def test_a_flipped_bit_changes_the_words(num_bytes: int) -> None:
    content = bytearray(range(256)) * 32
    content = content[:num_bytes]
    before = words_of(bytes(content))
    assert before == sum(
        int.from_bytes(content[start : start + 8], "little") for start in range(0, num_bytes, 8)
    ) % (1 << 64)
    for place in {0, num_bytes // 2, num_bytes - 1} if num_bytes else ():
        content[place] ^= 16
        assert words_of(bytes(content)) != before
        content[place] ^= 16


def test_a_state_that_is_not_whole_is_named(folder: Path) -> None:
    assert TRAIN_STATE in manifest_files(folder)
    with pytest.raises(CheckpointError, match="has no tensor step"):
        stored = contents_in(folder, ["model.safetensors"])
        [*stored.contents(COUNT, num_values=1)]
    stored = contents_in(folder, [TRAIN_STATE])
    with pytest.raises(CheckpointError, match="has no values of tensor step from 1 on"):
        [*stored.contents(COUNT, num_values=2)]
    path = folder / TRAIN_STATE
    for damaged in (b"\xff" * 8, b"\x10" + bytes(7) + b"no JSON here     "):
        content = path.read_bytes()
        path.write_bytes(damaged + content[len(damaged) :])
        assert fingerprint(path)["size"] == len(content)
        with pytest.raises(CheckpointError, match=r"header of (safetensors|train_state)"):
            state_in(folder)
        path.write_bytes(content)

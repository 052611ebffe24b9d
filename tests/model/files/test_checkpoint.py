"""A checkpoint is whole or absent, and a damaged one names the wrong file."""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.files.checkpoint import load_model
from model.files.checkpoint_folder import Metadata, read_metadata, verify_checkpoint
from model.files.stored_tokenizer import load_tokenizer
from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from raymill.errors import CheckpointError
from raymill.files.safetensors_file import parameter_hash
from tests.checkpoints import into_shards, save_model
from tests.model.small_models import small_model

METADATA = Metadata(
    run_id="run-1",
    step=7,
    tokens_seen=448,
    data_manifest_hash="ab" * 32,
    code_version="0.1.0",
    val_loss=1.5,
)
LAST, ENTRY = "model-shard-00002-of-00002.safetensors", {"size": 1, "sha256": "0"}
TRAIN_STATE = {"exp_avg.transformer.wte.weight": torch.arange(6.0), "step": torch.tensor(7.0)}


def write(folder: Path, model: GPT, tokenizer: Tokenizer, *, step: int = 7) -> Metadata:
    metadata = replace(METADATA, step=step)
    return save_model(
        folder,
        model=model,
        tokenizer=tokenizer,
        metadata=metadata,
        train_state=TRAIN_STATE,
    )


@pytest.fixture
def checkpoint(tmp_path: Path, model: GPT, tokenizer: Tokenizer) -> Path:
    write(tmp_path / "step-7", model, tokenizer)
    return tmp_path / "step-7"


def test_metadata_of_a_newer_raymill_is_read_as_far_as_it_is_known(checkpoint: Path) -> None:
    path = checkpoint / "raymill.json"
    fields = json.loads(path.read_bytes())
    path.write_text(json.dumps(fields | {"optimizer": "a later one", "code_version": "9.0"}))
    expected = replace(Metadata(**fields), code_version="9.0")
    assert read_metadata(checkpoint) == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"run_id": "r", "code_version": "9.0", "steps": 3},
            "written by raymill 9.0, lacks step, tokens_seen, data_man",
        ),
        ([], "lacks run_id, step"),
        (None, "lacks run_id, step"),
    ],
    ids=str,
)
def test_metadata_without_what_it_must_have_is_named(
    checkpoint: Path, content: object, words: str
) -> None:
    (checkpoint / "raymill.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"raymill.json in {checkpoint}") as refused:
        read_metadata(checkpoint)
    assert words in str(refused.value)
    assert "use another checkpoint" in str(refused.value)


def test_everything_comes_back_with_the_same_bits(
    checkpoint: Path, model: GPT, tokenizer: Tokenizer
) -> None:
    assert verify_checkpoint(checkpoint) == []
    loaded = load_model(checkpoint)
    assert loaded.config == model.config
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert parameter_hash(loaded.state_dict()) == parameter_hash(model.state_dict())
    assert read_metadata(checkpoint) == replace(
        METADATA, parameter_hash=parameter_hash(model.state_dict())
    )
    train_state = load_file(checkpoint / "train_state.safetensors")
    assert all(torch.equal(train_state[name], tensor) for name, tensor in TRAIN_STATE.items())
    read = load_tokenizer(checkpoint)
    assert read is not None
    assert (
        read.hash
        == tokenizer.hash
        == hashlib.sha256((checkpoint / "tokenizer.json").read_bytes()).hexdigest()
    )
    assert load_model(checkpoint, dtype=torch.bfloat16).head_weight.dtype == torch.bfloat16


def test_parameter_hash_is_the_documented_encoding() -> None:
    state = {
        "b": torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T,  # not contiguous: the order is row-major
        "a": torch.tensor(1.0, dtype=torch.bfloat16),
    }
    encoding = (
        b"a\0bfloat16\0\0" + b"\x80\x3f" + b"b\0float32\x002,2\0" + struct.pack("<4f", 1, 3, 2, 4)
    )
    assert parameter_hash(state) == hashlib.sha256(encoding).hexdigest()


def test_parameter_hash_sees_name_dtype_shape_and_each_bit() -> None:
    base = {"w": torch.zeros(2, 3)}
    flipped = torch.zeros(2, 3)
    flipped[1, 2] = -0.0
    others = [
        {"v": base["w"]},
        {"w": torch.zeros(3, 2)},
        {"w": torch.zeros(2, 3, dtype=torch.int32)},
        {"w": flipped},
    ]
    assert len({parameter_hash(state) for state in [base, *others]}) == 5


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_any_altered_torn_or_missing_file_is_named(
    checkpoint: Path,
    damage: Callable[[Path], None],
    is_sharded: bool,
    model: GPT,
    tokenizer: Tokenizer,
) -> None:
    if is_sharded:
        into_shards(checkpoint, 3)
    for name in sorted(path.name for path in checkpoint.iterdir()):
        write(checkpoint, model, tokenizer)
        if is_sharded:
            into_shards(checkpoint, 3)
        damage(checkpoint / name)
        problems = verify_checkpoint(checkpoint)
        assert any(name in problem for problem in problems), (name, problems)
        if name.startswith("train_state") and damage is Path.unlink:  # a replica's copy has none
            assert (
                parameter_hash(load_model(checkpoint).state_dict())
                == read_metadata(checkpoint).parameter_hash
            )
            continue
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            load_model(checkpoint)


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (
            {"format_version": 3, "files": {}},
            "format_version 3, this version of raymill reads 1 and 2",
        ),
        (
            {"format_version": 2, "files": {LAST: ENTRY}},
            "does not list model-shard-00001-of-00002.safetensors",
        ),
        (
            {"format_version": 1, "files": {"../x": {"size": 1, "sha256": "0"}}},
            "manifest.json is altered",
        ),
        ({"format_version": 1, "files": {}}, "does not list model.safetensors"),
        ({"format_version": 1, "files": 3}, "manifest.json is altered"),
        ([], "manifest.json is altered"),
    ],
)
def test_a_manifest_that_does_not_vouch_for_the_folder_is_refused(
    checkpoint: Path, manifest: object, said: str
) -> None:
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert any(said in problem for problem in verify_checkpoint(checkpoint))


def test_a_missing_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_model(tmp_path / "nowhere")


def crash_at(folder: Path, point: int, model: GPT, tokenizer: Tokenizer) -> bool:
    """Writes step 8 in a child process that dies before its `point`-th write, sync or rename; tells
    whether it died."""
    child = os.fork()
    if child == 0:
        calls = iter(range(1000))

        def dying(function: Callable) -> Callable:
            def call(*args: object, **kwargs: object) -> object:
                if next(calls) == point:
                    os._exit(137)
                return function(*args, **kwargs)

            return call

        for owner, name in ((Path, "open"), (Path, "rename"), (os, "fsync")):
            setattr(owner, name, dying(getattr(owner, name)))
        write(folder, model, tokenizer, step=8)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 137


@pytest.mark.more
def test_a_crash_anywhere_while_writing_leaves_nothing_or_a_whole_checkpoint(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    old, new, folder = small_model(1, n_layer=1), small_model(2, n_layer=1), tmp_path / "step-8"
    num_points = 0
    while crash_at(folder, num_points, new, tokenizer):
        if folder.exists():
            assert verify_checkpoint(folder) == []
            shutil.rmtree(folder)
        num_points += 1
    assert num_points >= 12
    assert load_model(folder).head_weight.equal(new.head_weight)
    # What the crashes left was cleared away
    assert [path.name for path in tmp_path.iterdir()] == ["step-8"]
    # Replacing has one more moment, between its two renames, when the folder is absent: never is it
    # torn.
    absent = 0
    for point in range(num_points + 1):
        write(folder, old, tokenizer, step=8)
        assert crash_at(folder, point, new, tokenizer)
        absent += not folder.exists()
        assert not folder.exists() or verify_checkpoint(folder) == []
    assert absent == 1

"""Parameters of a folder, one at a time: those of the loaded model, whatever files they are in."""

from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from model.files.checkpoint import load_decoder, write_checkpoint
from model.files.checkpoint_folder import Metadata
from model.files.hf_config import UnsupportedModelError
from model.files.saved_parameters import SavedParameters, saved_parameters
from model.files.stored_tokenizer import load_tokenizer
from model.foreign_config import ForeignModelError
from raymill.files.safetensors_file import parameter_hash
from tests.checkpoints import into_shards, write_tiny
from tests.foreign_models import small


def saved(folder: Path, family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Returns a folder with a random model of a family that transformers saved."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(small(family).hf, dtype=dtype)
    model.save_pretrained(folder, **options)
    return folder


def check_parameters(folder: Path) -> None:
    found = saved_parameters(folder)
    assert isinstance(found, SavedParameters)
    expected = dict(load_decoder(folder, verify=False).named_parameters())
    assert [*found] == [*expected]
    for name, values in found.items():
        assert values.dtype == torch.float32
        assert torch.equal(values, expected[name]), name
    assert parameter_hash(found) == parameter_hash(expected)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "bloom"])
def test_parameters__of_a_folder_of_transformers__are_those_of_the_model(
    family: str, tmp_path: Path
) -> None:
    check_parameters(saved(tmp_path, family))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters__in_several_files_of_another_type__are_those_of_the_model(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = saved(tmp_path, "qwen3", dtype, max_shard_size="40KB")
    assert len([*folder.glob("model-*.safetensors")]) > 2
    check_parameters(folder)


@pytest.mark.parametrize("num_shards", [0, 3])
def test_parameters__of_a_checkpoint_of_our_own__are_those_of_the_model(
    num_shards: int, tmp_path: Path
) -> None:
    folder = tmp_path / "whole"
    write_tiny(folder)
    if num_shards:
        into_shards(folder, num_shards)
    check_parameters(folder)


def test_parameters__with_names_that_the_module_has_not__are_loaded_at_once(
    tmp_path: Path,
) -> None:
    """transformers saves each expert by itself."""
    folder = saved(tmp_path, "qwen3_moe")
    assert "model.layers.0.mlp.experts.gate_up_proj" not in load_file(folder / "model.safetensors")
    found = saved_parameters(folder)
    assert not isinstance(found, SavedParameters)
    assert found.keys() == small("qwen3_moe").parameter_shapes.keys()


def test_parameters__of_another_shape__are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "qwen3")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].T.contiguous()}, folder / "model.safetensors")
    with pytest.raises(ForeignModelError, match="mismatched"):
        saved_parameters(folder)


def test_parameters__in_a_file_that_is_cut_short__are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "qwen3")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises((ForeignModelError, UnsupportedModelError)):
        saved_parameters(folder)


def test_a_checkpoint__of_parameters_in_files__has_one_of_them_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    write_tiny(source)
    alive: list[ref[Tensor]] = []
    most_alive = []
    read = SavedParameters.__getitem__

    def watched(self: SavedParameters, name: str) -> Tensor:
        values = read(self, name)
        alive.append(ref(values))
        most_alive.append(sum(one() is not None for one in alive))
        return values

    monkeypatch.setattr(SavedParameters, "__getitem__", watched)
    model = load_decoder(source)
    metadata = write_checkpoint(
        tmp_path / "copy",
        config=model.config,
        state=saved_parameters(source),
        tokenizer=load_tokenizer(source),
        metadata=Metadata(
            run_id="copy", step=0, tokens_seen=0, data_manifest_hash=None, code_version="test"
        ),
        train_state=None,
    )
    assert metadata.parameter_hash == parameter_hash(dict(model.named_parameters()))
    num_parameters = len(dict(model.named_parameters()))
    assert len(most_alive) == 4 * num_parameters, "checked, hashed, described and written"
    assert max(most_alive) <= 2, "the one before lives until the next is there"

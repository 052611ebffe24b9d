"""The export is a valid checkpoint that transformers reads, with the source's weights and without
training state."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.storage.uris import open_storage
from jobs.export import export, export_gguf
from model.config import GPTConfig
from model.files.bounded_text import TextError
from model.files.checkpoint import load_model
from model.files.checkpoint_folder import TRAIN_STATE, Metadata, read_metadata, verify_checkpoint
from model.files.stored_tokenizer import load_tokenizer
from model.gpt import GPT
from model.text.tokenizer import train_bpe
from raymill.errors import CheckpointError
from tests.checkpoints import save_model
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

TEXT = "the quick brown fox jumps over the lazy dog, and over the fence"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tokenizer = train_bpe([TEXT] * 3, vocab_size=280)
    model = GPT(GPTConfig(tokenizer.vocab_size, n_positions=32, n_layer=2, n_head=2, n_embd=16))
    model.init_weights(7)
    metadata = Metadata(
        run_id="run",
        step=3,
        tokens_seen=96,
        data_manifest_hash="data",
        code_version="code",
        val_loss=2.5,
    )
    folder = tmp_path / "source"
    save_model(
        folder,
        model=model,
        tokenizer=tokenizer,
        metadata=metadata,
        train_state={"moment": torch.ones(1000)},
    )
    return folder


def test_a_template_that_does_not_end_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (checkpoint / "chat_template.jinja").write_text(loop)
    with pytest.raises(TextError, match="3 s of processor time"):
        export(str(checkpoint), str(tmp_path / "export"), storage_uri=str(tmp_path))
    assert not (tmp_path / "export").exists()


def test_transformers_computes_the_same_from_the_export(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "export"
    result = export(str(checkpoint), str(target), storage_uri=str(tmp_path))
    assert verify_checkpoint(target) == []
    assert result["checkpoint"] == str(target)
    assert result["parameter_hash"] == read_metadata(checkpoint).parameter_hash
    assert result["files"] == {path.name: path.stat().st_size for path in target.iterdir()}
    assert result["files"].keys() == {path.name for path in checkpoint.iterdir()} - {TRAIN_STATE}
    assert read_metadata(target) == read_metadata(checkpoint)

    tokenizer, ours = AutoTokenizer.from_pretrained(target), load_tokenizer(checkpoint)
    assert ours is not None
    ids = tokenizer(TEXT)["input_ids"]
    assert ids == ours.encode(TEXT)
    model = load_model(checkpoint)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(target)(torch.tensor([ids])).logits
        expected = model.logits(model(torch.tensor([ids])))
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=0)


def test_an_export_to_s3_arrives_whole(checkpoint: Path, tmp_path: Path, s3_bucket: str) -> None:
    uri = f"s3://{s3_bucket}/models/small"
    result = export(str(checkpoint), uri, storage_uri=str(tmp_path))
    assert result["checkpoint"] == uri
    open_storage(uri).download_folder("", tmp_path / "back")
    assert verify_checkpoint(tmp_path / "back") == []
    with pytest.raises(CheckpointError, match="is not empty"):
        export(str(checkpoint), uri, storage_uri=str(tmp_path))


def test_it_overwrites_nothing_and_takes_no_damaged_checkpoint(
    checkpoint: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    for occupied in (target, target / "thesis.txt"):
        with pytest.raises(CheckpointError, match="exists and is not empty; name a new folder"):
            export(str(checkpoint), str(occupied), storage_uri=str(tmp_path))
    assert (target / "thesis.txt").read_text() == "mine"

    weights = bytearray((checkpoint / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (checkpoint / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is altered"):
        export(str(checkpoint), str(tmp_path / "new"), storage_uri=str(tmp_path))
    assert not (tmp_path / "new").exists()


@pytest.mark.more
def test_the_command_prints_one_result_or_one_line_of_error(
    checkpoint: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "cluster.cli", "export", str(checkpoint), "export", "--json"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    first, second = (
        subprocess.run(
            command,
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=limit_s(60),
            check=False,
        )
        for _ in range(2)
    )
    result = json.loads(first.stdout.splitlines()[-1])
    assert first.returncode == 0
    assert result["checkpoint"] == str(tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["model_type"] == "gpt2"
    said = first.stderr.splitlines()[-1]
    assert said.startswith("next: in Python, import transformers; ")
    exec(said.partition(", ")[2], {})
    assert second.returncode == 1
    assert (
        second.stderr.splitlines()[-1]
        == f"error: {tmp_path}/export exists and is not empty; name a new folder"
    )


def test_an_export_as_gguf_is_one_file_with_the_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.gguf"
    result = export_gguf(str(checkpoint), str(target), storage_uri=str(tmp_path))
    assert result["file"] == str(target)
    assert result["bytes"] == target.stat().st_size
    assert result["sha256"] == hashlib.sha256(target.read_bytes()).hexdigest()
    assert result["parameter_hash"] == read_metadata(checkpoint).parameter_hash
    tokenizer, ours = (
        AutoTokenizer.from_pretrained(tmp_path, gguf_file=target.name),
        load_tokenizer(checkpoint),
    )
    assert ours is not None
    assert tokenizer(TEXT)["input_ids"] == ours.encode(TEXT)
    with pytest.raises(CheckpointError, match="exists; name a new file"):
        export_gguf(str(checkpoint), str(target), storage_uri=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"ends in \.gguf"):
        export_gguf(str(checkpoint), str(tmp_path / "model"), storage_uri=str(tmp_path))

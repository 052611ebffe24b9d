"""A checkpoint on the Hugging Face Hub: uploaded in one commit with its card, read back with the
same weights, and errors that say what to do."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM

from cluster import cli
from cluster.storage.registry import find_checkpoint
from model.files.checkpoint import load_decoder
from model.files.checkpoint_folder import TRAIN_STATE, read_metadata
from raymill.files.safetensors_file import parameter_hash
from tests.checkpoints import write_tiny
from tests.cluster.writable_hub import READER, WRITER, WritableHub, running_writable_hub

PLACE = "hf://owner/texts"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    with running_writable_hub() as stub:
        monkeypatch.setenv("HF_ENDPOINT", stub.url)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # The stub has no Xet; large files go by git's protocol
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield stub


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "step-1")
    return tmp_path / "step-1"


def push(checkpoint: Path, *words: str, place: str = PLACE) -> int:
    storage = ["--storage.uri", str(checkpoint.parent)]
    return cli.main(["push", str(checkpoint), place, *words, *storage, "--json"])


def test_push__uploads_a_checkpoint_that_is_read_back_with_the_same_weights(
    hub: WritableHub, checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert push(checkpoint, "--license", "apache-2.0") == 0
    said = json.loads(capsys.readouterr().out)
    assert len(hub.commits) == 1, "one commit, so that no reader sees a part"
    assert said["commit"] == hub.branches["main"]
    assert {name: len(content) for name, content in hub.files.items()} == said["files"]
    assert TRAIN_STATE not in hub.files
    assert hub.verified == hub.blobs.keys() and hub.verified

    uri, folder = find_checkpoint(PLACE, str(tmp_path))
    assert uri == said["repository"]
    expected = read_metadata(checkpoint).parameter_hash
    assert parameter_hash(dict(load_decoder(folder).named_parameters())) == expected
    assert said["parameter_hash"] == expected
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.config.architectures and not any(
        torch.isnan(parameter).any() for parameter in theirs.parameters()
    )

    card = ModelCard(hub.files["README.md"].decode())
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    assert f"`{expected}`" in card.text


def test_push__of_what_is_there_already__uploads_no_large_file_again(
    hub: WritableHub, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(checkpoint) == 0
    hub.verified.clear()
    assert push(checkpoint, "--license", "mit") == 0
    assert not hub.verified
    assert b"license: mit" in hub.files["README.md"]


def test_card__is_printed_and_nothing_is_asked_of_the_hub(
    hub: WritableHub, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(checkpoint, "--card") == 0
    card = json.loads(capsys.readouterr().out)["card"]
    assert hub.asked == []
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "unknown" and "not known" in card
    metadata = read_metadata(checkpoint)
    for value in (metadata.run_id, metadata.parameter_hash, metadata.code_version):
        assert str(value) in card


def test_push__to_no_repository__creates_a_private_one_only_if_asked(
    hub: WritableHub, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.exists = False
    assert push(checkpoint) == 1
    error = capsys.readouterr().err
    assert "no such repository" in error and "--create makes a private one" in error
    assert push(checkpoint, "--create") == 0
    assert hub.is_private and "model.safetensors" in hub.files


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (READER, r"access denied \(403\)"),
        ("hf_wrong", r"access denied \(401\)|no such repository"),
    ],
)
def test_push__with_a_token_that_may_not_write__says_so(
    token: str,
    message: str,
    hub: WritableHub,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    assert push(checkpoint) == 1
    error = capfd.readouterr().err
    assert "Traceback" not in error and not hub.commits
    assert re.search(message, error), error


def test_push__without_a_token__says_how_to_get_one(
    hub: WritableHub,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    assert push(checkpoint) == 1
    assert "set HF_TOKEN" in capsys.readouterr().err
    assert hub.asked == []


def test_push__where_an_upload_is_lost__commits_nothing(
    hub: WritableHub, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.loses_uploads = True
    assert push(checkpoint) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error and not hub.commits
    assert "hf://owner/texts" in error and "nothing was committed" in error


def test_push__without_a_network__names_the_host(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert push(checkpoint) == 1
    assert "127.0.0.1:9 cannot be reached" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["owner/texts", "hf://datasets/owner/texts", f"{PLACE}/folder"])
def test_push__to_what_is_no_models_repository__is_refused(
    place: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(checkpoint, place=place) == 1
    assert "expected a model's repository on the Hub" in capsys.readouterr().err

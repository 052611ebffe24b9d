"""The copies of remote checkpoints: bounded, whole, without the training state, and never taken
from who needs them."""

import os
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.storage import checkpoint_cache
from cluster.storage.checkpoint_cache import MAX_COPIES, Holds, fetch
from cluster.storage.registry import resolve_checkpoint
from cluster.storage.s3 import S3Storage
from cluster.storage.uris import NotFoundError, Storage, open_storage
from model.files.checkpoint import load_model
from model.files.checkpoint_folder import MANIFEST, TRAIN_STATE, verify_checkpoint
from raymill.errors import CheckpointError
from tests.checkpoints import damage, write_tiny
from tests.repository import REPOSITORY

HOLD = """
import sys
from cluster.storage.checkpoint_cache import Holds
Holds().keep(sys.argv[1:])
held = Holds()
held.keep(sys.argv[1:])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def run(s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A run's checkpoints on S3; copies go to a home folder of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return open_storage(f"s3://{s3_bucket}/runs/r/checkpoints")


def upload(run: Storage, tmp_path: Path, *steps: int) -> list[Storage]:
    for step in steps:
        folder = tmp_path / f"step-{step}"
        write_tiny(folder, step=step)
        run.upload_folder(folder, folder.name, last=MANIFEST)
    return [run.child(f"step-{step}") for step in steps]


def kept() -> set[str]:
    folder = Path.home() / ".cache" / "raymill" / "checkpoints"
    return {path.name.rpartition("--")[0].rpartition("--")[2] for path in folder.iterdir()}


def test_what_was_used_least_recently_makes_room(run: Storage, tmp_path: Path) -> None:
    checkpoints = upload(run, tmp_path, *range(MAX_COPIES + 2))
    copies = [fetch(checkpoint) for checkpoint in checkpoints[:MAX_COPIES]]
    assert fetch(checkpoints[0]) == copies[0], "used again"
    for checkpoint in checkpoints[MAX_COPIES:]:
        fetch(checkpoint)
    assert kept() == {f"step-{step}" for step in (0, *range(3, MAX_COPIES + 2))}


def test_the_bound_is_one_of_bytes_too(
    run: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = upload(run, tmp_path, 1, 2, 3)
    size = sum(path.stat().st_size for path in fetch(checkpoints[0]).iterdir())
    monkeypatch.setattr(checkpoint_cache, "MAX_BYTES", 2 * size + size // 2)
    for checkpoint in checkpoints:
        fetch(checkpoint)
    assert kept() == {"step-2", "step-3"}


@pytest.mark.more
def test_what_a_process_holds_stays_until_the_process_ends(run: Storage, tmp_path: Path) -> None:
    checkpoints = upload(run, tmp_path, *range(3 * MAX_COPIES))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, "-c", HOLD, checkpoints[0].uri, checkpoints[1].uri]
    holder = subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    for checkpoint in checkpoints[: 2 * MAX_COPIES]:
        fetch(checkpoint)
    assert {"step-0", "step-1"} < kept() and len(kept()) == MAX_COPIES
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    for checkpoint in checkpoints[2 * MAX_COPIES :]:
        fetch(checkpoint)
    assert not kept() & {"step-0", "step-1"} and len(kept()) == MAX_COPIES


def test_a_replica_lets_go_of_what_its_delivery_has_forgotten(run: Storage, tmp_path: Path) -> None:
    checkpoints = upload(run, tmp_path, *range(2 * MAX_COPIES))
    holds = Holds()
    holds.keep([checkpoints[0].uri, checkpoints[1].uri, str(tmp_path)])
    for checkpoint in checkpoints[:MAX_COPIES]:
        fetch(checkpoint)
    holds.keep([checkpoints[1].uri])
    for checkpoint in checkpoints[MAX_COPIES:]:
        fetch(checkpoint)
    assert "step-1" in kept() and "step-0" not in kept() and len(kept()) == MAX_COPIES


def test_replicas_that_start_together_fetch_once_and_see_whole_copies(
    run: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = upload(run, tmp_path, 1, 2)
    downloads: Counter[str] = Counter()
    download = S3Storage.download_file

    def counted(self: S3Storage, key: str, target: Path) -> None:
        downloads[f"{self.uri}/{key}"] += 1
        download(self, key, target)

    monkeypatch.setattr(S3Storage, "download_file", counted)
    with ThreadPoolExecutor(8) as threads:
        folders = list(
            threads.map(lambda i: resolve_checkpoint(checkpoints[i % 2].uri, run.uri), range(16))
        )
    assert len(set(folders)) == 2 and set(downloads.values()) == {1}
    for folder in folders:
        assert not verify_checkpoint(folder, to_train=False)
        assert not (folder / TRAIN_STATE).exists()
        load_model(folder)
    assert any(TRAIN_STATE in problem for problem in verify_checkpoint(folders[0])), (
        "training cannot continue from it"
    )


def test_what_a_killed_process_left_is_no_copy(run: Storage, tmp_path: Path) -> None:
    (checkpoint,) = upload(run, tmp_path, 1)
    copy = fetch(checkpoint)
    (copy / "model.safetensors").unlink()
    partial = Path.home() / ".cache" / "raymill" / "checkpoint-fetch" / "partial"
    partial.mkdir()
    (partial / "config.json").write_text("{")
    assert not verify_checkpoint(fetch(checkpoint), to_train=False)
    assert not partial.exists()


def test_a_damaged_copy_is_fetched_again(run: Storage, tmp_path: Path) -> None:
    (checkpoint,) = upload(run, tmp_path, 1)
    damage(fetch(checkpoint), "model.safetensors", "flip")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is altered"):
        resolve_checkpoint(checkpoint.uri, run.uri)
    assert not verify_checkpoint(resolve_checkpoint(checkpoint.uri, run.uri), to_train=False)


def test_a_folder_of_transformers_is_copied_with_all_that_a_model_needs(run: Storage) -> None:
    needed = [
        "config.json",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    needed += ["model.safetensors.index.json", "vocab.json"]
    for name in [*needed, "pytorch_model.bin", "README.md", "onnx/model.onnx"]:
        run.write_bytes(f"gpt2/{name}", name.encode())
    copy = fetch(run.child("gpt2"))
    assert sorted(path.name for path in copy.iterdir()) == needed
    run.write_bytes("gpt2/config.json", b"another")
    assert (fetch(run.child("gpt2")) / "config.json").read_bytes() == b"another"
    with pytest.raises(NotFoundError, match="no checkpoint"):
        fetch(run.child("onnx"))

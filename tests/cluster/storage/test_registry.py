"""The registry: what is published is found again, damaged checkpoints never are, and numbers are
taken once."""

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.storage.folder import LocalStorage
from cluster.storage.registry import (
    find_checkpoint,
    metadata_of,
    named_checkpoint,
    publications,
    publish,
    resolve_checkpoint,
    served_checkpoints,
    what_latest_became,
)
from cluster.storage.uris import open_storage
from jobs.run.checkpoints import RunCheckpoints
from model.files.checkpoint import load_model as load
from model.files.checkpoint_folder import MANIFEST, TRAIN_STATE
from raymill.errors import CheckpointError
from raymill.files.safetensors_file import parameter_hash
from tests.checkpoints import DAMAGES, damage, write_tiny


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A storage root; copies of remote checkpoints go to a home folder beside it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "root"


def steps(root: Path, *numbers: int) -> list[Path]:
    folders = [root / f"runs/r/checkpoints/step-{number:09d}" for number in numbers]
    for number, folder in zip(numbers, folders, strict=True):
        write_tiny(folder, step=number, run_id="r")
    return folders


def test_the_newest_publication_is_the_latest(root: Path) -> None:
    storage = open_storage(str(root))
    first, second = steps(root, 1, 2)
    assert publications(storage) == []
    published = [publish(storage, str(folder)) for folder in (second, first)]
    assert publications(storage) == published
    assert [(entry.run_id, entry.step, entry.checkpoint) for entry in published] == [
        ("r", 2, str(second)),
        ("r", 1, str(first)),
    ]
    assert resolve_checkpoint("latest", str(root)) == first
    assert parameter_hash(load(first).state_dict()) == published[1].parameter_hash


def test_what_is_published_is_the_checkpoint_that_the_reference_names(root: Path) -> None:
    """A run's folder means its newest checkpoint, and `latest` the newest published one, wherever
    that lies."""
    storage = open_storage(str(root))
    first, second = steps(root, 1, 2)
    assert publish(storage, str(first)).checkpoint == str(first)
    assert publish(storage, "latest").checkpoint == str(first)
    assert publish(storage, str(root / "runs/r")).checkpoint == str(second)
    assert find_checkpoint("latest", str(root)) == (str(second), second)
    assert publish(storage, f"file://{first}").checkpoint == str(first)
    assert find_checkpoint("latest", str(root)) == (str(first), first)


def test_metadata_of_a_newer_raymill_is_read_as_far_as_it_is_known(root: Path) -> None:
    (folder,) = steps(root, 1)
    uri, path = str(folder), folder / "raymill.json"
    known = metadata_of(uri)
    fields = json.loads(path.read_bytes())
    path.write_text(json.dumps(fields | {"optimizer": "a later one"}))
    assert known is not None
    assert metadata_of(uri) == known
    path.write_text("{}")
    with pytest.raises(CheckpointError, match=f"raymill.json in {uri} lacks run_id, step"):
        metadata_of(uri)


def test_other_files_beside_the_publications_are_left_alone(root: Path) -> None:
    storage = open_storage(str(root))
    first, second = steps(root, 1, 2)
    published = [publish(storage, str(first))]
    for name in ("notes.txt", "000001.json.bak", "latest.json", "old/000007.json"):
        storage.write_bytes(f"registry/{name}", b"a note")
    published.append(publish(storage, str(second)))
    assert publications(storage) == published
    assert (root / "registry/000002.json").is_file() and resolve_checkpoint(
        "latest", str(root)
    ) == second


@pytest.mark.parametrize(
    ("val_loss", "data", "is_better"),
    [(3.5, "d", True), (3.5, "e", False), (1.5, "d", False), (None, "d", False)],
)
def test_a_publication_says_what_it_displaces(
    root: Path, val_loss: float | None, data: str, is_better: bool
) -> None:
    storage, big, toy = open_storage(str(root)), root / "big", root / "toy"
    write_tiny(big, step=400, run_id="big", val_loss=2.104)
    write_tiny(toy, step=1060, run_id="toy", val_loss=val_loss, data=data)
    publish(storage, str(big))
    assert (
        what_latest_became(storage) == "latest is now step 400 of run big (validation loss 2.104)"
    )
    publish(storage, str(toy))
    said = what_latest_became(storage)
    assert said.startswith("latest is now step 1,060 of run toy")
    assert "; it was step 400 of run big (validation loss 2.104)" in said
    typed = f"`raymill publish {big} --storage.uri {root}`"
    assert said.endswith(f"{typed} makes it latest again") is is_better
    shutil.rmtree(big)
    assert what_latest_became(storage).endswith("it was step 400 of run big")


def test_a_folder_of_transformers_is_not_published(root: Path) -> None:
    (folder,) = steps(root, 1)
    for name in (MANIFEST, "raymill.json"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"saved by transformers .*raymill serve"):
        publish(open_storage(str(root)), str(folder))
    assert publications(open_storage(str(root))) == []


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_latest_is_named_and_passed_over(
    root: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    storage = open_storage(str(root))
    older, newer = steps(root, 1, 2)
    for folder in (older, newer):
        publish(storage, str(folder))
    damage(newer, "model.safetensors", how)
    with caplog.at_level(logging.WARNING):
        assert resolve_checkpoint("latest", str(root)) == older
    assert str(newer) in caplog.text
    assert "model.safetensors" in caplog.text
    shutil.rmtree(older)
    with pytest.raises(CheckpointError, match="nothing is published"):
        resolve_checkpoint("latest", str(root))


def test_nothing_published_says_what_to_do(root: Path) -> None:
    with pytest.raises(CheckpointError, match=f"nothing is published in {root}: finish a run"):
        resolve_checkpoint("latest", str(root))


def test_only_valid_checkpoints_are_published(root: Path) -> None:
    (folder,) = steps(root, 1)
    damage(folder, "tokenizer.json", "flip")
    with pytest.raises(
        CheckpointError, match=r"step-000000001 is not valid: .*tokenizer\.json is altered"
    ):
        publish(open_storage(str(root)), str(folder))
    with pytest.raises(CheckpointError, match="unknown checkpoint"):
        publish(open_storage(str(root)), str(root / "nowhere"))
    assert publications(open_storage(str(root))) == []


def test_a_checkpoint_is_named_by_its_folder_or_its_run(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = steps(root, 9, 10, 11)
    assert resolve_checkpoint(str(first), str(root)) == first
    assert resolve_checkpoint(f"file://{second}", str(root)) == second
    assert resolve_checkpoint(str(root / "runs/r"), str(root)) == third
    damage(third, "config.json", "flip")
    (second / MANIFEST).unlink()
    with caplog.at_level(logging.WARNING):
        assert resolve_checkpoint(str(root / "runs/r"), str(root)) == first
    assert f"{third} is skipped: config.json is altered" in caplog.text
    with pytest.raises(CheckpointError, match=r"config\.json is altered"):
        resolve_checkpoint(str(third), str(root))
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        resolve_checkpoint(str(second), str(root))


def test_what_is_meant_is_known_before_anything_is_read(root: Path) -> None:
    first, second = steps(root, 1, 2)
    with pytest.raises(CheckpointError, match="nothing is published"):
        named_checkpoint("latest", str(root))
    publish(open_storage(str(root)), str(first))
    damage(first, "model.safetensors", "flip")  # which only reading it would tell
    assert named_checkpoint("latest", str(root)) == str(first)
    assert named_checkpoint(str(root / "runs/r"), str(root)) == str(second)
    (second / MANIFEST).unlink()
    assert named_checkpoint(str(root / "runs/r"), str(root)) == str(first)
    with pytest.raises(CheckpointError, match=r"is not valid: manifest\.json is missing"):
        named_checkpoint(str(second), str(root))
    with pytest.raises(
        CheckpointError,
        match=r"unknown checkpoint r: .*; expected latest, a run's id, run@step, or the path",
    ):
        named_checkpoint("r", str(root))
    shutil.rmtree(first)
    with pytest.raises(CheckpointError, match="nothing is published"):
        named_checkpoint("latest", str(root))


@pytest.mark.parametrize("number", [0, 2])
def test_an_unknown_checkpoint_is_named(root: Path, number: int) -> None:
    steps(root, *range(1, number))
    with pytest.raises(
        CheckpointError, match=f"unknown checkpoint {root}/runs/r/checkpoints/step-7"
    ):
        resolve_checkpoint(f"{root}/runs/r/checkpoints/step-7", str(root))


def test_a_remote_checkpoint_is_copied_here(
    root: Path, s3_bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"s3://{s3_bucket}/some"
    storage = open_storage(uri)
    folders = steps(root, 1, 2)
    names = [f"runs/r/checkpoints/{folder.name}" for folder in folders]
    for folder, name in zip(folders, names, strict=True):
        storage.upload_folder(folder, name, last=MANIFEST)
        publish(storage, f"{uri}/{name}")
    copy = resolve_checkpoint("latest", uri)
    assert copy.is_relative_to(Path.home())
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
        path.name: path.read_bytes() for path in folders[1].iterdir() if path.name != TRAIN_STATE
    }
    assert (
        resolve_checkpoint(f"{uri}/runs/r", uri)
        == resolve_checkpoint(f"{uri}/{names[1]}", uri)
        == copy
    )

    # The folder is replaced by another checkpoint: the copy of the old one is not taken for it.
    storage.upload_folder(folders[0], names[1], last=MANIFEST)
    replaced = resolve_checkpoint(f"{uri}/{names[1]}", uri)
    assert parameter_hash(load(replaced).state_dict()) == publications(storage)[0].parameter_hash

    for entry in storage.list(f"{names[1]}/"):
        storage.delete(entry.key)
    with caplog.at_level(logging.WARNING):
        resolved = resolve_checkpoint("latest", uri)
    assert f"{uri}/{names[1]} is skipped" in caplog.text
    assert parameter_hash(load(resolved).state_dict()) == publications(storage)[0].parameter_hash


@pytest.mark.parametrize("place", ["local", "s3"])
def test_publishers_never_share_a_number(
    root: Path, place: str, request: pytest.FixtureRequest
) -> None:
    (folder,) = steps(root, 1)
    uri = str(root) if place == "local" else f"s3://{request.getfixturevalue('s3_bucket')}"
    storage = open_storage(uri)
    with ThreadPoolExecutor(8) as threads:
        published = list(threads.map(lambda _: publish(storage, str(folder)), range(16)))
    assert [entry.key for entry in storage.list("registry/")] == [
        f"registry/{n:06d}.json" for n in range(1, 17)
    ]
    assert sorted(entry.time for entry in publications(storage)) == sorted(
        entry.time for entry in published
    )


@dataclass(frozen=True)
class RetentionBeforeWrite(LocalStorage):
    """A folder whose run deletes a checkpoint just before a publication is written, as retention
    may."""

    superseded: tuple[str, ...] = ()

    def write_bytes(self, key: str, data: bytes, **conditions: Any) -> str:
        checkpoints = RunCheckpoints(self.child("runs/r"))
        checkpoints.delete(
            name for name in self.superseded if name in checkpoints.names and name in data.decode()
        )
        return super().write_bytes(key, data, **conditions)


def test_publish__takes_the_newest_one_when_retention_deleted_the_verified_one(root: Path) -> None:
    older, newer = steps(root, 1, 2)
    storage = RetentionBeforeWrite(root, superseded=(newer.name,))
    assert publish(storage, str(root / "runs/r")).checkpoint == str(older)
    assert [entry.checkpoint for entry in publications(storage)] == [str(older)]
    assert find_checkpoint("latest", str(root)) == (str(older), older)


def test_publish__refuses_a_checkpoint_that_retention_deleted_meanwhile(root: Path) -> None:
    kept, doomed = steps(root, 1, 2)
    storage = RetentionBeforeWrite(root, superseded=(doomed.name,))
    earlier = publish(storage, str(kept))
    with pytest.raises(
        CheckpointError, match=r"was deleted while it was being published.*checkpoint.num_to_keep"
    ):
        publish(storage, str(doomed))
    assert publications(storage) == [earlier]


def test_what_endpoints_serve_is_known(root: Path) -> None:
    storage = open_storage(str(root))
    assert served_checkpoints(storage) == set()
    for name, uris in (("a", ["/x", "/y"]), ("b", ["/y", "s3://bucket/z"])):
        storage.write_bytes(
            f"endpoints/{name}.json", json.dumps({"pinned": uris, "delivery": {}}).encode()
        )
    assert served_checkpoints(storage) == {"/x", "/y", "s3://bucket/z"}


def test_latest_reads_no_more_publications_than_it_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(str(tmp_path / "mill"))
    write_tiny(tmp_path / "one")
    for _ in range(20):
        publish(storage, str(tmp_path / "one"))
    read: list[str] = []
    read_bytes = LocalStorage.read_bytes

    def counted(self: LocalStorage, key: str, **bounds: Any) -> bytes:
        read.append(key)
        return read_bytes(self, key, **bounds)

    monkeypatch.setattr(LocalStorage, "read_bytes", counted)
    assert find_checkpoint("latest", storage.uri)[0] == str(tmp_path / "one")
    assert [key for key in read if key.startswith("registry/")] == ["registry/000020.json"]

"""A run's checkpoints: the newest whole one is found, damaged ones are named, and thinning keeps
what it must."""

import logging
import os
from collections.abc import Collection
from pathlib import Path

import pytest

from cluster.settings.run import CheckpointConfig
from cluster.storage.uris import Storage, open_storage
from jobs.run.checkpoints import RunCheckpoints, checkpoint_name, superseded
from model.files.checkpoint_folder import MANIFEST, read_metadata, verify_checkpoint
from tests.checkpoints import DAMAGES, FILES, damage, write_tiny


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(str(tmp_path / "runs/r"))
    return open_storage(f"s3://{request.getfixturevalue('s3_bucket')}/runs/r")


def save(run: Storage, *steps: int) -> RunCheckpoints:
    checkpoints = RunCheckpoints(run)
    for step in steps:
        folder = checkpoints.spool / checkpoint_name(step)
        write_tiny(folder, step=step)
        checkpoints.publish(folder)
    return checkpoints


def thin_out(checkpoints: RunCheckpoints, *, pinned: Collection[str] = ()) -> list[str]:
    """Keeps the newest, as a run does that has read or written each checkpoint whole."""
    complete, keep = checkpoints.names, CheckpointConfig(num_to_keep=1)
    gone = superseded(complete, checkpoints.torn, keep=keep, verified=complete, pinned=pinned)
    checkpoints.delete(gone)
    return gone


def test_saved_checkpoints_are_found_newest_first(run: Storage, tmp_path: Path) -> None:
    assert RunCheckpoints(run).names == []
    assert RunCheckpoints(run).find(tmp_path / "scratch")[0] is None
    checkpoints = save(run, 9, 10, 2)
    assert checkpoints.names == [checkpoint_name(step) for step in (2, 9, 10)]
    folder = checkpoints.find(tmp_path / "scratch")[0]
    assert folder is not None
    assert (read_metadata(folder).step, folder.name) == (10, checkpoint_name(10))
    assert open_storage(checkpoints.uri(checkpoint_name(9))).exists(MANIFEST)
    fetched = checkpoints.fetch(checkpoint_name(9), tmp_path / "other")
    assert verify_checkpoint(fetched) == []
    assert read_metadata(fetched).step == 9


def test_a_step_is_saved_again(run: Storage, tmp_path: Path) -> None:
    """An attempt that started from an older checkpoint does this."""
    checkpoints = save(run, 1, 2, 2)
    folder = checkpoints.find(tmp_path / "scratch")[0]
    assert folder is not None
    assert verify_checkpoint(folder) == []


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_is_named_and_the_one_before_is_used(
    tmp_path: Path, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = save(open_storage(str(tmp_path)), 1, 2)
    damage(tmp_path / "checkpoints" / checkpoint_name(2), name, how)
    with caplog.at_level(logging.WARNING):
        folder = checkpoints.find(tmp_path / "scratch")[0]
    assert folder is not None
    assert read_metadata(folder).step == 1
    if (name, how) == (MANIFEST, "remove"):  # then it never was a checkpoint
        assert checkpoints.names == [checkpoint_name(1)]
    else:
        assert f"{checkpoints.uri(checkpoint_name(2))} is skipped" in caplog.text
        assert MANIFEST in caplog.text or name in caplog.text


@pytest.mark.parametrize("how", DAMAGES)
def test_a_remote_damaged_newest_is_named_too(
    s3_bucket: str, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = open_storage(f"s3://{s3_bucket}/r")
    checkpoints = save(run, 1)
    write_tiny(tmp_path / "two", step=2)
    damage(tmp_path / "two", "model.safetensors", how)
    run.upload_folder(tmp_path / "two", f"checkpoints/{checkpoint_name(2)}", last=MANIFEST)
    with caplog.at_level(logging.WARNING):
        folder = checkpoints.find(tmp_path / "scratch")[0]
    assert folder is not None
    assert read_metadata(folder).step == 1
    assert f"{checkpoints.uri(checkpoint_name(2))} is skipped: model.safetensors" in caplog.text


def test_with_every_checkpoint_damaged_there_is_none(tmp_path: Path) -> None:
    checkpoints = save(open_storage(str(tmp_path)), 1, 2)
    for name in checkpoints.names:
        damage(tmp_path / "checkpoints" / name, "config.json", "flip")
    assert checkpoints.find(tmp_path / "scratch")[0] is None


def test_leftovers_are_no_checkpoints(run: Storage, tmp_path: Path) -> None:
    """A crash leaves files before their manifest, and the folders that a local write works in."""
    checkpoints = save(run, 1)
    write_tiny(tmp_path / "torn", step=2)
    run.upload_folder(
        tmp_path / "torn", f"checkpoints/.{checkpoint_name(3)}.writing", last=MANIFEST
    )
    run.upload_folder(
        tmp_path / "torn", f"checkpoints/.{checkpoint_name(4)}.replaced", last=MANIFEST
    )
    (tmp_path / "torn" / MANIFEST).unlink()
    run.upload_folder(tmp_path / "torn", f"checkpoints/{checkpoint_name(2)}")
    assert checkpoints.names == [checkpoint_name(1)]
    folder = checkpoints.find(tmp_path / "scratch")[0]
    assert folder is not None
    assert read_metadata(folder).step == 1
    save(run, 2)
    assert checkpoints.names == [checkpoint_name(1), checkpoint_name(2)]


@pytest.mark.more
def test_thinning_leaves_nothing_of_what_it_deletes(run: Storage, tmp_path: Path) -> None:
    checkpoints = save(run, 1, 2, 3, 4, 5)
    gone = thin_out(checkpoints, pinned={checkpoint_name(2)})
    assert gone == [checkpoint_name(step) for step in (1, 3)]
    assert checkpoints.names == [checkpoint_name(step) for step in (2, 4, 5)]
    assert {entry.key.split("/")[1] for entry in run.list("checkpoints/")} == set(checkpoints.names)
    for name in checkpoints.names:
        assert verify_checkpoint(checkpoints.fetch(name, tmp_path / "scratch")) == []


def test_a_deletion_cut_short_leaves_no_checkpoint_and_is_ended_by_the_next(
    run: Storage, tmp_path: Path
) -> None:
    """The manifest goes first, so the rest is no checkpoint, whenever a kill comes."""
    checkpoints = save(run, 1, 2, 3, 4)
    run.delete(f"checkpoints/{checkpoint_name(1)}/{MANIFEST}")
    run.delete(f"checkpoints/{checkpoint_name(1)}/config.json")
    assert checkpoints.names == [checkpoint_name(step) for step in (2, 3, 4)]
    for _ in range(2):
        thin_out(checkpoints)
        assert {entry.key.split("/")[1] for entry in run.list("checkpoints/")} == {
            checkpoint_name(3),
            checkpoint_name(4),
        }


def test_an_unfinished_upload_goes_once_two_newer_ones_are_verified(run: Storage) -> None:
    checkpoints = save(run, 1, 2, 3)
    run.delete(f"checkpoints/{checkpoint_name(2)}/{MANIFEST}")
    thin_out(checkpoints)
    assert run.list(f"checkpoints/{checkpoint_name(2)}/"), (
        "older than one verified checkpoint alone"
    )
    save(run, 4)
    thin_out(checkpoints)
    assert not run.list(f"checkpoints/{checkpoint_name(2)}/")


def test_a_quarantined_one_is_passed_over_and_never_deleted(run: Storage, tmp_path: Path) -> None:
    checkpoints = save(run, 1, 2, 3, 4)
    before = run.list(f"checkpoints/{checkpoint_name(1)}/")
    for name in (checkpoint_name(1), checkpoint_name(4)):
        checkpoints.quarantine(name, ["altered"])
    assert checkpoints.names == [checkpoint_name(2), checkpoint_name(3)]
    assert checkpoints.quarantined == [checkpoint_name(1), checkpoint_name(4)]
    folder, damaged = checkpoints.find(tmp_path)
    assert folder is not None
    assert (folder.name, damaged) == (checkpoint_name(3), {})
    thin_out(checkpoints)
    after = {entry.key: entry for entry in run.list(f"checkpoints/{checkpoint_name(1)}/")}
    assert [after[entry.key] for entry in before] == before, "all of its bytes are kept"


def test_what_a_killed_attempt_left_in_the_spool_is_published(run: Storage, tmp_path: Path) -> None:
    """Only what is newer than all that is published, and whole."""
    checkpoints = save(run, 2)
    for step in (1, 3, 4, 5):
        write_tiny(checkpoints.spool / checkpoint_name(step), step=step)
    damage(checkpoints.spool / checkpoint_name(4), "model.safetensors", "flip")
    (checkpoints.spool / checkpoint_name(5) / MANIFEST).unlink()
    (checkpoints.spool / f".{checkpoint_name(6)}.writing").mkdir()
    checkpoints.recover()
    assert checkpoints.names == [checkpoint_name(2), checkpoint_name(3)]
    assert list(checkpoints.spool.iterdir()) == []
    folder = checkpoints.find(tmp_path)[0]
    assert folder is not None
    assert read_metadata(folder).step == 3


def test_parts_of_uploads_that_never_ended_are_freed(s3_bucket: str, tmp_path: Path) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    run = open_storage(f"s3://{s3_bucket}/runs/r")
    for key in ("runs/r/checkpoints/step-000000009/model.safetensors", "runs/r2/checkpoints/x"):
        client.create_multipart_upload(Bucket=s3_bucket, Key=key)
    RunCheckpoints(run).recover()
    uploads = client.list_multipart_uploads(Bucket=s3_bucket)["Uploads"]
    assert [upload["Key"] for upload in uploads] == ["runs/r2/checkpoints/x"], (
        "another run's is not ours"
    )

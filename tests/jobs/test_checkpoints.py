"""A run's checkpoints: the newest whole one is found, damaged ones are named, and thinning keeps what it must."""

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.storage import Storage, open_storage
from jobs.checkpoints import RunCheckpoints, checkpoint_name, superseded
from model.checkpoint import MANIFEST, read_metadata, verify_checkpoint
from tests.checkpoints import DAMAGES, FILES, damage, write_tiny


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(str(tmp_path / "runs/r"))
    return open_storage(f"s3://{request.getfixturevalue('s3_bucket')}/runs/r")


def save(run: Storage, *steps: int) -> RunCheckpoints:
    checkpoints = RunCheckpoints(run)
    for step in steps:

        def write(folder: Path, step: int = step) -> None:
            write_tiny(folder, step=step)

        checkpoints.save(checkpoint_name(step), write)
    return checkpoints


@given(st.sets(st.integers(1, 10**9)), st.integers(1, 5), st.sets(st.integers(0, 40)))
def test_the_newest_and_the_pinned_are_kept(steps: set[int], num_to_keep: int, pinned_at: set[int]) -> None:
    names = [checkpoint_name(step) for step in steps]
    pinned = {names[i] for i in pinned_at if i < len(names)}
    gone = superseded(names, num_to_keep=num_to_keep, pinned=pinned)
    newest = {checkpoint_name(step) for step in sorted(steps)[-num_to_keep:]}
    assert set(gone) == set(names) - newest - pinned
    assert gone == sorted(gone)


def test_saved_checkpoints_are_found_newest_first(run: Storage, tmp_path: Path) -> None:
    assert RunCheckpoints(run).names == []
    assert RunCheckpoints(run).load_newest(tmp_path / "scratch") is None
    checkpoints = save(run, 9, 10, 2)
    assert checkpoints.names == [checkpoint_name(step) for step in (2, 9, 10)]
    folder = checkpoints.load_newest(tmp_path / "scratch")
    assert folder is not None
    assert (read_metadata(folder).step, folder.name) == (10, checkpoint_name(10))
    assert open_storage(checkpoints.uri(checkpoint_name(9))).exists(MANIFEST)
    fetched = checkpoints.fetch(checkpoint_name(9), tmp_path / "other")
    assert verify_checkpoint(fetched) == []
    assert read_metadata(fetched).step == 9


def test_a_step_is_saved_again(run: Storage, tmp_path: Path) -> None:
    """As an attempt does that started from an older checkpoint."""
    checkpoints = save(run, 1, 2, 2)
    folder = checkpoints.load_newest(tmp_path / "scratch")
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
        folder = checkpoints.load_newest(tmp_path / "scratch")
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
        folder = checkpoints.load_newest(tmp_path / "scratch")
    assert folder is not None
    assert read_metadata(folder).step == 1
    assert f"{checkpoints.uri(checkpoint_name(2))} is skipped: model.safetensors" in caplog.text


def test_with_every_checkpoint_damaged_there_is_none(tmp_path: Path) -> None:
    checkpoints = save(open_storage(str(tmp_path)), 1, 2)
    for name in checkpoints.names:
        damage(tmp_path / "checkpoints" / name, "config.json", "flip")
    assert checkpoints.load_newest(tmp_path / "scratch") is None


def test_leftovers_are_no_checkpoints(run: Storage, tmp_path: Path) -> None:
    """What a crash leaves: files before their manifest, and the folders that a local write works in."""
    checkpoints = save(run, 1)
    write_tiny(tmp_path / "torn", step=2)
    run.upload_folder(tmp_path / "torn", f"checkpoints/.{checkpoint_name(3)}.writing", last=MANIFEST)
    run.upload_folder(tmp_path / "torn", f"checkpoints/.{checkpoint_name(4)}.replaced", last=MANIFEST)
    (tmp_path / "torn" / MANIFEST).unlink()
    run.upload_folder(tmp_path / "torn", f"checkpoints/{checkpoint_name(2)}")
    assert checkpoints.names == [checkpoint_name(1)]
    folder = checkpoints.load_newest(tmp_path / "scratch")
    assert folder is not None
    assert read_metadata(folder).step == 1
    save(run, 2)
    assert checkpoints.names == [checkpoint_name(1), checkpoint_name(2)]


def test_thinning_leaves_nothing_of_what_it_deletes(run: Storage, tmp_path: Path) -> None:
    checkpoints = save(run, 1, 2, 3, 4)
    checkpoints.thin_out(num_to_keep=1, pinned={checkpoint_name(2)})
    assert checkpoints.names == [checkpoint_name(2), checkpoint_name(4)]
    assert {entry.key.split("/")[1] for entry in run.list("checkpoints/")} == set(checkpoints.names)
    for name in checkpoints.names:
        assert verify_checkpoint(checkpoints.fetch(name, tmp_path / "scratch")) == []
    checkpoints.thin_out(num_to_keep=2, pinned=set())
    assert len(checkpoints.names) == 2


def test_a_deletion_cut_short_leaves_no_checkpoint(tmp_path: Path) -> None:
    """The manifest goes first, so whatever moment a kill comes at, the rest is no checkpoint."""
    checkpoints = save(open_storage(str(tmp_path)), 1, 2, 3)
    half_gone = tmp_path / "checkpoints" / checkpoint_name(1)
    (half_gone / MANIFEST).unlink()
    (half_gone / "config.json").unlink()
    checkpoints.thin_out(num_to_keep=1, pinned=set())
    assert checkpoints.names == [checkpoint_name(3)]
    assert not (tmp_path / "checkpoints" / checkpoint_name(2)).exists()

"""Where a key is named the newest checkpoint counts: one that is damaged, unsigned or exchanged is an
error, and an older one that is signed does not take its place."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.storage.registry import find_checkpoint, publications, publish
from cluster.storage.uris import Storage, open_storage
from jobs.proof.sign_checkpoint import sign_checkpoint
from jobs.run.checkpoints import RunCheckpoints
from jobs.run.ledger import LEDGER
from model.files.checkpoint_folder import MANIFEST, fingerprint
from model.signing.signature import MODEL, TRAINING, SignatureError, SigningKey, TrustedSigner
from raymill.errors import CheckpointError
from tests.checkpoints import FILES, damage, write_tiny
from tests.signing_keys import made_keys

STEPS = (25, 30)


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrustedSigner]:
    """A private key, and who trusts its holder."""
    private, public = made_keys(tmp_path_factory.mktemp("keys"), "ours")
    return private, TrustedSigner(public)


@pytest.fixture(scope="module")
def signed(
    tmp_path_factory: pytest.TempPathFactory, signer: tuple[Path, TrustedSigner]
) -> dict[int, Path]:
    """Two signed checkpoints of a run, by step."""
    folders = {}
    for step in STEPS:
        folders[step] = tmp_path_factory.mktemp("signed") / f"step-{step:09d}-0002"
        write_tiny(folders[step], step=step, run_id="first")
        sign_checkpoint(str(folders[step]), SigningKey(signer[0]), storage_uri="unused")
    return folders


class Mill:
    """A storage with a run, both of whose checkpoints are signed."""

    def __init__(self, root: Path, signed: dict[int, Path], trusted: TrustedSigner) -> None:
        self.root, self.trusted = root, trusted
        self.run = root / "runs/first"
        self.checkpoints = {
            step: self.run / f"checkpoints/{folder.name}" for step, folder in signed.items()
        }
        for step, folder in signed.items():
            shutil.copytree(folder, self.checkpoints[step])

    @property
    def storage(self) -> Storage:
        return open_storage(str(self.root))

    def found(self, reference: str | Path, *, is_signed: bool = True) -> Path:
        trusted = self.trusted if is_signed else None
        return Path(find_checkpoint(str(reference), str(self.root), signed_by=trusted)[0])

    def refusal(self, reference: str | Path) -> str:
        with pytest.raises(CheckpointError) as refused:
            self.found(reference)
        return str(refused.value)

    def forge(self, step: int, **fields: Any) -> None:
        """Writes a publication without asking, as whoever can write to the storage may."""
        [*_, newest] = sorted((self.root / "registry").iterdir())
        entry = json.loads(newest.read_bytes()) | {"checkpoint": str(self.checkpoints[step])}
        number = int(newest.stem) + 1
        (newest.parent / f"{number:06d}.json").write_text(json.dumps(entry | fields))

    def record(self, *steps: int) -> None:
        """Writes a ledger that has the checkpoints of these steps, and a crash's unfinished line."""
        lines = [
            {"event": "checkpoint", "checkpoint": str(self.checkpoints[step])} for step in steps
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (self.run / LEDGER).write_text(text + '{"event": "checkpoint", "che')

    def set_aside(self, step: int) -> None:
        """Marks a checkpoint as its run does."""
        checkpoints = RunCheckpoints(open_storage(str(self.run)))
        checkpoints.quarantine(self.checkpoints[step].name, ["its manifest is missing"])


@pytest.fixture
def mill(tmp_path: Path, signed: dict[int, Path], signer: tuple[Path, TrustedSigner]) -> Mill:
    return Mill(tmp_path / "mill", signed, signer[1])


def test_the_newest_signed_one_is_latest_and_that_of_its_run(mill: Mill) -> None:
    publish(mill.storage, str(mill.checkpoints[30]))
    assert mill.found("latest") == mill.found(mill.run) == mill.checkpoints[30]


def test_latest__refuses_a_publication_that_names_another_checkpoint_than_it_describes(
    mill: Mill,
) -> None:
    """A copy of the newest publication, with the older checkpoint in it."""
    publish(mill.storage, str(mill.checkpoints[30]))
    mill.forge(25)
    said = mill.refusal("latest")
    assert f"{mill.checkpoints[25]} is not valid: manifest.json has the SHA-256" in said
    assert "no older one takes its place" in said
    assert said.endswith(f"such as {mill.checkpoints[30]}, or publish a valid, signed one")
    (mill.root / "registry/000002.json").unlink()
    mill.forge(25, manifest_hash=None)  # as one of before, which had none
    assert "it is of step 25" not in (said := mill.refusal("latest"))
    assert "its publication says step 30 of run first" in said


def test_latest__is_an_error_where_the_manifest_of_the_newest_is_gone(mill: Mill) -> None:
    for step in STEPS:
        publish(mill.storage, str(mill.checkpoints[step]))
    (mill.checkpoints[30] / MANIFEST).unlink()
    said = mill.refusal("latest")
    assert f"{mill.checkpoints[30]} is not valid: manifest.json is missing" in said
    assert f"Name an older checkpoint itself, such as {mill.checkpoints[25]}" in said
    assert mill.found(mill.checkpoints[25]) == mill.checkpoints[25]
    publish(mill.storage, str(mill.checkpoints[25]))
    assert mill.found("latest") == mill.checkpoints[25]


def test_a_run__is_an_error_where_the_manifest_of_its_newest_is_gone(mill: Mill) -> None:
    (mill.checkpoints[30] / MANIFEST).unlink()
    for reference in (mill.run, mill.run / "checkpoints"):
        said = mill.refusal(reference)
        assert f"{mill.checkpoints[30]} is not valid: manifest.json is missing" in said
        assert f"such as {mill.checkpoints[25]}, or sign or restore this one" in said
    assert mill.found(mill.run, is_signed=False) == mill.checkpoints[25]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["flip", "remove"])
def test_a_run__is_an_error_where_its_newest_is_damaged(mill: Mill, name: str, how: str) -> None:
    damage(mill.checkpoints[30], name, how)
    assert str(mill.checkpoints[30]) in mill.refusal(mill.run)


def test_latest__is_an_error_where_the_newest_is_damaged_gone_or_unsigned(mill: Mill) -> None:
    for step in STEPS:
        publish(mill.storage, str(mill.checkpoints[step]))
    damage(mill.checkpoints[30], "model.safetensors", "flip")
    assert "model.safetensors is altered" in mill.refusal("latest")
    assert mill.found("latest", is_signed=False) == mill.checkpoints[25]
    for name in (MODEL, TRAINING):
        (mill.checkpoints[30] / name).unlink()
    damage(mill.checkpoints[30], "model.safetensors", "flip")
    with pytest.raises(SignatureError, match=r"is not signed.* no older one takes its place"):
        mill.found("latest")
    shutil.rmtree(mill.checkpoints[30])
    assert f"{mill.checkpoints[30]} is not a folder" in mill.refusal("latest")


def test_a_remote_latest__is_an_error_where_the_newest_is_gone(
    mill: Mill, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    storage = open_storage(f"s3://{s3_bucket}/mill")
    places = {step: storage.child(f"runs/first/checkpoints/step-{step:09d}-0002") for step in STEPS}
    for step, place in places.items():
        place.upload_folder(mill.checkpoints[step], "", last=MANIFEST)
        publish(storage, place.uri)
    run = storage.child("runs/first").uri
    for reference in ("latest", run):
        found, _ = find_checkpoint(reference, storage.uri, signed_by=mill.trusted)
        assert found == places[30].uri
    places[30].delete(MANIFEST)
    for reference in ("latest", run):
        with pytest.raises(CheckpointError, match=rf"{places[30].uri} is not valid.*is missing"):
            find_checkpoint(reference, storage.uri, signed_by=mill.trusted)
    for entry in places[30].list():
        places[30].delete(entry.key)
    with pytest.raises(CheckpointError, match=r"step-000000030-0002 is empty .*no older one"):
        find_checkpoint("latest", storage.uri, signed_by=mill.trusted)


def test_a_run__passes_over_what_is_still_uploaded_and_nothing_that_was_complete(
    mill: Mill, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (MANIFEST, MODEL, TRAINING):
        (mill.checkpoints[30] / name).unlink()
    mill.record(25)
    assert mill.found(mill.run) == mill.checkpoints[25]
    assert f"{mill.checkpoints[30]} is skipped: manifest.json is missing" in caplog.text
    mill.record(25, 30)
    assert "its run's ledger has it" in mill.refusal(mill.run)
    mill.set_aside(30)
    caplog.clear()
    assert mill.found(mill.run) == mill.checkpoints[25]
    assert f"{mill.checkpoints[30]} is skipped: its run has set it aside" in caplog.text


def test_a_run__is_an_error_where_a_signed_one_is_marked_as_damaged(mill: Mill) -> None:
    """The mark is not signed: whoever can write to the storage can set it."""
    mill.set_aside(30)
    assert "has the mark QUARANTINED" in mill.refusal(mill.run)


def test_a_signed_checkpoint_under_a_later_ones_name_is_refused(mill: Mill) -> None:
    later = mill.run / "checkpoints/step-000000031-0002"
    shutil.copytree(mill.checkpoints[25], later)
    for reference in (mill.run, later):
        assert "it is of step 25, and its folder's name says 31" in mill.refusal(reference)


def test_a_runs_folder_that_was_given_the_files_of_a_checkpoint_is_refused(mill: Mill) -> None:
    shutil.copytree(mill.checkpoints[25], mill.run, dirs_exist_ok=True)
    assert "has the files of a checkpoint, and holds others" in mill.refusal(mill.run)


def test_a_copy_under_any_name_needs_no_publication(mill: Mill, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(mill.checkpoints[25], copy)
    publish(mill.storage, str(mill.checkpoints[30]))
    assert mill.found(copy) == copy


def test_a_publication_has_the_hash_of_the_manifest(
    mill: Mill, caplog: pytest.LogCaptureFixture
) -> None:
    for step in STEPS:
        published = publish(mill.storage, str(mill.checkpoints[step]))
        manifest = mill.checkpoints[step] / MANIFEST
        assert published.manifest_hash == fingerprint(manifest)["sha256"]
    assert publications(mill.storage)[-1] == published
    write_tiny(mill.checkpoints[30], step=31, run_id="first")  # another one in its place
    assert mill.found("latest", is_signed=False) == mill.checkpoints[25]
    assert f"{mill.checkpoints[30]} is skipped: manifest.json has the SHA-256" in caplog.text


def test_publications_of_an_earlier_and_of_a_later_raymill_are_read(mill: Mill) -> None:
    publish(mill.storage, str(mill.checkpoints[30]))
    file = mill.root / "registry/000001.json"
    known = json.loads(file.read_bytes())
    file.write_text(json.dumps({**known, "of_a_later_one": 1}))
    assert mill.found("latest") == mill.checkpoints[30]
    del known["manifest_hash"]
    file.write_text(json.dumps(known))
    assert publications(mill.storage)[0].manifest_hash is None
    assert mill.found("latest") == mill.found("latest", is_signed=False) == mill.checkpoints[30]
    file.write_text("[]")
    assert "000001.json is no publication" in mill.refusal("latest")


def test_latest__takes_a_step_back_and_says_so(
    mill: Mill, caplog: pytest.LogCaptureFixture
) -> None:
    """An order to go back and an attack look the same: both are publications."""
    warning = "latest names step 25, and step 30 of the same run was published before"
    for step in STEPS:
        publish(mill.storage, str(mill.checkpoints[step]))
        assert mill.found("latest") == mill.checkpoints[step]
    assert warning not in caplog.text
    publish(mill.storage, str(mill.checkpoints[25]))
    with caplog.at_level(logging.WARNING):
        assert mill.found("latest") == mill.checkpoints[25]
    assert f"{warning}: storage.signed_from_step=30 refuses such a step back" in caplog.text

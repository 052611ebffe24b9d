"""Where a key is named, only what its holder has signed is begun from, evaluated or served."""

import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cluster.settings.flags import read_config, resolve_config, settled
from cluster.settings.leaves import leaves
from cluster.settings.parser import ConfigError
from cluster.settings.run import StorageConfig, write_config
from cluster.settings.stages import EvaluateConfig
from cluster.storage.registry import find_checkpoint, publish
from cluster.storage.uris import open_storage
from jobs.evaluate import evaluate
from jobs.proof.sign_checkpoint import sign_checkpoint
from jobs.training.warm_start import like_its_source
from model.files.checkpoint_folder import MANIFEST
from model.signing.floor import Floor
from model.signing.identity import TrustedIdentity
from model.signing.signature import (
    MODEL,
    FloorError,
    SignatureError,
    SigningKey,
    TrustedSigner,
)
from tests.jobs.runs import tiny_plan, trained_run
from tests.jobs.tampering import checkpoint_folder
from tests.signing_keys import made_keys


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    private, public = made_keys(tmp_path_factory.mktemp("keys"), "ours")
    return private, str(public)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, keys: tuple[Path, str]) -> Path:
    """A storage with a run of which the checkpoint of step 6 is signed."""
    folder = tmp_path_factory.mktemp("storage")
    trained_run(str(folder))
    sign_checkpoint(
        str(checkpoint_folder(open_storage(str(folder)).child("runs/tiny"), 6)),
        SigningKey(keys[0]),
        storage_uri=str(folder),
    )
    return folder


@pytest.fixture
def checkpoints(trained: Path, tmp_path: Path) -> dict[int, str]:
    """The checkpoints of a copy, to be spoiled, by step."""
    shutil.copytree(trained, tmp_path / "copy")
    run = open_storage(str(tmp_path / "copy")).child("runs/tiny")
    return {step: str(checkpoint_folder(run, step)) for step in (3, 6, 8)}


def test_a_signed_checkpoint_is_found_and_no_other(
    checkpoints: dict[int, str], keys: tuple[Path, str], tmp_path: Path
) -> None:
    found, _ = find_checkpoint(
        checkpoints[6], str(tmp_path), signed_by=TrustedSigner(Path(keys[1]))
    )
    assert found == checkpoints[6]
    with pytest.raises(SignatureError, match=r"is not signed: expected model\.sig"):
        find_checkpoint(checkpoints[3], str(tmp_path), signed_by=TrustedSigner(Path(keys[1])))
    _, other = made_keys(tmp_path, "other")
    with pytest.raises(SignatureError, match="was signed with another key"):
        find_checkpoint(checkpoints[6], str(tmp_path), signed_by=TrustedSigner(other))
    (Path(checkpoints[6]) / "chat_template.jinja").write_text("{{ theirs }}")
    with pytest.raises(SignatureError, match="was not there when"):
        find_checkpoint(checkpoints[6], str(tmp_path), signed_by=TrustedSigner(Path(keys[1])))


def test_a_newer_unsigned_one_is_refused_and_an_older_signed_one_does_not_do(
    checkpoints: dict[int, str], keys: tuple[Path, str], tmp_path: Path
) -> None:
    storage = open_storage(str(tmp_path / "registry"))
    publish(storage, checkpoints[6])
    assert (
        find_checkpoint("latest", storage.uri, signed_by=TrustedSigner(Path(keys[1])))[0]
        == checkpoints[6]
    )
    publish(storage, checkpoints[8])
    with pytest.raises(SignatureError, match="is not signed"):
        find_checkpoint("latest", storage.uri, signed_by=TrustedSigner(Path(keys[1])))


def test_a_copy_without_the_training_state_is_checked(
    checkpoints: dict[int, str], keys: tuple[Path, str], s3_bucket: str
) -> None:
    place = open_storage(f"s3://{s3_bucket}/storage")
    place.upload_folder(Path(checkpoints[6]), "signed", last=MANIFEST)
    _, copy = find_checkpoint(
        place.child("signed").uri, place.uri, signed_by=TrustedSigner(Path(keys[1]))
    )
    assert not (copy / "train_state.safetensors").exists()
    assert (copy / MODEL).exists()


def test_a_folder_of_transformers_is_signed_by_the_librarys_command(
    keys: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "README.md"):
        (folder / name).write_text("{}")
    command = [sys.executable, "-m", "model_signing", "sign", "key", str(folder)]
    command += ["--signature", str(folder / MODEL), "--private_key", str(keys[0])]
    subprocess.run(command, check=True, capture_output=True)
    assert (
        find_checkpoint(str(folder), str(tmp_path), signed_by=TrustedSigner(Path(keys[1])))[1]
        == folder
    )
    for floor in (Floor(step=0), Floor(signed_on=datetime(2026, 1, 1, tzinfo=UTC))):
        with pytest.raises(FloorError, match="as transformers saved it"):
            find_checkpoint(
                str(folder), str(tmp_path), signed_by=TrustedSigner(Path(keys[1]), floor=floor)
            )
    (folder / "config.json").write_text("[]")
    with pytest.raises(SignatureError, match=r"config\.json .* is another than was signed"):
        find_checkpoint(str(folder), str(tmp_path), signed_by=TrustedSigner(Path(keys[1])))


def test_settings_say_whom_to_trust_by_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = StorageConfig(signed_by="ca.pem", timestamped_by="tsa.pem")
    signer = settled(EvaluateConfig(storage=given)).storage.signer
    assert signer == TrustedSigner(tmp_path / "ca.pem", timestamped_by=tmp_path / "tsa.pem")
    assert StorageConfig().signer is None
    with pytest.raises(ValueError, match="name whose they are with signed_by"):
        StorageConfig(timestamped_by="tsa.pem")


def test_settings_name_a_floor_in_utc_with_the_signer_alone(tmp_path: Path) -> None:
    file = tmp_path / "evaluate.yaml"
    file.write_text("storage: {signed_by: /ca.pem, signed_from_step: 30}\n")
    flags = dict.fromkeys(leaf.path for leaf in leaves(EvaluateConfig))
    flags["storage.signed_from_date"] = "2026-01-31"
    storage = resolve_config(flags, EvaluateConfig, file=file).config.storage
    floor = Floor(30, datetime(2026, 1, 31, tzinfo=UTC))
    assert storage.signer == TrustedSigner(Path("/ca.pem"), floor=floor)
    write_config(EvaluateConfig(storage=storage), file)
    assert read_config(file, EvaluateConfig).storage == storage
    file.write_text("storage: {signed_by: /ca.pem, signed_from_date: 2026-01-31}\n")  # YAML's own
    assert read_config(file, EvaluateConfig).storage.floor.signed_on == floor.signed_on
    for setting in ("signed_from_step: 30", "signed_from_date: 2026-01-31"):
        file.write_text(f"storage: {{{setting}}}\n")
        with pytest.raises(ConfigError, match="name whose they are with signed_by"):
            read_config(file, EvaluateConfig)


def test_an_identity_has_the_floor_too(tmp_path: Path) -> None:
    (tmp_path / "us.json").write_text('{"identity": "a@b", "identity_provider": "https://c"}')
    storage = StorageConfig(signed_by=str(tmp_path / "us.json"), signed_from_step=30)
    assert storage.signer == TrustedIdentity("a@b", "https://c", floor=Floor(step=30))


def test_a_checkpoint_below_the_floor_is_refused_though_it_is_signed(
    checkpoints: dict[int, str], keys: tuple[Path, str], tmp_path: Path
) -> None:
    now = datetime.now(UTC)
    for floor in (Floor(step=6), Floor(6, now - timedelta(hours=1))):
        signer = TrustedSigner(Path(keys[1]), floor=floor)
        assert find_checkpoint(checkpoints[6], str(tmp_path), signed_by=signer)[0] == checkpoints[6]
    storage = open_storage(str(tmp_path / "registry"))
    publish(storage, checkpoints[6])
    for floor, message in (
        (
            Floor(step=7),
            "is of step 6, and storage.signed_from_step asks for step 7 or a later one",
        ),
        (
            Floor(signed_on=now + timedelta(hours=1)),
            "was signed on .*, and storage.signed_from_date",
        ),
    ):
        signer = TrustedSigner(Path(keys[1]), floor=floor)
        for reference in (checkpoints[6], "latest"):
            with pytest.raises(FloorError, match=message):
                find_checkpoint(reference, storage.uri, signed_by=signer)


def test_a_run_begins_from_signed_weights_alone(
    checkpoints: dict[int, str], keys: tuple[Path, str], tmp_path: Path
) -> None:
    def config(step: int, **floor: int) -> object:
        plan = tiny_plan(str(tmp_path / "run"), train={"init_from": checkpoints[step]})
        storage = plan.config.storage.model_copy(update={"signed_by": keys[1], **floor})
        not_begun = {"storage": storage, "run_id": f"from-{step}"}
        return like_its_source(plan.config.model_copy(update=not_begun))

    assert config(6)
    with pytest.raises(SignatureError, match="is not signed"):
        config(3)
    with pytest.raises(FloorError, match="is of step 6"):
        config(6, signed_from_step=7)


def test_nothing_else_is_evaluated(
    checkpoints: dict[int, str], keys: tuple[Path, str], tmp_path: Path
) -> None:
    storage = StorageConfig(uri=str(tmp_path / "copy"), signed_by=keys[1])
    with pytest.raises(SignatureError, match="is not signed"):
        evaluate(EvaluateConfig(checkpoint=checkpoints[3], storage=storage))
    storage = storage.model_copy(update={"signed_from_step": 7})
    with pytest.raises(FloorError, match="is of step 6"):
        evaluate(EvaluateConfig(checkpoint=checkpoints[6], storage=storage))

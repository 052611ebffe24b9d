"""Checkpoints are signed so that others' tools verify them, and whatever was changed since is
found."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from cluster.cli import main
from cluster.settings.run import StorageConfig
from cluster.storage.registry import find_checkpoint
from cluster.storage.uris import Storage, open_storage
from jobs.export import export
from jobs.proof.sign_checkpoint import sign_checkpoint
from jobs.proof.verify_run import verify
from jobs.run.ledger import LEDGER
from model.files.checkpoint_folder import MANIFEST, fingerprint
from model.signing.signature import (
    MODEL,
    TRAINING,
    SignatureError,
    SigningKey,
    TrustedSigner,
    check,
)
from raymill.errors import UserError
from tests.jobs.runs import trained_run
from tests.jobs.tampering import checkpoint_folder, flip_byte
from tests.signing_keys import PIN, made_certificates, made_keys, made_rsa_keys, made_token
from tests.sigstore_instance import running_sigstore
from tests.timestamp_authority import made_authority, running

Keys = tuple[Path, Path]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return made_keys(tmp_path_factory.mktemp("keys"), "ours")


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory, keys: Keys) -> Path:
    """A storage with a run whose checkpoints are all signed."""
    folder = tmp_path_factory.mktemp("storage")
    trained_run(str(folder))
    for step in (3, 6, 8):
        uri = str(checkpoint_folder(open_storage(str(folder)).child("runs/tiny"), step))
        sign_checkpoint(uri, SigningKey(keys[0]), storage_uri=str(folder))
    return folder


@pytest.fixture
def run(signed: Path, tmp_path: Path) -> Storage:
    """A copy, to be spoiled."""
    shutil.copytree(signed, tmp_path / "copy")
    return open_storage(str(tmp_path / "copy")).child("runs/tiny")


def model_signing(folder: Path, public_key: Path) -> int:
    """Runs the library's own command; returns its exit code."""
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder)]
    command += ["--signature", str(folder / MODEL), "--public_key", str(public_key)]
    return subprocess.run(command, check=False, capture_output=True).returncode


@pytest.mark.more
def test_the_librarys_own_command_verifies_a_checkpoint_as_it_is(run: Storage, keys: Keys) -> None:
    folder = checkpoint_folder(run, 8)
    assert model_signing(folder, keys[1]) == 0
    flip_byte(folder / "config.json")
    assert model_signing(folder, keys[1]) != 0


def test_a_folder_that_the_librarys_command_signed_is_ours_too(
    run: Storage, keys: Keys, tmp_path: Path
) -> None:
    folder = checkpoint_folder(run, 8)
    command = [sys.executable, "-m", "model_signing", "sign", "key", str(folder)]
    command += ["--signature", str(tmp_path / MODEL), "--private_key", str(keys[0])]
    command += ["--ignore-paths", str(folder / MODEL), "--ignore-paths", str(folder / TRAINING)]
    subprocess.run(command, check=True, capture_output=True)
    shutil.copy(tmp_path / MODEL, folder / MODEL)
    assert check(folder, TrustedSigner(keys[1]))["runDetails"]["metadata"]["step"] == "8"


def test_the_statement_says_what_a_checkpoint_was_trained_from(run: Storage, keys: Keys) -> None:
    folder = checkpoint_folder(run, 6)
    training = check(folder, TrustedSigner(keys[1]))
    recorded = json.loads((folder / "raymill.json").read_bytes())
    about = training["runDetails"]["metadata"]
    assert (about["invocationId"], about["step"]) == ("tiny", "6")
    assert about["parameterHash"] == recorded["parameter_hash"]
    materials = {
        material["name"]: material["digest"]["sha256"]
        for material in training["buildDefinition"]["resolvedDependencies"]
    }
    assert materials["the token store's manifest.json"] == recorded["data_manifest_hash"]
    assert materials["tokenizer.json"] == fingerprint(folder / "tokenizer.json")["sha256"]
    assert "learning_rate" in training["buildDefinition"]["externalParameters"]["config.yaml"]
    [head] = training["runDetails"]["byproducts"]
    assert head["digest"]["sha256"] == verify(run)["ledger_head"]


def test_a_signed_run_is_valid_by_its_key_and_by_no_other(
    run: Storage, keys: Keys, tmp_path: Path
) -> None:
    assert verify(run, signed_by=TrustedSigner(keys[1]))["problems"] == []
    _, other = made_keys(tmp_path, "other")
    problems = verify(run, signed_by=TrustedSigner(other))["problems"]
    assert len(problems) == 3
    assert all(f"another key than that of {other}" in problem for problem in problems)


def test_the_newest_checkpoint_must_be_signed_and_earlier_ones_need_not(
    run: Storage, keys: Keys
) -> None:
    for name in (MODEL, TRAINING):
        (checkpoint_folder(run, 3) / name).unlink()
    assert verify(run, signed_by=TrustedSigner(keys[1]))["problems"] == []
    (checkpoint_folder(run, 8) / MODEL).unlink()
    [problem] = verify(run, signed_by=TrustedSigner(keys[1]))["problems"]
    assert "is not signed" in problem


def test_a_ledger_that_was_cut_off_since_is_found(run: Storage, keys: Keys) -> None:
    """Its chain is whole: only what was signed says that there were more lines."""
    lines = run.read_bytes(LEDGER).splitlines(keepends=True)
    run.write_bytes(LEDGER, b"".join(lines[:-1]))
    assert verify(run)["valid"]
    problems = verify(run, signed_by=TrustedSigner(keys[1]))["problems"]
    assert len(problems) == 3
    assert all("had another last line when it was signed" in problem for problem in problems)


@pytest.mark.parametrize("name", [MODEL, TRAINING])
def test_a_signature_of_another_checkpoint_is_refused(run: Storage, keys: Keys, name: str) -> None:
    shutil.copy(checkpoint_folder(run, 3) / name, checkpoint_folder(run, 6) / name)
    with pytest.raises(SignatureError, match=r"another than was signed|about another checkpoint"):
        check(checkpoint_folder(run, 6), TrustedSigner(keys[1]))


def test_weights_that_were_replaced_with_their_manifest_are_refused(
    run: Storage, keys: Keys
) -> None:
    folder = checkpoint_folder(run, 6)
    flip_byte(folder / "model.safetensors")
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["files"]["model.safetensors"] = fingerprint(folder / "model.safetensors")
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(SignatureError, match=r"manifest.json .* is another than was signed"):
        check(folder, TrustedSigner(keys[1]))


def test_a_file_that_was_added_or_removed_is_named(run: Storage, keys: Keys) -> None:
    folder = checkpoint_folder(run, 6)
    (folder / "train_state.safetensors").unlink()
    check(folder, TrustedSigner(keys[1]))  # as in a copy that only computes
    (folder / "chat_template.jinja").write_text("{{ ours }}")
    with pytest.raises(SignatureError, match=r"chat_template.jinja .* was not there"):
        check(folder, TrustedSigner(keys[1]))
    (folder / "chat_template.jinja").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(SignatureError, match=r"config\.json is missing"):
        check(folder, TrustedSigner(keys[1]))


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"dsseEnvelope": 1}', b"\xff\xfe"])
def test_what_is_no_signature_is_refused_in_a_sentence(
    run: Storage, keys: Keys, content: bytes
) -> None:
    folder = checkpoint_folder(run, 6)
    (folder / MODEL).write_bytes(content)
    with pytest.raises(SignatureError, match="is no signature"):
        check(folder, TrustedSigner(keys[1]))
    (folder / MODEL).unlink()
    with pytest.raises(SignatureError, match=r"is not signed: expected model\.sig"):
        check(folder, TrustedSigner(keys[1]))


def test_an_altered_statement_is_refused(run: Storage, keys: Keys) -> None:
    folder = checkpoint_folder(run, 6)
    bundle = json.loads((folder / TRAINING).read_bytes())
    payload = bundle["dsseEnvelope"]["payload"]
    bundle["dsseEnvelope"]["payload"] = (
        payload[:80] + ("A" if payload[80] != "A" else "B") + payload[81:]
    )
    (folder / TRAINING).write_text(json.dumps(bundle))
    with pytest.raises(SignatureError, match=r"training.sig was altered, or not signed with"):
        check(folder, TrustedSigner(keys[1]))


def test_keys_that_do_not_sign_are_refused(
    run: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint_folder(run, 6)
    sealed, _ = made_keys(tmp_path, "sealed", passphrase="open sesame")
    for wrong in (
        sealed,
        made_rsa_keys(tmp_path, "rsa")[0],
        tmp_path / "none.pem",
        folder / MANIFEST,
    ):
        with pytest.raises(
            UserError, match=r"is no private key to sign with: expected an elliptic"
        ):
            sign_checkpoint(str(folder), SigningKey(wrong), storage_uri=str(tmp_path))
    with pytest.raises(UserError, match="is no public key"):
        check(folder, TrustedSigner(folder / MANIFEST))
    monkeypatch.setenv("RAYMILL_KEY_PASSPHRASE", "open sesame")
    signed = sign_checkpoint(str(folder), SigningKey.at(sealed), storage_uri=str(tmp_path))
    assert signed["files"] == [MODEL, TRAINING]


@pytest.mark.skipif(shutil.which("softhsm2-util") is None, reason="no softhsm2 makes a token here")
def test_a_key_in_a_token_signs_and_never_leaves_it(
    run: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint_folder(run, 6)
    uri, public = made_token(tmp_path, monkeypatch)
    sign_checkpoint(str(folder), SigningKey(uri), storage_uri=str(tmp_path))
    assert check(folder, TrustedSigner(public))["runDetails"]["metadata"]["step"] == "6"
    assert model_signing(folder, public) == 0
    with pytest.raises(UserError, match=r"object=gone leads to no private key") as refused:
        sign_checkpoint(
            str(folder),
            SigningKey(uri.replace("object=release", "object=gone")),
            storage_uri=str(tmp_path),
        )
    assert f"={PIN}" not in str(refused.value)


def test_a_certificate_is_trusted_by_its_authority(run: Storage, tmp_path: Path) -> None:
    folder = checkpoint_folder(run, 6)
    key, certificate, authority = made_certificates(tmp_path)
    signer = SigningKey(key, certificates=certificate)
    sign_checkpoint(str(folder), signer, storage_uri=str(tmp_path))
    assert check(folder, TrustedSigner(authority))["runDetails"]["metadata"]["step"] == "6"
    (tmp_path / "others").mkdir()
    _, _, other = made_certificates(tmp_path / "others")
    with pytest.raises(SignatureError, match="to which none in"):
        check(folder, TrustedSigner(other))
    private, public = made_keys(tmp_path, "plain")
    with pytest.raises(SignatureError, match=r"signed with a certificate, and .* has a public key"):
        check(folder, TrustedSigner(public))
    sign_checkpoint(str(folder), SigningKey(private), storage_uri=str(tmp_path))
    with pytest.raises(SignatureError, match=r"no certificate, and .* has certificates"):
        check(folder, TrustedSigner(authority))
    with pytest.raises(UserError, match="begins with its certificate"):
        sign_checkpoint(
            str(folder),
            SigningKey(made_keys(tmp_path, "wrong")[0], certificates=certificate),
            storage_uri=str(tmp_path),
        )


@pytest.mark.parametrize(
    ("days", "message"), [((-20, -10), "that ended on"), ((10, 20), "set the clock")]
)
def test_a_certificate_that_does_not_hold_now_is_refused(
    run: Storage, tmp_path: Path, days: tuple[int, int], message: str
) -> None:
    folder = checkpoint_folder(run, 6)
    first_day, last_day = days
    key, certificate, authority = made_certificates(
        tmp_path, first_day=first_day, last_day=last_day
    )
    signer = SigningKey(key, certificates=certificate)
    sign_checkpoint(str(folder), signer, storage_uri=str(tmp_path))
    with pytest.raises(SignatureError, match=message):
        check(folder, TrustedSigner(authority))


def test_a_copy_is_signed_by_its_own_files(run: Storage, keys: Keys, tmp_path: Path) -> None:
    uri = str(checkpoint_folder(run, 6))
    export(uri, str(tmp_path / "exported"), storage_uri=str(tmp_path), key=SigningKey(keys[0]))
    training = check(tmp_path / "exported", TrustedSigner(keys[1]))
    assert training["runDetails"]["metadata"]["step"] == "6"
    assert model_signing(tmp_path / "exported", keys[1]) == 0


def test_a_bill_of_materials_names_files_and_data_and_is_signed_too(
    run: Storage, keys: Keys, tmp_path: Path
) -> None:
    uri, copy = str(checkpoint_folder(run, 6)), tmp_path / "exported"
    export(uri, str(copy), storage_uri=str(tmp_path), key=SigningKey(keys[0]), has_bom=True)
    text = (copy / "bom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bom = json.loads(text)
    model = bom["metadata"]["component"]
    assert (model["type"], model["name"]) == ("machine-learning-model", "tiny")
    files = {file["name"]: file["hashes"][0]["content"] for file in model["components"]}
    weights = "model.safetensors"
    assert files[weights] == fingerprint(copy / weights)["sha256"]
    recorded = json.loads((copy / "raymill.json").read_bytes())
    data = {part["name"]: part["hashes"][0]["content"] for part in bom["components"]}
    assert data["the token store's manifest.json"] == recorded["data_manifest_hash"]
    assert "raymill:parameters" in {each["name"] for each in model["properties"]}
    check(copy, TrustedSigner(keys[1]))
    (copy / "bom.cdx.json").write_text("{}")
    with pytest.raises(SignatureError, match="is another than was signed"):
        check(copy, TrustedSigner(keys[1]))


def test_a_checkpoint_in_a_bucket_is_signed_there(
    run: Storage, keys: Keys, s3_bucket: str, tmp_path: Path
) -> None:
    place = open_storage(f"s3://{s3_bucket}/copy")
    place.upload_folder(checkpoint_folder(run, 6), "checkpoint", last=MANIFEST)
    for name in (MODEL, TRAINING):
        place.delete(f"checkpoint/{name}")
    uri = place.child("checkpoint").uri
    sign_checkpoint(uri, SigningKey(keys[0]), storage_uri=str(tmp_path))
    place.download_folder("checkpoint", tmp_path / "back", last=MANIFEST)
    assert check(tmp_path / "back", TrustedSigner(keys[1]))["runDetails"]["byproducts"] == []


def test_the_commands_stamp_and_check_stamps(
    run: Storage, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The certificate has ended a minute ago, and the authority's clock is two minutes late."""
    where = ["--storage.uri", f"{run.uri}/../.."]
    key, certificate, ca = made_certificates(tmp_path, last_day=-1 / 1440)
    for step in (3, 6):
        for name in (MODEL, TRAINING):
            (checkpoint_folder(run, step) / name).unlink()
    with running(made_authority(tmp_path / "stamps")) as authority:
        authority.offset_s = -120
        signing = ["--key", str(key), "--certificates", str(certificate)]
        assert main(["sign", "tiny@8", *signing, "--timestamp", authority.url, *where]) == 0
        assert main(["sign", "tiny@6", *signing, "--timestamp", authority.url, *where]) == 0
        root, copy = str(authority.root), str(tmp_path / "copy-of-6")
        exporting = ["export", "tiny@6", copy, "--sign", *signing[1:], "--timestamp", authority.url]
        assert main([*exporting, *where]) == 0
    trusting = ["--signed-by", str(ca), "--timestamped-by", root]
    assert main(["verify", run.uri, *trusting]) == 0
    assert main(["verify", run.uri, "--signed-by", str(ca)]) == 1
    assert "or name the root of the authority that stamped it" in capsys.readouterr().out
    storage = StorageConfig(uri=run.uri, signed_by=str(ca), timestamped_by=root)
    assert find_checkpoint(copy, run.uri, signed_by=storage.signer)[1] == Path(copy)
    with pytest.raises(SignatureError, match="has no trusted time stamp"):
        find_checkpoint(copy, run.uri, signed_by=TrustedSigner(ca))
    assert main(["verify", run.uri, "--timestamped-by", root]) == 1
    assert "name whose they are with --signed-by" in capsys.readouterr().err
    assert main(["audit", run.uri, "--timestamp", "http://127.0.0.1:9"]) == 1
    assert "name a key with --sign" in capsys.readouterr().err


def test_the_commands_sign_as_an_identity_and_check_it(
    run: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--storage.uri", f"{run.uri}/../.."]
    for step in (3, 6):
        for name in (MODEL, TRAINING):
            (checkpoint_folder(run, step) / name).unlink()
    with running_sigstore(tmp_path / "sigstore") as sigstore:
        trusting = ["--trust-config", str(sigstore.trust_config())]
        token = ["--identity-token", str(sigstore.token("release@example.com"))]
        assert main(["sign", "tiny@8", "--keyless", *token, *trusting, *where]) == 0
        provider = sigstore.provider
    identity = ["--identity", "release@example.com", "--identity-provider", provider, *trusting]
    assert main(["verify", run.uri, *identity]) == 0
    named = {"identity": identity[1], "identity_provider": provider, "trust_config": trusting[1]}
    file = tmp_path / "release.json"
    file.write_text(json.dumps(named))
    assert main(["verify", run.uri, "--signed-by", str(file)]) == 0
    uri = str(checkpoint_folder(run, 8))
    storage = StorageConfig(uri=run.uri, signed_by=str(file))
    assert find_checkpoint(uri, run.uri, signed_by=storage.signer)[0] == uri
    capsys.readouterr()
    identity[1] = "other@example.com"
    assert main(["verify", run.uri, *identity]) == 1
    assert "was not signed by other@example.com at" in capsys.readouterr().out
    for command, message in (
        (["verify", run.uri, "--identity", "x"], "belong together: name both"),
        (["verify", run.uri, *trusting], "--trust-config is for identities"),
        (["sign", uri, "--key", "x", *token], "are for --keyless"),
        (["sign", uri, "--keyless", "--timestamp", "http://127.0.0.1:9"], "are for --key"),
    ):
        assert main(command) == 1
        assert message in capsys.readouterr().err


def test_the_commands_sign_and_verify(
    run: Storage, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--storage.uri", f"{run.uri}/../.."]
    private, public = made_keys(tmp_path, "new")
    assert main(["sign", "tiny@6", "--key", str(private), *where]) == 0
    assert main(["verify", run.uri, "--signed-by", str(public)]) == 1
    said = capsys.readouterr()
    assert "parameterHash" in said.out
    assert "config.yaml" not in said.out
    assert "step-000000003-0001" in said.out
    assert "step-000000006-0001: " not in said.out
    assert main(["verify", run.uri, "--signed-by", str(keys[1])]) == 1
    assert main(["sign", "tiny@6", "--key", str(tmp_path / "gone"), *where]) == 1
    assert "is no private key to sign with" in capsys.readouterr().err

"""An identity signs without a key of its own; whoever trusts its provider and a Sigstore instance
knows who it was."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from model.signing.identity import SigningIdentity, TrustedIdentity
from model.signing.signature import (
    MODEL,
    TRAINING,
    SignatureError,
    SigningKey,
    TrustedSigner,
    check,
    sign,
    trusted_by_file,
)
from raymill.errors import UserError
from tests.signing_keys import made_keys
from tests.sigstore_instance import JOB, Sigstore, running_sigstore

OURS = "release@example.com"
TRAINED = {"runDetails": {"metadata": {"step": "6"}}}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sigstore]:
    with running_sigstore(tmp_path_factory.mktemp("sigstore") / "instance") as instance:
        yield instance


@pytest.fixture
def instance(started: Sigstore) -> Sigstore:
    started.down = ""
    started.stamps.change = lambda _, answer: answer
    return started


@pytest.fixture
def signed(instance: Sigstore, folder: Path) -> TrustedIdentity:
    """Who has signed the folder."""
    sign(folder, SigningIdentity(instance.token(OURS), instance.trust_config()), TRAINED)
    return TrustedIdentity(OURS, instance.provider, instance.trust_config())


def test_the_librarys_own_command_verifies_who_signed(
    instance: Sigstore, signed: TrustedIdentity, folder: Path
) -> None:
    assert check(folder, signed) == TRAINED
    command = [sys.executable, "-m", "model_signing", "verify", "sigstore", str(folder)]
    command += ["--signature", str(folder / MODEL), "--ignore-paths", str(folder / TRAINING)]
    command += ["--identity", OURS, "--identity_provider", instance.provider]
    command += ["--trust_config", str(instance.trust_config())]
    subprocess.run(command, check=True, capture_output=True)


def test_another_identity_and_another_provider_are_refused(
    instance: Sigstore, signed: TrustedIdentity, folder: Path
) -> None:
    config = instance.trust_config()
    with pytest.raises(SignatureError, match=r"was not signed by other@example\.com at"):
        check(folder, TrustedIdentity("other@example.com", instance.provider, config))
    with pytest.raises(SignatureError, match=r"release@example\.com at https://idp\.example \("):
        check(folder, TrustedIdentity(OURS, "https://idp.example", config))


def test_another_instance_vouches_for_nobody_here(
    signed: TrustedIdentity, folder: Path, tmp_path: Path
) -> None:
    with running_sigstore(tmp_path / "other") as other:
        elsewhere = TrustedIdentity(OURS, signed.provider, other.trust_config())
        with pytest.raises(SignatureError, match=r"model\.sig was not signed by"):
            check(folder, elsewhere)


def without_log(bundle: dict[str, Any]) -> None:
    bundle["verificationMaterial"]["tlogEntries"] = []


def without_stamp(bundle: dict[str, Any]) -> None:
    bundle["verificationMaterial"]["timestampVerificationData"]["rfc3161Timestamps"] = []


def with_another_payload(bundle: dict[str, Any]) -> None:
    payload = bundle["dsseEnvelope"]["payload"]
    bundle["dsseEnvelope"]["payload"] = (
        payload[:80] + ("A" if payload[80] != "A" else "B") + payload[81:]
    )


@pytest.mark.parametrize("change", [without_log, without_stamp, with_another_payload])
def test_a_bundle_that_was_altered_is_refused(
    signed: TrustedIdentity, folder: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    bundle = json.loads((folder / TRAINING).read_bytes())
    change(bundle)
    (folder / TRAINING).write_text(json.dumps(bundle))
    with pytest.raises(SignatureError, match=r"training\.sig was not signed by"):
        check(folder, signed)


def test_files_that_were_changed_since_are_named(signed: TrustedIdentity, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(999))
    with pytest.raises(SignatureError, match=r"model\.safetensors .* is another than was signed"):
        check(folder, signed)


def test_a_key_is_no_identity_and_an_identity_no_key(
    signed: TrustedIdentity, folder: Path, tmp_path: Path
) -> None:
    private, public = made_keys(tmp_path, "ours")
    with pytest.raises(SignatureError, match=r"was signed by an identity, and .* --identity"):
        check(folder, TrustedSigner(public))
    sign(folder, SigningKey(private), TRAINED)
    with pytest.raises(SignatureError, match=r"was not signed by release@example\.com"):
        check(folder, signed)
    (folder / MODEL).write_bytes(b"\xff")
    with pytest.raises(SignatureError, match=r"model\.sig is no signature"):
        check(folder, signed)


def test_what_gives_no_signature_is_said_and_nothing_is_signed(
    instance: Sigstore, folder: Path, tmp_path: Path
) -> None:
    before = sorted(folder.iterdir())

    def refused(message: str, *, token: Path | None = None, config: Path | None = None) -> None:
        who = SigningIdentity(token or instance.token(OURS), config or instance.trust_config())
        with pytest.raises(UserError, match=message):
            sign(folder, who, TRAINED)
        assert sorted(folder.iterdir()) == before

    for part in ("provider", "authority", "log"):
        instance.down = part
        refused(r"Sigstore gives no signature \(.*503.*\): .*; nothing was signed")
    instance.down = ""
    instance.stamps.change = lambda _, answer: None
    refused("no signature .*signed timestamp")
    instance.stamps.change = lambda _, answer: answer
    refused("no signature .* validity|malformed", token=instance.token(OURS, lasts_s=-60))
    (tmp_path / "nonsense").write_text("nonsense")
    refused("no signature .*malformed", token=tmp_path / "nonsense")
    refused("expected a file with an identity token", token=tmp_path / "gone")
    refused("is no trust configuration", config=tmp_path / "nonsense")
    refused("is no trust configuration", config=tmp_path / "gone")


def test_a_job_signs_as_what_the_ci_lends_it(
    instance: Sigstore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "job")
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"{instance.url}/lent?for=job")
    sign(folder, SigningIdentity(trust_config=instance.trust_config()), TRAINED)
    trusted = TrustedIdentity(JOB, instance.provider, instance.trust_config())
    assert check(folder, trusted) == TRAINED
    monkeypatch.delenv("GITHUB_ACTIONS")
    with pytest.raises(UserError, match="nobody lends this process an identity"):
        sign(folder, SigningIdentity(trust_config=instance.trust_config()), TRAINED)


def test_a_file_names_whom_to_trust(
    instance: Sigstore, signed: TrustedIdentity, folder: Path, tmp_path: Path
) -> None:
    named = {"identity": OURS, "identity_provider": instance.provider}
    file = instance.trust_config().parent / "release.json"
    file.write_text(json.dumps(named | {"trust_config": "trust_config.json"}))
    trusted = trusted_by_file(str(file), None)
    assert trusted == signed
    assert check(folder, trusted) == TRAINED
    with pytest.raises(UserError, match=r"leave tsa\.pem out"):
        trusted_by_file(str(file), "tsa.pem")
    for wrong in ({"identity": OURS}, named | {"issuer": "x"}, named | {"trust_config": 1}):
        file.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="names no identity: expected JSON with identity"):
            trusted_by_file(str(file), None)
    assert trusted_by_file(None, None) is None
    assert trusted_by_file("x.pem", "y.pem") == TrustedSigner(Path("x.pem"), Path("y.pem"))

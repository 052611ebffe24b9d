"""A time stamp says when a signature was there: what it proves lasts longer than a certificate."""

import base64
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from sigstore.models import TrustedRoot, VerificationMaterial
from sigstore.verify import Verifier
from sigstore_models.bundle.v1 import Bundle

from model.signing import time_stamp
from model.signing.signature import (
    MODEL,
    TRAINING,
    SignatureError,
    SigningKey,
    TrustedSigner,
    check,
    sign,
)
from raymill.errors import UserError
from tests.signing_keys import made_certificates, made_keys
from tests.timestamp_authority import Authority, made_authority, running

DAY_S = 24 * 3600
TRAINED = {"runDetails": {"metadata": {"step": "6"}}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_authority(tmp_path_factory.mktemp("stamps") / "authority").folder


@pytest.fixture
def authority(made: Path) -> Iterator[Authority]:
    with running(Authority(made)) as server:
        yield server


def stamps_of(file: Path) -> tuple[bytes, list[bytes]]:
    """Returns the signature of a bundle, and its time stamps."""
    bundle = json.loads(file.read_bytes())
    stamped = bundle["verificationMaterial"]["timestampVerificationData"]["rfc3161Timestamps"]
    signature = base64.b64decode(bundle["dsseEnvelope"]["signatures"][0]["sig"])
    return signature, [base64.b64decode(stamp["signedTimestamp"]) for stamp in stamped]


def restamp(file: Path, change: Callable[[bytes], bytes]) -> None:
    bundle = json.loads(file.read_bytes())
    [stamp] = bundle["verificationMaterial"]["timestampVerificationData"]["rfc3161Timestamps"]
    changed = change(base64.b64decode(stamp["signedTimestamp"]))
    stamp["signedTimestamp"] = base64.b64encode(changed).decode()
    file.write_text(json.dumps(bundle))


def test_a_stamp_is_verified_by_openssl_and_the_file_by_the_librarys_command(
    authority: Authority, folder: Path, tmp_path: Path
) -> None:
    private, public = made_keys(tmp_path, "ours")
    sign(folder, SigningKey(private, timestamp_url=authority.url), TRAINED)
    for name in (MODEL, TRAINING):
        signature, [stamp] = stamps_of(folder / name)
        (tmp_path / "signature").write_bytes(signature)
        (tmp_path / "stamp.tsr").write_bytes(stamp)
        verifying = ["openssl", "ts", "-verify", "-data", "signature", "-in", "stamp.tsr"]
        verifying += ["-CAfile", str(authority.root)]
        subprocess.run(verifying, cwd=tmp_path, check=True, capture_output=True)
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder)]
    command += ["--signature", str(folder / MODEL), "--public_key", str(public)]
    command += ["--ignore-paths", str(folder / TRAINING)]
    subprocess.run(command, check=True, capture_output=True)
    assert check(folder, TrustedSigner(public, timestamped_by=authority.root)) == TRAINED
    assert check(folder, TrustedSigner(public)) == TRAINED


def der(file: Path) -> bytes:
    return x509.load_pem_x509_certificate(file.read_bytes()).public_bytes(Encoding.DER)


def trusted_root(authority: Path) -> TrustedRoot:
    """What a Sigstore instance has its clients trust, with this authority."""

    def encoded(content: bytes) -> str:
        return base64.b64encode(content).decode()

    root = x509.load_pem_x509_certificate((authority / "authority.pem").read_bytes())
    key = root.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    always = {"start": "2020-01-01T00:00:00Z"}
    chain = [
        {"rawBytes": encoded(der(authority / name))}
        for name in ("certificate.pem", "authority.pem")
    ]
    issuer = {
        "subject": {"organization": "raymill", "commonName": "stamps"},
        "uri": "http://127.0.0.1",
        "certChain": {"certificates": chain},
        "validFor": always,
    }
    log = {
        "baseUrl": "http://127.0.0.1",
        "hashAlgorithm": "SHA2_256",
        "publicKey": {
            "rawBytes": encoded(key),
            "keyDetails": "PKIX_ECDSA_P256_SHA_256",
            "validFor": always,
        },
        "logId": {"keyId": encoded(hashlib.sha256(key).digest())},
    }
    content = {
        "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
        "tlogs": [log],
        "ctlogs": [log],
        "certificateAuthorities": [issuer],
        "timestampAuthorities": [issuer],
    }
    file = authority / "trusted_root.json"
    file.write_text(json.dumps(content))
    return TrustedRoot.from_file(str(file))


@pytest.mark.parametrize("sends_chain", [False, True])
def test_sigstores_own_verifier_reads_the_stamp(
    authority: Authority, folder: Path, tmp_path: Path, sends_chain: bool
) -> None:
    authority.sends_chain = sends_chain
    private, _ = made_keys(tmp_path, "ours")
    sign(folder, SigningKey(private, timestamp_url=authority.url), TRAINED)
    verifier = Verifier(trusted_root=trusted_root(authority.folder))

    def times(signature: bytes) -> list[Any]:
        material = Bundle.from_json((folder / MODEL).read_bytes()).verification_material
        asked: Any = SimpleNamespace(
            verification_material=VerificationMaterial(material), signature=signature
        )
        return [verified.time for verified in verifier._verify_timestamp_authority(asked)]

    signature, _ = stamps_of(folder / MODEL)
    [time] = times(signature)
    assert abs(time - datetime.now(UTC)) < time_stamp.CLOCK_TOLERANCE
    assert times(b"another") == []


def test_a_certificate_that_ended_since_counts_as_of_its_stamp(
    authority: Authority, folder: Path, tmp_path: Path
) -> None:
    """It ended a minute ago; the authority, whose clock is two minutes late, has stamped it before."""
    authority.offset_s = -120
    key, certificate, ca = made_certificates(tmp_path, last_day=-60 / DAY_S)
    sign(folder, SigningKey(key, certificates=certificate, timestamp_url=authority.url), TRAINED)
    assert check(folder, TrustedSigner(ca, timestamped_by=authority.root)) == TRAINED
    with pytest.raises(SignatureError, match=r"that ended on .* or name the root of the authority"):
        check(folder, TrustedSigner(ca))


@pytest.mark.parametrize(
    ("days", "message"),
    [((-20, -10), "ended on .* stamped on"), ((10, 20), "begins on .* stamped")],
)
def test_a_certificate_that_did_not_hold_when_it_was_stamped_is_refused(
    authority: Authority, folder: Path, tmp_path: Path, days: tuple[int, int], message: str
) -> None:
    key, certificate, ca = made_certificates(tmp_path, first_day=days[0], last_day=days[1])
    sign(folder, SigningKey(key, certificates=certificate, timestamp_url=authority.url), TRAINED)
    with pytest.raises(SignatureError, match=message):
        check(folder, TrustedSigner(ca, timestamped_by=authority.root))


def test_a_certificate_whose_authority_had_ended_is_refused(folder: Path, tmp_path: Path) -> None:
    key, certificate, ca = made_certificates(tmp_path, authority_ends_day=-0.5)
    sign(folder, SigningKey(key, certificates=certificate), TRAINED)
    with pytest.raises(SignatureError, match=r"to which none in .* leads \(.*expired"):
        check(folder, TrustedSigner(ca))


@pytest.fixture
def stamped(authority: Authority, folder: Path, tmp_path: Path) -> TrustedSigner:
    """Whose stamped signature the folder has."""
    private, public = made_keys(tmp_path, "ours")
    sign(folder, SigningKey(private, timestamp_url=authority.url), TRAINED)
    return TrustedSigner(public, timestamped_by=authority.root)


def test_the_stamp_of_another_authority_is_refused(
    stamped: TrustedSigner, folder: Path, tmp_path: Path
) -> None:
    other = made_authority(tmp_path / "other")
    with pytest.raises(SignatureError, match=r"that no authority in .*authority\.pem made"):
        check(folder, TrustedSigner(stamped.public_key, timestamped_by=other.root))


def test_the_stamp_of_another_signature_is_refused(stamped: TrustedSigner, folder: Path) -> None:
    _, [other] = stamps_of(folder / TRAINING)
    restamp(folder / MODEL, lambda _: other)
    with pytest.raises(SignatureError, match=r"model\.sig has the time stamp of another signature"):
        check(folder, stamped)


def test_a_stamp_that_was_altered_is_refused_in_a_sentence(
    stamped: TrustedSigner, folder: Path
) -> None:
    before = (folder / MODEL).read_bytes()
    _, [stamp] = stamps_of(folder / MODEL)
    for place in range(0, len(stamp), 37):
        (folder / MODEL).write_bytes(before)
        restamp(
            folder / MODEL,
            lambda _, at=place: stamp[:at] + bytes([stamp[at] ^ 1]) + stamp[at + 1 :],
        )
        with pytest.raises(SignatureError, match=r"model\.sig has (the|a) time stamp"):
            check(folder, stamped)
    (folder / MODEL).write_bytes(before)
    restamp(folder / MODEL, lambda _: b"no stamp")
    with pytest.raises(SignatureError, match="cannot be read"):
        check(folder, stamped)


def test_a_signature_without_a_stamp_is_refused_where_an_authority_is_named(
    folder: Path, made: Path, tmp_path: Path
) -> None:
    private, public = made_keys(tmp_path, "ours")
    sign(folder, SigningKey(private), TRAINED)
    with pytest.raises(SignatureError, match="has no time stamp: sign again with --timestamp"):
        check(folder, TrustedSigner(public, timestamped_by=made / "authority.pem"))


def test_a_file_that_names_no_authority_is_refused(
    stamped: TrustedSigner, folder: Path, made: Path, tmp_path: Path
) -> None:
    for file, message in (
        (tmp_path / "gone.pem", "expected a PEM file with its root"),
        (stamped.public_key, "expected a PEM file with its root"),
        (made / "certificate.pem", "has no root certificate"),
    ):
        with pytest.raises(UserError, match=message):
            check(folder, TrustedSigner(stamped.public_key, timestamped_by=file))


def test_a_stamp_that_is_still_to_come_is_refused(
    authority: Authority, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority.offset_s = 10 * DAY_S
    private, public = made_keys(tmp_path, "ours")
    with monkeypatch.context() as patch:  # as where the signer's clock is as wrong
        patch.setattr(time_stamp, "CLOCK_TOLERANCE", timedelta(days=11))
        sign(folder, SigningKey(private, timestamp_url=authority.url), TRAINED)
    with pytest.raises(SignatureError, match="still to come by this machine's clock"):
        check(folder, TrustedSigner(public, timestamped_by=authority.root))


def refused(authority: Authority, folder: Path, private: Path, message: str) -> None:
    """Signing ends with this message, and leaves what there was."""
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UserError, match=message):
        sign(folder, SigningKey(private, timestamp_url=authority.url), TRAINED)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_an_authority_that_gives_no_stamp_is_named_and_nothing_is_signed(
    authority: Authority, folder: Path, tmp_path: Path
) -> None:
    private, public = made_keys(tmp_path, "ours")
    authority.change = lambda _, answer: b"<html>" + answer
    refused(
        authority, folder, private, r"answered with what is no time stamp .* nothing was signed"
    )
    authority.change = lambda _, answer: b""
    refused(authority, folder, private, "answered with what is no time stamp")
    authority.change = lambda _, answer: bytes(time_stamp.MAX_ANSWER_BYTES + 1)
    refused(authority, folder, private, "answered with over 1,048,576 bytes")
    authority.change = lambda _, answer: None
    refused(authority, folder, private, "answered with HTTP 503")
    authority.change = lambda _, answer: authority.answers[0]
    refused(authority, folder, private, "the time stamp of another request")
    authority.change, authority.num_asked = (
        lambda number, answer: None if number == 2 else answer,
        0,
    )
    refused(authority, folder, private, "answered with HTTP 503")
    assert authority.num_asked == 2
    authority.change = lambda _, answer: answer
    authority.offset_s = 400
    refused(authority, folder, private, r"this machine's clock says .*: set the clock")
    authority.offset_s = 0
    sign(folder, SigningKey(private, timestamp_url=authority.url), TRAINED)
    authority.url = "http://127.0.0.1:9/tsr"
    refused(authority, folder, private, r"127\.0\.0\.1:9/tsr cannot be asked .* nothing was signed")
    for url in ("tsa.example", "ftp://tsa.example", "http://"):
        authority.url = url
        refused(authority, folder, private, "expected the URL of a time stamp authority")
    assert check(folder, TrustedSigner(public, timestamped_by=authority.root)) == TRAINED


def test_a_request_that_the_authority_rejects_says_why(
    authority: Authority, folder: Path, tmp_path: Path
) -> None:
    """OpenSSL's own refusal: it takes no SHA-256."""
    authority.settings = "digests = sha512\n"
    private, _ = made_keys(tmp_path, "ours")
    refused(authority, folder, private, r"refused \(status 2: .*\)")


def test_an_authority_whose_chain_is_in_another_order_is_asked_without_it(
    authority: Authority, folder: Path, tmp_path: Path
) -> None:
    authority.sends_chain = True
    private, public = made_keys(tmp_path, "ours")
    sign(folder, SigningKey(private, timestamp_url=authority.url), TRAINED)
    assert authority.num_asked == 4
    with pytest.raises(SignatureError, match="does not show its authority's own certificate: add"):
        check(folder, TrustedSigner(public, timestamped_by=authority.root))
    known = tmp_path / "known.pem"
    leaf = (authority.folder / "certificate.pem").read_bytes()
    known.write_bytes(authority.root.read_bytes() + leaf)
    assert check(folder, TrustedSigner(public, timestamped_by=known)) == TRAINED
    other = made_authority(tmp_path / "other")
    known.write_bytes(other.root.read_bytes() + leaf)
    with pytest.raises(SignatureError, match=r"that no authority in .*known\.pem made"):
        check(folder, TrustedSigner(public, timestamped_by=known))

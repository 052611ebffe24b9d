"""Signs a checkpoint's folder, and tells whether the holder of a key signed it, by OpenSSF's model
signing (github.com/sigstore/model-transparency).

    model.sig      all files of the folder; `model_signing verify` accepts it too
    training.sig   an in-toto Statement about what manifest.json lists: what it was trained from

Both are DSSE envelopes in Sigstore bundles, which may have a time stamp of the signature.
"""

import base64
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from model.files.checkpoint_folder import MANIFEST, fingerprint, manifest_files
from model.signing.certificates import purpose_problem, require_path
from model.signing.floor import NO_FLOOR, Floor
from model.signing.identity import (
    IdentityError,
    SigningIdentity,
    TrustedIdentity,
    failures_named,
)
from model.signing.optional import library
from model.signing.time_stamp import TimeStampError, request_stamp, stamped_time
from raymill.errors import CheckpointError, UserError

MODEL, TRAINING = "model.sig", "training.sig"
TRAINING_TYPE = "urn:raymill:training:v1"
"""The type of the Statement's predicate."""
PASSPHRASE_VARIABLE = "RAYMILL_KEY_PASSPHRASE"  # noqa: S105 (its name)
_PKCS11 = "pkcs11:"
_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"
_NAME_AUTHORITY = (
    ", or name the root of the authority that stamped it (--timestamped-by, storage.timestamped_by)"
)
CURVES = "an elliptic curve P-256, P-384 or P-521"


class SignatureError(CheckpointError):
    """The checkpoint is not what the holder of a key has signed."""


class FloorError(SignatureError):
    """The checkpoint is signed, and older than the oldest that is accepted."""


@dataclass(frozen=True)
class SigningKey:
    """A private key: a PEM file, or one that never leaves its token, by its URI of PKCS #11 (RFC
    7512), such as `pkcs11:token=raymill;object=release?pin-source=/run/pin`."""

    place: Path | str
    passphrase: str | None = None  # of a file
    # A PEM file with the key's certificate, and behind it those that lead to a trusted one
    certificates: Path | None = None
    timestamp_url: str | None = None  # of the authority that stamps signatures

    @classmethod
    def at(
        cls,
        place: Path | str,
        certificates: Path | None = None,
        *,
        timestamp_url: str | None = None,
    ) -> Self:
        """Returns the key, whose passphrase is in the environment if it has one."""
        return cls(place, os.environ.get(PASSPHRASE_VARIABLE), certificates, timestamp_url)


@dataclass(frozen=True)
class TrustedSigner:
    """Whose signatures count."""

    public_key: Path  # a PEM file, with certificates in its place those below them too
    # A PEM file with the root of a time stamp authority: each signature must have its stamp, and a
    # certificate counts as of then instead of now
    timestamped_by: Path | None = None
    floor: Floor = NO_FLOOR  # below which their signatures do not count

    @property
    def shown(self) -> str:
        return str(self.public_key)


Signer = SigningKey | SigningIdentity
Trusted = TrustedSigner | TrustedIdentity


def trusted_by_file(
    file: Path | str | None, timestamped_by: Path | str | None, *, floor: Floor = NO_FLOOR
) -> Trusted | None:
    """Returns whom a file names: the holder of a public key, those with certificates, or an
    identity; None without a file. Raises `UserError`."""
    if file is None:
        return None
    identity = TrustedIdentity.in_file(Path(file))
    if identity is None:
        return TrustedSigner(Path(file), Path(timestamped_by) if timestamped_by else None, floor)
    if timestamped_by:
        raise UserError(
            f"{file} names an identity, whose signatures its Sigstore instance stamps: leave {timestamped_by} out"
        )
    return replace(identity, floor=floor)


@dataclass(frozen=True)
class _Payload:
    """The argument of the library's signers: they ask for the statement alone."""

    statement: Any


class StatementSigner:
    """Signs in-toto Statements: what is said of some bytes that are known by their hash."""

    def __init__(self, key: Signer) -> None:
        """Raises `UserError` for a key that does not sign."""
        self._signer = _signing(key)._signer

    def signed(
        self, kind: str, *, subject: str, sha256: str, predicate: dict[str, Any]
    ) -> dict[str, Any]:
        """Returns the bundle of a Statement whose predicate is of this type."""
        described = library("in_toto_attestation.v1.resource_descriptor").ResourceDescriptor(
            name=subject, digest={"sha256": sha256}
        )
        statement = library("in_toto_attestation.v1.statement").Statement(
            [described.pb], kind, predicate
        )
        bundle: dict[str, Any] = json.loads(self._signer.sign(_Payload(statement)).bundle.to_json())
        return bundle


def sign(folder: Path, key: Signer, training: dict[str, Any]) -> None:
    """Writes both files into a folder with a manifest, over earlier ones. `training` is the
    predicate of the Statement. Raises `UserError` for a key that does not sign, or an authority
    that does not stamp; then neither file is written."""
    manifest = fingerprint(folder / MANIFEST)["sha256"]
    with failures_named():
        bundle = StatementSigner(key).signed(
            TRAINING_TYPE, subject=MANIFEST, sha256=manifest, predicate=training
        )
        statement = _stamped(json.dumps(bundle), key)
        files = _bundle_of_files(folder, key)
    (folder / TRAINING).write_text(statement, encoding="utf-8")
    (folder / MODEL).write_text(files, encoding="utf-8")


def sign_files(folder: Path, key: Signer) -> list[str]:
    """Signs the files of any folder, and returns the signature's name. Raises `UserError`."""
    (folder / MODEL).write_text(_bundle_of_files(folder, key), encoding="utf-8")
    return [MODEL]


def _bundle_of_files(folder: Path, key: Signer) -> str:
    hashing = library("model_signing.hashing").Config()
    hashing.set_ignored_paths(paths=[folder / MODEL, folder / TRAINING])
    signing = _signing(key).set_hashing_config(hashing)
    with tempfile.TemporaryDirectory(prefix="raymill-sign-") as scratch:
        signing.sign(folder, Path(scratch) / MODEL)
        return _stamped((Path(scratch) / MODEL).read_text(encoding="utf-8"), key)


def _stamped(bundle: str, key: Signer) -> str:
    """Returns the bundle with a time stamp of its signature, if the key has an authority."""
    if isinstance(key, SigningIdentity) or key.timestamp_url is None:
        return bundle
    content = json.loads(bundle)
    [signature] = content["dsseEnvelope"]["signatures"]
    stamp = request_stamp(base64.b64decode(signature["sig"]), key.timestamp_url)
    content["verificationMaterial"]["timestampVerificationData"] = {
        "rfc3161Timestamps": [{"signedTimestamp": base64.b64encode(stamp).decode()}]
    }
    return json.dumps(content)


def _signing(key: Signer) -> Any:
    signing = library("model_signing.signing").Config()
    if isinstance(key, SigningIdentity):
        return key.signing(signing)
    if str(key.place).startswith(_PKCS11):
        return _signing_in_token(signing, str(key.place), key.certificates)
    if key.certificates:
        return _signing_with_certificate(signing, key.place, key.certificates)
    password: Any = key.passphrase.encode() if key.passphrase else None
    try:
        return signing.use_elliptic_key_signer(private_key=key.place, password=password)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{key.place} is no private key to sign with: expected {CURVES} in a PEM file, and its passphrase "
            f"in {PASSPHRASE_VARIABLE} if it has one ({error})"
        ) from None


def _signing_with_certificate(signing: Any, key: Path | str, certificates: Path) -> Any:
    try:
        return signing.use_certificate_signer(
            private_key=key, signing_certificate=certificates, certificate_chain=[certificates]
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{key} does not sign with {certificates}: expected {CURVES} in a PEM file without a passphrase, and "
            f"a PEM file that begins with its certificate ({error})"
        ) from None


def _signing_in_token(signing: Any, uri: str, certificates: Path | None) -> Any:
    refusals = (library("PyKCS11").PyKCS11Error, RuntimeError, ValueError, OSError)
    try:
        if certificates is None:
            return signing.use_pkcs11_signer(pkcs11_uri=uri)
        return signing.use_pkcs11_certificate_signer(
            pkcs11_uri=uri, signing_certificate=certificates, certificate_chain=[certificates]
        )
    except refusals as error:
        shown = uri.partition("?")[0]  # a PIN may follow
        raise UserError(
            f"{shown} leads to no private key to sign with: expected the token and object of {CURVES}, and behind a "
            f"question mark module-path, and pin-source or pin-value ({error})"
        ) from None


def is_of_training(name: str) -> bool:
    """Tells whether a file has the training state, which what only computes is without."""
    return name.startswith("train_state")


def check(
    folder: Path, signer: Trusted, *, may_lack: Callable[[str], bool] = is_of_training
) -> dict[str, Any]:
    """Returns the predicate of the training's Statement, once the folder's files are those that the
    trusted signer has signed; an empty dict for folders without a manifest (saved by transformers).
    Files that `manifest.json` lists are compared with that alone: the caller verifies them against
    it. What `may_lack` tells may be missing.

    Raises `SignatureError`, its `FloorError` for one that is older than the signer's floor, and
    `UserError` for a file that is no public key.
    """
    verifying = _verifier(signer)
    manifest = _manifest(verifying, folder / MODEL, signer)
    signed = {item.identifier: item.digest.digest_hex for item in manifest.resource_descriptors()}
    has_manifest = (folder / MANIFEST).exists()
    listed = manifest_files(folder) if has_manifest else {}
    # A link to a folder, into which nothing looks, counts as a file
    present = [path for path in folder.rglob("*") if path.is_file() or path.is_symlink()]
    here = {path.relative_to(folder).as_posix() for path in present}
    for name in sorted((here | signed.keys()) - {MODEL, TRAINING}):
        if name not in signed:
            raise SignatureError(f"{name} in {folder} was not there when {MODEL} was made")
        if name not in here and may_lack(name):
            continue
        if name not in here:
            raise SignatureError(f"{name} is missing in {folder}, and {MODEL} has it")
        found = listed.get(name) or fingerprint(folder / name)
        if found["sha256"] != signed[name]:
            raise SignatureError(
                f"{name} in {folder} is another than was signed: its SHA-256 is {found['sha256'][:12]}…, {MODEL} has "
                f"{signed[name][:12]}…"
            )
    training = _training(verifying, folder, signer) if has_manifest else {}
    if problem := signer.floor.problem(training):
        raise FloorError(f"{folder} {problem}")
    return training


def _training(verifying: Any, folder: Path, signer: Trusted) -> dict[str, Any]:
    content = _verified(verifying, folder / TRAINING, signer)
    training = _predicate(content, TRAINING_TYPE, fingerprint(folder / MANIFEST)["sha256"])
    if training is None:
        raise SignatureError(
            f"{TRAINING} in {folder} is about another checkpoint: sign this one with `raymill sign`"
        )
    return training


def _predicate(content: dict[str, Any], kind: str, sha256: str) -> dict[str, Any] | None:
    """Returns what a Statement says; None where it is of another type or about other bytes."""
    subjects = [subject["digest"].get("sha256") for subject in content.get("subject", [])]
    if content.get("predicateType") != kind or subjects != [sha256]:
        return None
    predicate: dict[str, Any] = content["predicate"]
    return predicate


def signed_statement(bundle: Path, public_key: Path) -> dict[str, Any]:
    """Returns the Statement in a file, once the holder of the key has signed it. Raises
    `SignatureError`."""
    signer = TrustedSigner(public_key)
    return _verified(_verifier(signer), bundle, signer)


def statement_in(folder: Path) -> dict[str, Any] | None:
    """Returns what a folder that `check` has found signed states of its training, without the run's
    settings, which name places of one's own; None where nothing is stated."""
    if not (folder / TRAINING).exists():
        return None
    predicate = predicate_in((folder / TRAINING).read_bytes())
    return {
        "materials": predicate["buildDefinition"]["resolvedDependencies"],
        **predicate["runDetails"],
    }


def predicate_in(bundle: bytes) -> dict[str, Any]:
    """Returns the training that a bundle states, for any signer. Raises `SignatureError` for
    another file."""
    try:
        payload = json.loads(base64.b64decode(json.loads(bundle)["dsseEnvelope"]["payload"]))
        predicate: dict[str, Any] = payload["predicate"]
    except (ValueError, KeyError, TypeError) as error:
        raise SignatureError(f"{TRAINING} is no statement ({type(error).__name__})") from None
    return predicate


def _verifier(signer: Trusted) -> Any:
    verifying = library("model_signing.verifying").Config()
    if isinstance(signer, TrustedIdentity):
        return signer.verifying(verifying)
    public_key = signer.public_key
    try:
        if _CERTIFICATE in public_key.read_bytes():
            return verifying.use_certificate_verifier(certificate_chain=[public_key])
        return verifying.use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{public_key} is no public key: expected that of {CURVES}, or certificates, in a PEM file ({error})"
        ) from None


def _manifest(verifying: Any, path: Path, signer: Trusted) -> Any:
    """Returns the files that a bundle signs, with their hashes."""
    content = _verified(verifying, path, signer)
    try:
        return library("model_signing._signing.signing").dsse_payload_to_manifest(content)
    except (KeyError, TypeError, ValueError) as error:
        raise SignatureError(f"{path} does not say what it signs ({error})") from None


def _verified(verifying: Any, path: Path, signer: Trusted) -> dict[str, Any]:
    """Returns the in-toto Statement in a bundle, once the trusted signer has signed it."""
    if not path.is_file():
        raise SignatureError(
            f"{path.parent} is not signed: expected {path.name}, as `raymill sign` makes it"
        )
    if isinstance(signer, TrustedIdentity):
        try:
            return dict(json.loads(signer.payload(verifying, path)))
        except IdentityError as error:
            raise SignatureError(f"{path} {error}") from None
    key = signer.public_key
    try:
        signature = library("model_signing._signing.sign_sigstore_pb").Signature.read(path)
        _require_kind(signature.bundle.verification_material, path, key)
        _, payload = verifying._verifier._verify_signed_content(signature)
        _require_valid(signature.bundle, path, signer)
        content: dict[str, Any] = json.loads(payload)
        return content
    except library("cryptography.exceptions").InvalidSignature:
        raise SignatureError(f"{path} was altered, or not signed with the key of {key}") from None
    except library("OpenSSL.crypto").X509StoreContextError as error:
        raise SignatureError(
            f"{path} was signed with a certificate to which none in {key} leads ({error})"
        ) from None
    except TimeStampError as error:
        raise SignatureError(f"{path} {error}") from None
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if "Key mismatch" in str(error):
            raise SignatureError(f"{path} was signed with another key than that of {key}") from None
        raise SignatureError(f"{path} is no signature ({type(error).__name__})") from None


def _require_kind(material: Any, path: Path, trusted: Path) -> None:
    """Raises `SignatureError` where a certificate has signed and a key is trusted, or the other way
    round."""
    if material.certificate is not None:
        raise SignatureError(
            f"{path} was signed by an identity, and {trusted} has a key or certificates: name the identity and its "
            "provider (--identity, --identity-provider)"
        )
    is_certified = material.x509_certificate_chain is not None
    if is_certified == (_CERTIFICATE in trusted.read_bytes()):
        return
    if is_certified:
        raise SignatureError(
            f"{path} was signed with a certificate, and {trusted} has a public key: name the file with a certificate "
            "that leads to it"
        )
    raise SignatureError(
        f"{path} was signed with a key that shows no certificate, and {trusted} has certificates: name the file with "
        "its public key, or sign again with --certificates"
    )


def _require_valid(bundle: Any, path: Path, signer: TrustedSigner) -> None:
    """Raises where the signing certificate is not for signing code; and where it, or one that leads
    to it from a trusted one, did not hold when a trusted authority stamped the signature. Where
    none is trusted nobody knows when that was, and they must hold now."""
    material = bundle.verification_material
    stamped = material.timestamp_verification_data
    stamps = [stamp.signed_timestamp for stamp in stamped.rfc3161_timestamps] if stamped else []
    at, is_stamped = datetime.now(UTC), signer.timestamped_by is not None
    if signer.timestamped_by is not None:
        [signature] = bundle.dsse_envelope.signatures
        at = stamped_time(stamps, signature.sig, signer.timestamped_by)
    if material.x509_certificate_chain is None:
        return
    x509 = library("cryptography.x509")
    leaf, *above = [
        x509.load_der_x509_certificate(certificate.raw_bytes)
        for certificate in material.x509_certificate_chain.certificates
    ]
    if problem := purpose_problem(leaf):
        raise SignatureError(f"{path} {problem}")
    begin, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    when = f"was stamped on {at:%Y-%m-%d %H:%M} UTC" if is_stamped else "has no trusted time stamp"
    if at > end:
        raise SignatureError(
            f"{path} was signed with a certificate that ended on {end:%Y-%m-%d}, and {when}: sign it again with one "
            f"that holds{_NAME_AUTHORITY if stamps and not is_stamped else ''}"
        )
    if at < begin:
        clock = (
            "" if is_stamped else f", and this machine's clock says {at:%Y-%m-%d}: set the clock"
        )
        raise SignatureError(
            f"{path} was signed with a certificate that begins on {begin:%Y-%m-%d}, and {when}{clock}"
        )
    require_path(leaf, above, signer.public_key, at)

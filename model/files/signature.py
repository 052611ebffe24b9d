"""Signs a checkpoint's folder, and tells whether whoever had a key signed it, by OpenSSF's model
signing (github.com/sigstore/model-transparency).

    model.sig      all files of the folder; `model_signing verify` accepts it too
    training.sig   an in-toto Statement about what manifest.json lists: what it was trained from

Both are DSSE envelopes in Sigstore bundles.
"""

import base64
import importlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from model.errors import UserError
from model.files.checkpoint_folder import MANIFEST, CheckpointError, fingerprint, manifest_files

MODEL, TRAINING = "model.sig", "training.sig"
TRAINING_TYPE = "urn:raymill:training:v1"
"""The type of the Statement's predicate."""
PASSPHRASE_VARIABLE = "RAYMILL_KEY_PASSPHRASE"  # noqa: S105 (its name)
_PKCS11 = "pkcs11:"
_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"
CURVES = "an elliptic curve P-256, P-384 or P-521"


class SignatureError(CheckpointError):
    """The checkpoint is not what the holder of a key has signed."""


@dataclass(frozen=True)
class SigningKey:
    """A private key: a PEM file, or one that never leaves its token, by its URI of PKCS #11 (RFC
    7512), such as `pkcs11:token=raymill;object=release?pin-source=/run/pin`."""

    place: Path | str
    passphrase: str | None = None  # of a file
    # A PEM file with the key's certificate, and behind it those that lead to a trusted one
    certificates: Path | None = None

    @classmethod
    def at(cls, place: Path | str, certificates: Path | None = None) -> Self:
        """Returns the key, whose passphrase is in the environment if it has one."""
        return cls(place, os.environ.get(PASSPHRASE_VARIABLE), certificates)


@dataclass(frozen=True)
class _Payload:
    """What the library's signers take: they ask for the statement alone."""

    statement: Any


class StatementSigner:
    """Signs in-toto Statements: what is said of some bytes that are known by their hash."""

    def __init__(self, key: SigningKey) -> None:
        """Raises `UserError` for a key that does not sign."""
        self._signer = _signing(key)._signer

    def signed(
        self, kind: str, *, subject: str, sha256: str, predicate: dict[str, Any]
    ) -> dict[str, Any]:
        """Returns the bundle of a Statement whose predicate is of this type."""
        described = _library("in_toto_attestation.v1.resource_descriptor").ResourceDescriptor(
            name=subject, digest={"sha256": sha256}
        )
        statement = _library("in_toto_attestation.v1.statement").Statement(
            [described.pb], kind, predicate
        )
        bundle: dict[str, Any] = json.loads(self._signer.sign(_Payload(statement)).bundle.to_json())
        return bundle


def sign(folder: Path, key: SigningKey, training: dict[str, Any]) -> None:
    """Writes both files into a folder with a manifest, over earlier ones. `training` is the
    predicate of the Statement. Raises `UserError` for a key that does not sign."""
    manifest = fingerprint(folder / MANIFEST)["sha256"]
    bundle = StatementSigner(key).signed(
        TRAINING_TYPE, subject=MANIFEST, sha256=manifest, predicate=training
    )
    (folder / TRAINING).write_text(json.dumps(bundle), encoding="utf-8")
    sign_files(folder, key)


def sign_files(folder: Path, key: SigningKey) -> list[str]:
    """Signs the files of any folder, and returns the signature's name. Raises `UserError`."""
    hashing = _library("model_signing.hashing").Config()
    hashing.set_ignored_paths(paths=[folder / MODEL, folder / TRAINING])
    _signing(key).set_hashing_config(hashing).sign(folder, folder / MODEL)
    return [MODEL]


def _signing(key: SigningKey) -> Any:
    signing = _library("model_signing.signing").Config()
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
    refusals = (_library("PyKCS11").PyKCS11Error, RuntimeError, ValueError, OSError)
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
    folder: Path, public_key: Path, *, may_lack: Callable[[str], bool] = is_of_training
) -> dict[str, Any]:
    """Returns the predicate of the training's Statement, once the folder's files are those that the
    holder of the key has signed; nothing of a folder without a manifest, as transformers saves it.
    Files that `manifest.json` lists are compared with that alone: the caller verifies them against
    it. What `may_lack` tells may be missing.

    Raises `SignatureError`, and `UserError` for a file that is no public key.
    """
    verifying = _verifier(public_key)
    manifest = _manifest(verifying, folder / MODEL, public_key)
    signed = {item.identifier: item.digest.digest_hex for item in manifest.resource_descriptors()}
    has_manifest = (folder / MANIFEST).exists()
    listed = manifest_files(folder) if has_manifest else {}
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
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
    return _training(verifying, folder, public_key) if has_manifest else {}


def _training(verifying: Any, folder: Path, public_key: Path) -> dict[str, Any]:
    content = _verified(verifying, folder / TRAINING, public_key)
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


def stated(bundle: Path, public_key: Path, *, kind: str, sha256: str) -> dict[str, Any]:
    """Returns the predicate of the Statement in a file, once it is of this type, about the bytes
    with this hash, and signed by the holder of the key. Raises `SignatureError`."""
    content = _verified(_verifier(public_key), bundle, public_key)
    predicate = _predicate(content, kind, sha256)
    if predicate is None:
        raise SignatureError(f"{bundle.name} is about something else")
    return predicate


def statement_in(folder: Path) -> dict[str, Any] | None:
    """Returns what a folder that `check` has found signed states of its training, without the run's
    settings, which name places of one's own; None where nothing is stated."""
    if not (folder / TRAINING).exists():
        return None
    bundle = json.loads((folder / TRAINING).read_bytes())
    predicate = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))["predicate"]
    return {
        "materials": predicate["buildDefinition"]["resolvedDependencies"],
        **predicate["runDetails"],
    }


def _verifier(public_key: Path) -> Any:
    verifying = _library("model_signing.verifying").Config()
    try:
        if _CERTIFICATE in public_key.read_bytes():
            return verifying.use_certificate_verifier(certificate_chain=[public_key])
        return verifying.use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{public_key} is no public key: expected that of {CURVES}, or certificates, in a PEM file ({error})"
        ) from None


def _manifest(verifying: Any, path: Path, public_key: Path) -> Any:
    """Returns the files that a bundle signs, with their hashes."""
    content = _verified(verifying, path, public_key)
    try:
        return _library("model_signing._signing.signing").dsse_payload_to_manifest(content)
    except (KeyError, TypeError, ValueError) as error:
        raise SignatureError(f"{path} does not say what it signs ({error})") from None


def _verified(verifying: Any, path: Path, public_key: Path) -> dict[str, Any]:
    """Returns the in-toto Statement in a bundle, once the key's holder has signed it."""
    if not path.is_file():
        raise SignatureError(
            f"{path.parent} is not signed: expected {path.name}, as `raymill sign` makes it"
        )
    try:
        signature = _library("model_signing._signing.sign_sigstore_pb").Signature.read(path)
        _, payload = verifying._verifier._verify_signed_content(signature)
        _require_valid_now(signature, path)
        content: dict[str, Any] = json.loads(payload)
        return content
    except _library("cryptography.exceptions").InvalidSignature:
        raise SignatureError(
            f"{path} was altered, or not signed with the key of {public_key}"
        ) from None
    except _library("OpenSSL.crypto").X509StoreContextError as error:
        raise SignatureError(
            f"{path} was signed with a certificate to which none in {public_key} leads ({error})"
        ) from None
    except SignatureError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if "Key mismatch" in str(error):
            raise SignatureError(
                f"{path} was signed with another key than that of {public_key}"
            ) from None
        raise SignatureError(f"{path} is no signature ({type(error).__name__})") from None


def _require_valid_now(signature: Any, path: Path) -> None:
    """Raises `SignatureError` where the signing certificate, if there is one, has ended or not
    begun: without a time stamp nobody knows when it signed."""
    chain = signature.bundle.verification_material.x509_certificate_chain
    if chain is None:
        return
    certificate = _library("cryptography.x509").load_der_x509_certificate(
        chain.certificates[0].raw_bytes
    )
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        raise SignatureError(
            f"{path} was signed with a certificate that ended on {certificate.not_valid_after_utc:%Y-%m-%d}: sign "
            "it again with one that holds"
        )
    if now < certificate.not_valid_before_utc:
        raise SignatureError(
            f"{path} was signed with a certificate that begins on {certificate.not_valid_before_utc:%Y-%m-%d}, and "
            f"this machine's clock says {now:%Y-%m-%d}: set the clock"
        )


def _library(name: str) -> Any:
    """Returns a module of what signs, which is optional, and takes half a second."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{error}: `pip install 'raymill[sign]'` brings what signs and checks signatures"
        ) from None

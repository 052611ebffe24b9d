"""Keys to sign with, in files and in a token of SoftHSM."""

import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

PIN = "1234"
SOFTHSM = "/usr/lib/softhsm/libsofthsm2.so"  # where Debian has it
P256 = bytes.fromhex("06082a8648ce3d030107")  # the curve's object identifier in DER


def made_keys(folder: Path, name: str, *, passphrase: str = "") -> tuple[Path, Path]:
    """Writes an elliptic curve's private and public key, and returns their files."""
    key = ec.generate_private_key(ec.SECP256R1())
    return _written(key, folder, name, passphrase)


def made_rsa_keys(folder: Path, name: str) -> tuple[Path, Path]:
    return _written(rsa.generate_private_key(65537, 2048), folder, name, "")


def _written(
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, folder: Path, name: str, passphrase: str
) -> tuple[Path, Path]:
    protection: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        protection = serialization.BestAvailableEncryption(passphrase.encode())
    pem = serialization.Encoding.PEM
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, protection))
    shape = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(pem, shape))
    return private, public


def made_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """Makes a token with a key that no file has. Returns the key's URI, and its public key's
    file."""
    import PyKCS11

    (folder / "tokens").mkdir()
    settings = folder / "softhsm2.conf"
    settings.write_text(f"directories.tokendir = {folder}/tokens\nobjectstore.backend = file\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(settings))
    making = ["softhsm2-util", "--init-token", "--free", "--label", "raymill"]
    subprocess.run([*making, "--pin", PIN, "--so-pin", PIN], check=True, capture_output=True)
    library = PyKCS11.PyKCS11Lib()
    library.load(SOFTHSM)
    slot = next(
        slot
        for slot in library.getSlotList(tokenPresent=True)
        if library.getTokenInfo(slot).label.strip() == "raymill"
    )
    session = library.openSession(slot, PyKCS11.CKF_SERIAL_SESSION | PyKCS11.CKF_RW_SESSION)
    session.login(PIN)
    public, _ = _generated(session)
    point = bytes(session.getAttributeValue(public, [PyKCS11.CKA_EC_POINT])[0])
    key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point[2:])
    session.logout()
    session.closeSession()
    file = folder / "token.pub"
    shape = serialization.PublicFormat.SubjectPublicKeyInfo
    file.write_bytes(key.public_bytes(serialization.Encoding.PEM, shape))
    return f"pkcs11:token=raymill;object=release?module-path={SOFTHSM}&pin-value={PIN}", file


def _generated(session: Any) -> tuple[Any, Any]:
    from PyKCS11 import (
        CK_TRUE,
        CKA_EC_PARAMS,
        CKA_ID,
        CKA_LABEL,
        CKA_SIGN,
        CKA_TOKEN,
        CKA_VERIFY,
        CKM_EC_KEY_PAIR_GEN,
        Mechanism,
    )

    both = [(CKA_TOKEN, CK_TRUE), (CKA_LABEL, "release"), (CKA_ID, (1,))]
    return session.generateKeyPair(
        [*both, (CKA_VERIFY, CK_TRUE), (CKA_EC_PARAMS, P256)],
        [*both, (CKA_SIGN, CK_TRUE)],
        mecha=Mechanism(CKM_EC_KEY_PAIR_GEN, None),
    )


def made_certificates(
    folder: Path,
    *,
    first_day: float = -1,
    last_day: float = 30,
    authority_ends_day: float = 400,
    uses: Sequence[x509.ObjectIdentifier] = (),
) -> tuple[Path, Path, Path]:
    """Makes an authority, and a key with a certificate from it, valid between these days from
    today, and for these extended uses alone if there are any. Returns the files of the key, of its
    certificate and of the authority's."""
    private, _ = made_keys(folder, "certified")
    key = serialization.load_pem_private_key(private.read_bytes(), None)
    authority = ec.generate_private_key(ec.SECP256R1())
    root = _certificate(authority.public_key(), "authority", "authority", -400, authority_ends_day)
    leaf = _certificate(key.public_key(), "release", "authority", first_day, last_day)
    if uses:
        leaf = leaf.add_extension(x509.ExtendedKeyUsage(uses), critical=True)
    files = folder / "certificate.pem", folder / "authority.pem"
    for file, builder in zip(files, (leaf, root), strict=True):
        certificate = builder.sign(authority, hashes.SHA256())
        file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return private, *files


def _certificate(
    key: Any, name: str, issuer: str, first_day: float, last_day: float
) -> x509.CertificateBuilder:
    subject, above = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in (name, issuer)
    )
    now, is_authority = datetime.now(UTC), name == issuer
    uses = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False
    )
    uses |= {"crl_sign": is_authority, "key_cert_sign": is_authority}
    usage = x509.KeyUsage(digital_signature=True, encipher_only=False, decipher_only=False, **uses)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(above).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now + timedelta(days=first_day))
    builder = builder.not_valid_after(now + timedelta(days=last_day))
    basic = x509.BasicConstraints(ca=is_authority, path_length=None)
    return builder.add_extension(basic, critical=True).add_extension(usage, critical=True)

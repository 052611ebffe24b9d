"""Keys to sign with, made by `cryptography`."""

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa


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

"""Tells whether a certificate may sign models: what it is for, and whether a trusted one leads to
it."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from model.signing.optional import library

_PURPOSE = "1.3.6.1.5.5.7.3."  # below which RFC 5280 has them
_PURPOSES = {
    f"{_PURPOSE}1": "serverAuth",
    f"{_PURPOSE}2": "clientAuth",
    f"{_PURPOSE}4": "emailProtection",
    f"{_PURPOSE}8": "timeStamping",
    f"{_PURPOSE}9": "OCSPSigning",
}
_SIGNING = {f"{_PURPOSE}3", "2.5.29.37.0"}
"""The purposes codeSigning and anyExtendedKeyUsage."""


def purpose_problem(certificate: Any) -> str:
    """Returns why a certificate is for other purposes than signing code, as a part of a sentence;
    "" where it may sign. By RFC 5280 one without the extension is for all purposes."""
    x509 = library("cryptography.x509")
    try:
        extension = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    except x509.ExtensionNotFound:
        return ""
    purposes = [purpose.dotted_string for purpose in extension.value]
    if not _SIGNING.isdisjoint(purposes):
        return ""
    named = ", ".join(_PURPOSES.get(purpose, purpose) for purpose in purposes)
    return (
        f"was signed with a certificate that is not for signing code: its extendedKeyUsage has {named}, expected "
        "codeSigning, anyExtendedKeyUsage or no such extension; sign it again with such a certificate"
    )


def require_path(leaf: Any, above: Sequence[Any], trusted: Path, at: datetime) -> None:
    """Raises `X509StoreContextError` where no trusted certificate led to this one at the time: the
    library asks that of the time at which the certificate began."""
    crypto = library("OpenSSL.crypto")
    store = crypto.X509Store()
    for certificate in library("cryptography.x509").load_pem_x509_certificates(
        trusted.read_bytes()
    ):
        store.add_cert(crypto.X509.from_cryptography(certificate))
    store.set_time(at)
    leaf, *above = [crypto.X509.from_cryptography(known) for known in (leaf, *above)]
    crypto.X509StoreContext(store, leaf, above).verify_certificate()

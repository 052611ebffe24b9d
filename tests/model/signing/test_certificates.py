"""A certificate signs models only if it may sign code: its extendedKeyUsage says for what it is."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from model.signing.signature import (
    SignatureError,
    SigningKey,
    StatementSigner,
    TrustedSigner,
    check,
    sign,
    signed_statement,
)
from tests.signing_keys import made_certificates

TRAINED = {"runDetails": {"byproducts": []}}
CODE = ExtendedKeyUsageOID.CODE_SIGNING
ANY = ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE
SERVER = ExtendedKeyUsageOID.SERVER_AUTH
CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH
OWN = x509.ObjectIdentifier("1.3.6.1.4.1.99999.1")  # of a company


@pytest.mark.parametrize(
    "uses", [(), (CODE,), (ANY,), (SERVER, CODE)], ids=["none", "code", "any", "server-and-code"]
)
def test_a_certificate_that_may_sign_code_signs_a_model(
    folder: Path, tmp_path: Path, uses: Sequence[x509.ObjectIdentifier]
) -> None:
    key, certificate, authority = made_certificates(tmp_path, uses=uses)
    sign(folder, SigningKey(key, certificates=certificate), TRAINED)
    assert check(folder, TrustedSigner(authority)) == TRAINED


@pytest.mark.parametrize(
    ("uses", "named"),
    [
        ((SERVER,), "serverAuth"),
        ((SERVER, CLIENT), "serverAuth, clientAuth"),
        ((ExtendedKeyUsageOID.TIME_STAMPING,), "timeStamping"),
        ((OWN,), r"1\.3\.6\.1\.4\.1\.99999\.1"),
    ],
    ids=["server", "server-and-client", "stamps", "other"],
)
def test_a_certificate_for_other_purposes_alone_is_refused(
    folder: Path, tmp_path: Path, uses: Sequence[x509.ObjectIdentifier], named: str
) -> None:
    key, certificate, authority = made_certificates(tmp_path, uses=uses)
    sign(folder, SigningKey(key, certificates=certificate), TRAINED)
    says = rf"model\.sig was signed .* not for signing code: its extendedKeyUsage has {named}, expected .*; sign it again"
    with pytest.raises(SignatureError, match=says):
        check(folder, TrustedSigner(authority))


def test_a_statement_that_a_certificate_of_a_server_signed_is_refused(tmp_path: Path) -> None:
    key, certificate, authority = made_certificates(tmp_path, uses=[SERVER])
    signer = StatementSigner(SigningKey(key, certificates=certificate))
    bundle = tmp_path / "bundle.sig"
    statement = signer.signed("urn:tests", subject="x", sha256="ab" * 32, predicate={})
    bundle.write_text(json.dumps(statement))
    with pytest.raises(SignatureError, match="not for signing code"):
        signed_statement(bundle, authority)

"""A private Sigstore instance on loopback, as its specifications have it: an identity provider that
gives tokens, an authority that certifies the identity in one (Fulcio's API, version 2), a log of
certificates, a transparency log (Rekor's API, version 2), and OpenSSL's time stamp authority.

The keys, certificates, log entries and stamps are real. It is neither Fulcio nor Rekor: what they
refuse and this does not is unproven.
"""

import base64
import hashlib
import json
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.timestamp_authority import Authority, made_authority
from tests.timestamp_authority import running as running_authority

AUDIENCE = "sigstore"
JOB = "job@example.com"
"""The identity that the CI lends its jobs, as GitHub does."""
ISSUER = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")  # of the identity, in a certificate
TIMESTAMPS = x509.ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")  # of a log of certificates
ALWAYS = {"start": "2020-01-01T00:00:00Z"}
LEAF, NODE = b"\0", b"\1"


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def public_der(key: Any) -> bytes:
    return bytes(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def key_id(key: ec.EllipticCurvePrivateKey) -> bytes:
    return hashlib.sha256(public_der(key.public_key())).digest()


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def der_of(file: Path) -> bytes:
    return x509.load_pem_x509_certificate(file.read_bytes()).public_bytes(Encoding.DER)


def root_of(nodes: list[bytes]) -> bytes:
    """Returns the root of a Merkle tree (RFC 9162, 2.1.1)."""
    if len(nodes) == 1:
        return nodes[0]
    split = 1 << (len(nodes) - 1).bit_length() - 1
    return hashlib.sha256(NODE + root_of(nodes[:split]) + root_of(nodes[split:])).digest()


def path_of(number: int, nodes: list[bytes]) -> list[bytes]:
    """Returns the hashes that lead from a leaf to the root (RFC 9162, 2.1.3.1)."""
    if len(nodes) == 1:
        return []
    split = 1 << (len(nodes) - 1).bit_length() - 1
    left, right = nodes[:split], nodes[split:]
    if number < split:
        return [*path_of(number, left), root_of(right)]
    return [*path_of(number - split, right), root_of(left)]


@dataclass
class Sigstore:
    """`down` names the part that answers with an error."""

    folder: Path
    stamps: Authority
    url: str = ""
    down: str = ""
    provider_key: ec.EllipticCurvePrivateKey = field(default_factory=new_key)
    ca_key: ec.EllipticCurvePrivateKey = field(default_factory=new_key)
    certificate_log_key: ec.EllipticCurvePrivateKey = field(default_factory=new_key)
    log_key: ec.EllipticCurvePrivateKey = field(default_factory=new_key)
    entries: list[bytes] = field(default_factory=list)  # leaf hashes

    def __post_init__(self) -> None:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "identities")])
        builder = self._certificate(name, self.ca_key.public_key(), timedelta(days=30))
        builder = builder.subject_name(name)
        self.root = builder.add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        ).sign(self.ca_key, hashes.SHA256())

    @property
    def provider(self) -> str:
        return f"{self.url}/provider"

    def token(self, identity: str, *, lasts_s: float = 600) -> Path:
        """Returns a file with what the identity provider gives a person who has signed in."""
        now = time.time()
        claims = {"iss": self.provider, "sub": identity, "aud": AUDIENCE, "email": identity}
        claims |= {"iat": int(now), "exp": int(now + lasts_s)}
        file = self.folder / "token"
        file.write_text(f"{jwt.encode(claims, self.provider_key, algorithm='ES256')}\n")
        return file

    def _certificate(
        self, issuer: x509.Name, key: Any, lasts: timedelta
    ) -> x509.CertificateBuilder:
        now, is_ca = datetime.now(UTC), lasts > timedelta(days=1)
        unused = dict.fromkeys(("content_commitment", "key_encipherment", "crl_sign"), False)
        unused |= dict.fromkeys(("data_encipherment", "key_agreement"), False)
        usage = x509.KeyUsage(
            digital_signature=not is_ca,
            key_cert_sign=is_ca,
            encipher_only=False,
            decipher_only=False,
            **unused,
        )
        above = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.ca_key.public_key())
        return (
            x509.CertificateBuilder()
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(seconds=5))
            .not_valid_after(now + lasts)
            .add_extension(usage, critical=True)
            .add_extension(above, critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        )

    def certified(self, request: dict[str, Any], authorization: str) -> dict[str, Any]:
        """Certifies the identity of a token for the key of a request."""
        claims = jwt.decode(
            authorization.removeprefix("Bearer "),
            self.provider_key.public_key(),
            algorithms=["ES256"],
            audience=AUDIENCE,
            issuer=self.provider,
        )
        asked = x509.load_pem_x509_csr(base64.b64decode(request["certificateSigningRequest"]))
        assert asked.is_signature_valid
        name = x509.SubjectAlternativeName([x509.RFC822Name(claims["sub"])])
        use = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])
        issuer = x509.UnrecognizedExtension(ISSUER, claims["iss"].encode())
        builder = self._certificate(self.root.subject, asked.public_key(), timedelta(minutes=10))
        builder = builder.subject_name(x509.Name([])).add_extension(name, critical=True)
        builder = builder.add_extension(use, critical=False).add_extension(issuer, critical=False)
        before = builder.sign(self.ca_key, hashes.SHA256())
        logged = x509.UnrecognizedExtension(TIMESTAMPS, self._logged(before))
        leaf = builder.add_extension(logged, critical=False).sign(self.ca_key, hashes.SHA256())
        chain = [known.public_bytes(Encoding.PEM).decode() for known in (leaf, self.root)]
        return {"signedCertificateEmbeddedSct": {"chain": {"certificates": chain}}}

    def _logged(self, certificate: x509.Certificate) -> bytes:
        """Returns the certificate log's promise as an extension (RFC 6962, 3.2 and 3.3)."""
        body = certificate.tbs_certificate_bytes
        now_ms = int(time.time()) * 1000
        issuer = hashlib.sha256(public_der(self.ca_key.public_key())).digest()
        entry = issuer + len(body).to_bytes(3, "big") + body
        signed = struct.pack("!BBQH", 0, 0, now_ms, 1) + entry + bytes(2)
        signature = self.certificate_log_key.sign(signed, ec.ECDSA(hashes.SHA256()))
        promise = bytes(1) + key_id(self.certificate_log_key) + struct.pack("!QH", now_ms, 0)
        promise += struct.pack("!BBH", 4, 3, len(signature)) + signature
        promises = len(promise).to_bytes(2, "big") + promise
        listed = len(promises).to_bytes(2, "big") + promises
        assert len(listed) < 128, "its DER has one byte of length"
        return bytes([4, len(listed)]) + listed

    def entered(self, request: dict[str, Any]) -> dict[str, Any]:
        """Enters a signature into the log, and proves that it is there."""
        asked = request["hashedRekordRequestV002"]
        data = {"algorithm": "SHA2_256", "digest": asked["digest"]}
        body = json.dumps(
            {
                "apiVersion": "0.0.2",
                "kind": "hashedrekord",
                "spec": {"hashedRekordV002": {"data": data, "signature": asked["signature"]}},
            }
        ).encode()
        number = len(self.entries)
        self.entries.append(hashlib.sha256(LEAF + body).digest())
        size, root = len(self.entries), root_of(self.entries)
        note = f"127.0.0.1\n{size}\n{encoded(root)}\n"
        signature = self.log_key.sign(note.encode(), ec.ECDSA(hashes.SHA256()))
        signed = encoded(key_id(self.log_key)[:4] + signature)
        return {
            "logIndex": str(number),
            "logId": {"keyId": encoded(key_id(self.log_key))},
            "kindVersion": {"kind": "hashedrekord", "version": "0.0.2"},
            "integratedTime": "0",
            "inclusionProof": {
                "logIndex": str(number),
                "rootHash": encoded(root),
                "treeSize": str(size),
                "hashes": [encoded(node) for node in path_of(number, self.entries)],
                "checkpoint": {"envelope": f"{note}\n\N{EM DASH} 127.0.0.1 {signed}\n"},
            },
            "canonicalizedBody": encoded(body),
        }

    def trust_config(self) -> Path:
        """Returns the file by which clients know the instance."""
        stamps = [
            der_of(self.stamps.folder / name) for name in ("certificate.pem", "authority.pem")
        ]
        identities = [self.root.public_bytes(Encoding.DER)]
        config = {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": {
                "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
                "tlogs": [self._trusted_log(self.log_key)],
                "ctlogs": [self._trusted_log(self.certificate_log_key)],
                "certificateAuthorities": [self._trusted_authority(identities)],
                "timestampAuthorities": [self._trusted_authority(stamps)],
            },
            "signingConfig": {
                "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
                "caUrls": [_service(self.url)],
                "oidcUrls": [_service(self.provider)],
                "rekorTlogUrls": [_service(self.url, version=2)],
                "rekorTlogConfig": {"selector": "ANY"},
                "tsaUrls": [_service(self.stamps.url)],
                "tsaConfig": {"selector": "ANY"},
            },
        }
        file = self.folder / "trust_config.json"
        file.write_text(json.dumps(config))
        return file

    def _trusted_log(self, key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
        return {
            "baseUrl": self.url,
            "hashAlgorithm": "SHA2_256",
            "publicKey": {
                "rawBytes": encoded(public_der(key.public_key())),
                "keyDetails": "PKIX_ECDSA_P256_SHA_256",
                "validFor": ALWAYS,
            },
            "logId": {"keyId": encoded(key_id(key))},
        }

    def _trusted_authority(self, chain: list[bytes]) -> dict[str, Any]:
        return {
            "subject": {"organization": "raymill", "commonName": "trusted"},
            "uri": self.url,
            "certChain": {"certificates": [{"rawBytes": encoded(known)} for known in chain]},
            "validFor": ALWAYS,
        }


def _service(url: str, *, version: int = 1) -> dict[str, Any]:
    return {"url": url, "majorApiVersion": version, "validFor": ALWAYS, "operator": "raymill"}


@contextmanager
def running_sigstore(folder: Path) -> Iterator[Sigstore]:
    """Makes and serves an instance."""
    folder.mkdir()
    with running_authority(made_authority(folder / "stamps")) as stamps:
        instance = Sigstore(folder, stamps)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if instance.down == "provider":
                    self._answer(503, {})
                elif self.path == "/lent?for=job&audience=sigstore":
                    assert self.headers["Authorization"] == "bearer job"
                    self._answer(200, {"value": instance.token(JOB).read_text().strip()})
                else:
                    assert self.path == "/provider/.well-known/openid-configuration"
                    self._answer(
                        200,
                        {
                            "authorization_endpoint": f"{instance.provider}/auth",
                            "token_endpoint": f"{instance.provider}/token",
                        },
                    )

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/api/v2/signingCert" and instance.down != "authority":
                    self._answer(200, instance.certified(request, self.headers["Authorization"]))
                elif self.path == "/api/v2/log/entries" and instance.down != "log":
                    self._answer(201, instance.entered(request))
                else:
                    self._answer(503, {"message": "down"})

            def _answer(self, status: int, content: dict[str, Any]) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        instance.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield instance
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

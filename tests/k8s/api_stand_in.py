"""The few routes of a Kubernetes API that Ray's autoscaler, `raymill cluster` and `kubectl apply`
use, over the objects of `api_objects.py`.

Not a Kubernetes: nothing here schedules or admits. HTTPS on loopback, with a certificate authority
made for the occasion; who has no certificate of it is not heard.
"""

import datetime
import ipaddress
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.k8s.api_objects import CLUSTER_WIDE, NAMESPACED, ApiObjects, RefusedError, plural

Object = dict[str, Any]
Query = dict[str, str]


class Fault(Enum):
    """What can become of a request."""

    BUSY = auto()  # it is refused with 429, and with the time after which to come back
    LOST = auto()  # it is done, and the connection ends without an answer
    CUT = auto()  # it is not done, and the connection ends without an answer
    SILENT = auto()  # it is not done, and the connection stays without an answer: no etcd answers


class ApiStandIn(ApiObjects):
    """Serves the objects."""

    def __init__(self, folder: Path, *, namespaces: tuple[str, ...] = ("raymill",)) -> None:
        super().__init__(namespaces=namespaces)
        self.folder = folder
        self.requests: list[str] = []
        """`METHOD path` of every request, in order; a server-side apply is an `APPLY`."""
        self.not_installed: set[str] = set()
        """API groups that this cluster does not know."""
        self.forbidden: set[str] = set()
        """Plurals of kinds that this user may not write."""
        self.faults: list[tuple[str, Fault]] = []
        """What becomes of a request that has the text in its `METHOD path`, each time one."""
        self.ended = threading.Event()
        self._certificates()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.crt", folder / "server.key")
        context.load_verify_locations(folder / "ca.crt")
        context.verify_mode = ssl.CERT_REQUIRED
        # The handshake is the handler's, in its own thread: a client that is slow with it keeps
        # nobody else waiting.
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self.port = self._server.server_address[1]

    @contextmanager
    def serving(self) -> Iterator["ApiStandIn"]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.ended.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    @property
    def environment(self) -> dict[str, str]:
        """Returns the variables by which Ray's autoscaler finds it."""
        return {
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT_HTTPS": str(self.port),
            "RAY_KUBERAY_CA_CERT_PATH": str(self.folder / "ca.crt"),
            "RAY_KUBERAY_CLIENT_CERT_PATH": str(self.folder / "client.crt"),
            "RAY_KUBERAY_CLIENT_KEY_PATH": str(self.folder / "client.key"),
        }

    def kubeconfig(self) -> Path:
        """Writes a file by which the official client finds it."""
        path = self.folder / "kubeconfig"
        cluster = {
            "server": f"https://127.0.0.1:{self.port}",
            "certificate-authority": str(self.folder / "ca.crt"),
        }
        user = {
            "client-certificate": str(self.folder / "client.crt"),
            "client-key": str(self.folder / "client.key"),
        }
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "stand-in", "cluster": cluster}],
            "users": [{"name": "test", "user": user}],
            "contexts": [{"name": "stand-in", "context": {"cluster": "stand-in", "user": "test"}}],
            "current-context": "stand-in",
        }
        path.write_text(yaml.safe_dump(config))
        return path

    def discovered(self, path: str) -> Object | None:
        """Returns what kubectl asks for first: the API's groups, or the kinds of one."""
        kinds: dict[str, dict[str, Object]] = {}
        for table, is_namespaced in ((NAMESPACED, True), (CLUSTER_WIDE, False)):
            for root, names in table.items():
                for kind in names.split():
                    described = {
                        "name": plural(kind),
                        "singularName": "",
                        "kind": kind,
                        "namespaced": is_namespaced,
                    }
                    described["verbs"] = ["get", "list", "create", "patch"]
                    kinds.setdefault(root, {})[kind] = described
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            names = [root.split("/")[2:] for root in kinds if root != "/api/v1"]
            versions = {
                name: {"groupVersion": f"{name}/{version}", "version": version}
                for name, version in names
            }
            groups = [
                {"name": name, "versions": [it], "preferredVersion": it}
                for name, it in versions.items()
            ]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        if path not in kinds:
            return None
        group_version = path.removeprefix("/apis/").removeprefix("/api/")
        return {
            "kind": "APIResourceList",
            "groupVersion": group_version,
            "resources": [*kinds[path].values()],
        }

    def _certificates(self) -> None:
        authority_key, name = (
            ec.generate_private_key(ec.SECP256R1()),
            _name("raymill test authority"),
        )
        authority = _certificate(authority_key, name, authority_key, name, is_authority=True)
        for who in ("server", "client"):
            key = ec.generate_private_key(ec.SECP256R1())
            certificate = _certificate(key, _name(who), authority_key, name, is_authority=False)
            (self.folder / f"{who}.crt").write_bytes(
                certificate.public_bytes(serialization.Encoding.PEM)
            )
            pem = (
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            (self.folder / f"{who}.key").write_bytes(key.private_bytes(*pem))
        (self.folder / "ca.crt").write_bytes(authority.public_bytes(serialization.Encoding.PEM))


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _certificate(
    key: Any, name: x509.Name, issuer_key: Any, issuer: x509.Name, *, is_authority: bool
) -> Any:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key.public_key())
    )
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(
        now - datetime.timedelta(hours=1)
    )
    builder = builder.not_valid_after(now + datetime.timedelta(days=1))
    builder = builder.add_extension(
        x509.BasicConstraints(ca=is_authority, path_length=None), critical=True
    )
    addresses = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = builder.add_extension(addresses, critical=False)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    issuer_identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    builder = builder.add_extension(identifier, critical=False).add_extension(
        issuer_identifier, critical=False
    )
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False
    )
    usage |= {
        "crl_sign": is_authority,
        "key_cert_sign": is_authority,
        "encipher_only": False,
        "decipher_only": False,
    }
    builder = builder.add_extension(x509.KeyUsage(digital_signature=True, **usage), critical=True)
    return builder.sign(issuer_key, hashes.SHA256())


def _handler(api: ApiStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else a body waits for its headers to be acknowledged
        timeout = 30

        def do_GET(self) -> None:
            self._answer(
                lambda url, query: api.get(url) or self._listed(url, query) or api.discovered(url)
            )

        def do_PATCH(self) -> None:
            content_type, body = self.headers["Content-Type"], self._body()

            def patched(url: str, query: Query) -> Object | None:
                manager = query.get("fieldManager", "")
                if content_type.startswith("application/apply-patch"):
                    force = query.get("force") == "true"
                    return api.apply(
                        url, body, manager=manager, force=force, dry_run="dryRun" in query
                    )
                return api.patch(url, content_type, body, manager=manager or self._client())

            self._answer(patched)

        def do_POST(self) -> None:
            body = self._body()

            def created(url: str, query: Query) -> Object:
                manager = query.get("fieldManager") or self._client()
                return api.create(url, body, manager=manager, dry_run="dryRun" in query)

            self._answer(created, 201)

        def do_PUT(self) -> None:
            self._body()
            self._answer(lambda url, query: api.finalize(url.removesuffix("/finalize")))

        def do_DELETE(self) -> None:
            def deleted(url: str, query: Query) -> Object | None:
                found = api.get(url) or self._listed(url, query)
                for item in (found or {}).get("items", []):
                    api.delete(f"{url}/{item['metadata']['name']}")
                api.delete(url)
                return found

            self._answer(deleted)

        def _listed(self, url: str, query: Query) -> Object | None:
            return (
                api.list(url, query.get("labelSelector", ""))
                if url.rpartition("/")[2] in _COLLECTIONS
                else None
            )

        def _client(self) -> str:
            """Returns the field manager of a request that names none."""
            return self.headers.get("User-Agent", "").partition("/")[0]

        def _body(self) -> Any:
            return yaml.load(
                self.rfile.read(int(self.headers["Content-Length"])), Loader=yaml.CSafeLoader
            )

        def _answer(self, ask: Callable[[str, Query], Object | None], status: int = 200) -> None:
            is_apply = self.headers.get("Content-Type", "").startswith("application/apply-patch")
            api.requests.append(f"{'APPLY' if is_apply else self.command} {self.path}")
            parts = urlsplit(self.path)
            fault = next((it for it in api.faults if it[0] in api.requests[-1]), None)
            if fault is not None:
                api.faults.remove(fault)
            if fault is not None and fault[1] is Fault.BUSY:
                self._send(
                    429, b"too many requests\n", "text/plain; charset=utf-8", {"Retry-After": "1"}
                )
                return
            if fault is not None and fault[1] is Fault.SILENT:
                api.ended.wait()
            if fault is not None and fault[1] in (Fault.CUT, Fault.SILENT):
                self.close_connection = True
                return
            if any(parts.path.startswith(f"/apis/{group}/") for group in api.not_installed):
                self._send(404, b"404 page not found\n", "text/plain; charset=utf-8")
                return
            try:
                if api.forbidden & set(parts.path.split("/")) and self.command != "GET":
                    raise RefusedError(
                        403, "Forbidden", f'User "somebody" cannot {self.command} {parts.path}'
                    )
                value = ask(
                    parts.path, {key: values[0] for key, values in parse_qs(parts.query).items()}
                )
                if value is None:
                    *_, what, name = parts.path.split("/")
                    raise RefusedError(
                        404, "NotFound", f'{what} "{name}" not found', {"name": name, "kind": what}
                    )
            except RefusedError as error:
                status = error.code
                value = {
                    "kind": "Status",
                    "apiVersion": "v1",
                    "status": "Failure",
                    "code": error.code,
                }
                value |= {
                    "reason": error.reason,
                    "message": error.message,
                    "details": error.details or {},
                }
            if fault is not None and fault[1] is Fault.LOST:
                self.close_connection = True
                return
            self._send(status, json.dumps(value).encode(), "application/json")

        def _send(
            self, status: int, body: bytes, content_type: str, headers: dict[str, str] | None = None
        ) -> None:
            self.send_response(status)
            for name, text in (headers or {}).items():
                self.send_header(name, text)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


_COLLECTIONS = {"customresourcedefinitions"} | {
    plural(kind)
    for table in (NAMESPACED, CLUSTER_WIDE)
    for kind in " ".join(table.values()).split()
}

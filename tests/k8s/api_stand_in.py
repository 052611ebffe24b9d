"""The few routes of a Kubernetes API that Ray's autoscaler and `raymill cluster` use, over objects in memory.

Not a Kubernetes: nothing here validates, schedules or admits. HTTPS on loopback, with a certificate authority made for
the occasion; who has no certificate of it is not heard.
"""

import copy
import datetime
import ipaddress
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Object = dict[str, Any]


class ApiStandIn:
    """Holds objects by their paths, such as `/api/v1/namespaces/raymill/pods/head`. Every change has a number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.RLock()
        self.requests: list[str] = []
        """`METHOD path` of every request, in order."""
        self._objects: dict[str, Object] = {}
        self._version = 0
        self._certificates()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.crt", folder / "server.key")
        context.load_verify_locations(folder / "ca.crt")
        context.verify_mode = ssl.CERT_REQUIRED
        # The handshake is the handler's, in its own thread: a client that is slow with it keeps nobody else waiting.
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.port = self._server.server_address[1]

    @contextmanager
    def serving(self) -> Iterator["ApiStandIn"]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
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
        cluster = {"server": f"https://127.0.0.1:{self.port}", "certificate-authority": str(self.folder / "ca.crt")}
        user = {"client-certificate": str(self.folder / "client.crt"), "client-key": str(self.folder / "client.key")}
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

    def get(self, path: str) -> Object | None:
        with self.lock:
            return copy.deepcopy(self._objects.get(path))

    def put(self, path: str, value: Object) -> Object:
        with self.lock:
            self._version += 1
            value = copy.deepcopy(value)
            value.setdefault("metadata", {})["resourceVersion"] = str(self._version)
            self._objects[path] = value
            return copy.deepcopy(value)

    def delete(self, path: str) -> None:
        with self.lock:
            self._objects.pop(path, None)

    def list(self, collection: str, selector: str = "") -> Object:
        """Returns the objects directly below `collection` that have all labels of `selector`."""
        wanted = dict(pair.split("=", 1) for pair in selector.replace("==", "=").split(",") if pair)
        with self.lock:
            items = [
                copy.deepcopy(value)
                for path, value in self._objects.items()
                if path.rpartition("/")[0] == collection
                and wanted.items() <= value["metadata"].get("labels", {}).items()
            ]
            return {"kind": "List", "metadata": {"resourceVersion": str(self._version)}, "items": items}

    def patch(self, path: str, content_type: str, body: Any, *, dry_run: bool = False) -> Object | None:
        """Returns None where there is nothing to patch; server-side apply creates it."""
        with self.lock:
            value = self.get(path)
            if content_type.startswith("application/apply-patch"):
                value = merged(value or {}, body)
                return value if dry_run else self.put(path, value)
            if value is None:
                return None
            if content_type.startswith("application/json-patch"):
                for step in body:
                    change(value, step)
                return self.put(path, value)
            return self.put(path, merged(value, body))

    def _certificates(self) -> None:
        authority_key, name = ec.generate_private_key(ec.SECP256R1()), _name("raymill test authority")
        authority = _certificate(authority_key, name, authority_key, name, is_authority=True)
        for who in ("server", "client"):
            key = ec.generate_private_key(ec.SECP256R1())
            certificate = _certificate(key, _name(who), authority_key, name, is_authority=False)
            (self.folder / f"{who}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
            pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
            (self.folder / f"{who}.key").write_bytes(key.private_bytes(*pem))
        (self.folder / "ca.crt").write_bytes(authority.public_bytes(serialization.Encoding.PEM))


class _DoesNotFitError(Exception):
    pass


def merged(value: Any, change: Any) -> Any:
    """Applies RFC 7396: objects are merged, null removes, everything else replaces."""
    if not isinstance(change, dict):
        return change
    result = dict(value) if isinstance(value, dict) else {}
    for key, item in change.items():
        if item is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), item)
    return result


def change(value: Any, step: Object) -> None:
    """Applies one operation of RFC 6902: test, add, replace or remove."""
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in step["path"].strip("/").split("/")]
    for part in parents:
        value = value[int(part)] if isinstance(value, list) else value[part]
    if step["op"] == "test":
        if value[last] != step["value"]:
            raise _DoesNotFitError(f"{step['path']} is {value[last]!r}")
    elif step["op"] == "remove":
        del value[int(last) if isinstance(value, list) else last]
    elif isinstance(value, list) and step["op"] == "add":
        value.insert(len(value) if last == "-" else int(last), step["value"])
    else:
        value[int(last) if isinstance(value, list) else last] = step["value"]


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _certificate(key: Any, name: x509.Name, issuer_key: Any, issuer: x509.Name, *, is_authority: bool) -> Any:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1))
    builder = builder.not_valid_after(now + datetime.timedelta(days=1))
    builder = builder.add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
    addresses = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = builder.add_extension(addresses, critical=False)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    issuer_identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    builder = builder.add_extension(identifier, critical=False).add_extension(issuer_identifier, critical=False)
    usage = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False)
    usage |= {"crl_sign": is_authority, "key_cert_sign": is_authority, "encipher_only": False, "decipher_only": False}
    builder = builder.add_extension(x509.KeyUsage(digital_signature=True, **usage), critical=True)
    return builder.sign(issuer_key, hashes.SHA256())


def _handler(api: ApiStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def do_GET(self) -> None:
            url, query = self._asked()
            value = api.get(url)
            if value is None and url.rpartition("/")[2] in _COLLECTIONS:
                value = api.list(url, query.get("labelSelector", [""])[0])
            self._answer(value)

        def do_PATCH(self) -> None:
            url, query = self._asked()
            try:
                value = api.patch(url, self.headers["Content-Type"], self._body(), dry_run="dryRun" in query)
            except _DoesNotFitError as error:
                self._answer(None, otherwise=422, message=str(error))
            else:
                self._answer(value)

        def do_POST(self) -> None:
            url, _ = self._asked()
            value = self._body()
            path = f"{url}/{value['metadata']['name']}"
            exists = api.get(path) is not None
            self._answer(None if exists else api.put(path, value), status=201, otherwise=409)

        def do_DELETE(self) -> None:
            url, _ = self._asked()
            value = api.get(url)
            api.delete(url)
            self._answer(value)

        def _asked(self) -> tuple[str, dict[str, list[str]]]:
            api.requests.append(f"{self.command} {self.path}")
            parts = urlsplit(self.path)
            return parts.path, parse_qs(parts.query)

        def _body(self) -> Any:
            return yaml.safe_load(self.rfile.read(int(self.headers["Content-Length"])))

        def _answer(self, value: Object | None, *, status: int = 200, otherwise: int = 404, message: str = "") -> None:
            if value is None:
                status, value = otherwise, {"kind": "Status", "code": otherwise, "message": message}
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


_COLLECTIONS = ("pods", "events", "rayclusters", "rayjobs", "rayservices", "workloads")

"""A proxy on loopback before a real S3 server: one request at a time, and objects' answers spoiled
by a script.

One at a time, as moto looks at the condition of a write and then writes, with nothing between the
two that would keep another writer out, where S3 does both at once.
"""

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Cut:
    """The body ends after some bytes, or nothing is answered to a request that was carried out."""

    after: int = 0
    kind: str = "closed"  # in an orderly way | reset | lied: the length says so too | unanswered


@dataclass(frozen=True)
class Altered:
    """A bit of one byte of the body is another than the server's."""

    at: int


@dataclass(frozen=True)
class Refused:
    """An answer of S3's own form without asking the server."""

    status: int
    code: str


@dataclass(frozen=True)
class Stalled:
    """The request is carried out, and answered so much later."""

    seconds: float


Fault = Cut | Altered | Refused | Stalled


@dataclass
class FaultProxy:
    """`script` holds what happens to the next requests for objects, None for nothing; listings go
    through."""

    url: str = ""
    script: list[Fault | None] = field(default_factory=list)
    # What happens to any other request, by method and path
    spoil: Callable[[str, str], Fault | None] | None = None
    # Of requests, in lower case: as if the server did not know them
    dropped_headers: tuple[str, ...] = ()
    ranges: list[str | None] = field(default_factory=list)  # of the GETs of objects
    down: bool = False  # resets every connection
    bytes_per_s: float | None = None  # at which bodies of requests are taken in


@contextmanager
def running_proxy(upstream: str) -> Iterator[FaultProxy]:
    proxy = FaultProxy()
    one_at_a_time = threading.Lock()
    host = urlsplit(upstream).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else a body waits for its headers to be acknowledged

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            for _ in range(0, len(body), 100):
                if proxy.bytes_per_s:
                    time.sleep(100 / proxy.bytes_per_s)
            if proxy.down:
                return self.reset()
            is_object = urlsplit(self.path).path.count("/") >= 2 and "list-type" not in self.path
            fault = proxy.script.pop(0) if is_object and proxy.script else None
            if fault is None and proxy.spoil is not None:
                fault = proxy.spoil(self.command, self.path)
            if is_object and self.command == "GET":
                proxy.ranges.append(self.headers.get("Range"))
            if isinstance(fault, Refused):
                text = (
                    f"<Error><Code>{fault.code}</Code><Message>on script</Message></Error>".encode()
                )
                return self.answer(fault.status, {"Content-Type": "application/xml"}, text)
            with one_at_a_time:
                connection = http.client.HTTPConnection(host)
                known = {
                    k: v for k, v in self.headers.items() if k.lower() not in proxy.dropped_headers
                }
                connection.request(self.command, self.path, body, known)
                answer = connection.getresponse()
                data = answer.read()
                connection.close()
            headers = {
                k: v
                for k, v in answer.getheaders()
                if k.lower() not in ("connection", "transfer-encoding")
            }
            if isinstance(fault, Stalled):
                time.sleep(fault.seconds)
                fault = None
            if isinstance(fault, Altered):
                data = b"%b%c%b" % (data[: fault.at], data[fault.at] ^ 1, data[fault.at + 1 :])
                fault = None
            return self.answer(answer.status, headers, data, fault)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815 (http.server's names)

        def answer(
            self, status: int, headers: dict[str, str], data: bytes, cut: Cut | None = None
        ) -> None:
            if cut and cut.kind == "unanswered":
                return self.reset()
            sent = data if cut is None else data[: cut.after]
            if self.command != "HEAD":
                headers = {k: v for k, v in headers.items() if k.lower() != "content-length"}
                headers["Content-Length"] = str(len(sent if cut and cut.kind == "lied" else data))
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(sent)
            self.close_connection = cut is not None
            return self.reset() if cut and cut.kind == "reset" else None

        def reset(self) -> None:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield proxy
        server.shutdown()

"""A connection's bounds over a real socket, without Ray: trailers, pipelined requests, and what a
flood of them costs."""

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from cluster.local.local_cluster import free_port
from cluster.settings.serve import HttpConfig
from serving.protocol.tracing import NO_TRACER
from serving.proxy import http_bounds
from serving.proxy.front_door import FrontDoor
from serving.proxy.http_bounds import PIECE_BYTES, BoundedHttpProtocol
from serving.proxy.request_log import no_log
from tests.serving.raw_http import drip, read_to_end
from tests.time_limits import limit_s
from tests.waiting import wait_until

BOUNDS = HttpConfig(header_timeout_s=limit_s(0.125), body_timeout_s=limit_s(0.125))
START = b"POST /x HTTP/1.1\r\nHost: a\r\n"
CHUNKED = START + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"
FLOOD_BYTES = 24 << 20


class Protocol(BoundedHttpProtocol):
    bounds = BOUNDS


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the request's path, body and headers, after the seconds of `x-sleep`; looks for
    a disconnect meanwhile, as Ray Serve does."""
    body = (await receive())["body"].decode()
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(float(headers.get("x-sleep", 0))):
            await receive()
    answer = json.dumps({"path": scope["path"], "body": body, "headers": headers}).encode() + b"\n"
    answer_headers = [(b"content-length", b"%d" % len(answer)), (b"x-model-version", b"1")]
    await send({"type": "http.response.start", "status": 200, "headers": answer_headers})
    await send({"type": "http.response.body", "body": answer})


class Server:
    """uvicorn in a thread."""

    def __init__(self, loop: Any) -> None:
        app = FrontDoor(echo, config=BOUNDS, count=lambda *_: None, log=no_log, tracer=NO_TRACER)
        self.port = free_port()
        config = uvicorn.Config(
            app,
            port=self.port,
            http=Protocol,
            loop=loop,
            lifespan="off",
            log_level="critical",
            timeout_keep_alive=1,
        )
        self.uvicorn = uvicorn.Server(config)
        self.cpu_s = 0.0
        self.thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        self.uvicorn.run()
        self.cpu_s = time.thread_time()

    @contextlib.contextmanager
    def connection(self) -> Iterator[socket.socket]:
        with socket.create_connection(("127.0.0.1", self.port), timeout=limit_s(10)) as connection:
            yield connection

    def stop(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(limit_s(10))


@pytest.fixture(params=["asyncio", "uvloop"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    server = Server(request.param)
    server.thread.start()
    wait_until(lambda: server.uvicorn.started, timeout_s=10)
    yield server
    server.stop()


def test_trailers_become_no_headers_of_any_request(server: Server) -> None:
    trailers = b"authorization: Bearer x\r\nx-forwarded-for: 1.2.3.4\r\nx-one: 1\r\n\r\n"
    with server.connection() as connection:
        connection.sendall(
            CHUNKED
            + trailers
            + START
            + b"x-two: 2\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        )
        first, second = (
            json.loads(line)["headers"]
            for line in re.findall(rb"(\{.*\})\n", read_to_end(connection))
        )
    assert set(first) - {"x-request-id", "x-raymill-relay"} == {"host", "transfer-encoding"}
    assert second["x-two"] == "2" and not second.keys() & {
        "authorization",
        "x-forwarded-for",
        "x-one",
    }


SLOW = START + b"x-sleep: 60\r\nContent-Length: 1\r\n\r\na"


@pytest.mark.parametrize(
    ("start", "drop", "is_answered"),
    [
        (START, b"a:\r\n", True),
        (CHUNKED, b"a:\r\n", True),
        (CHUNKED + b"a: ", b"aaaa", True),
        (CHUNKED[:-1] + b";", b"aaaa", False),
        (SLOW + START, b"a:\r\n", False),
        (SLOW + START + b"a: ", b"aaaa", False),
    ],
    ids=[
        "headers",
        "trailers",
        "one trailer",
        "a chunk's extension",
        "pipelined headers",
        "one pipelined header",
    ],
)
def test_a_flood_takes_neither_memory_nor_time(
    server: Server, start: bytes, drop: bytes, is_answered: bool
) -> None:
    before = psutil.Process().memory_info().rss
    with server.connection() as connection:
        connection.sendall(start)
        num_sent, peak = 0, before
        with contextlib.suppress(ConnectionError):
            while num_sent < FLOOD_BYTES:
                connection.sendall(drop * (1 << 14))
                num_sent += len(drop) << 14
                peak = max(peak, psutil.Process().memory_info().rss)
        answer = read_to_end(connection)
    server.stop()
    # The sender's own buffers and the kernel's take up to 3 MiB before it hears of the end.
    assert num_sent < FLOOD_BYTES // 2
    assert peak - before < 16 << 20  # 600 MiB without the bounds
    assert server.cpu_s < 1  # and 2 s of 100 % of the loop
    if is_answered and answer:  # the kernel may drop it, as bytes of ours are unread
        assert answer.startswith(b"HTTP/1.1 431 ") and b"headers_too_large" in answer


@pytest.mark.parametrize(
    ("start", "drop", "status"),
    [(CHUNKED, b"a:\r\n", b"HTTP/1.1 408 "), (SLOW + START + b"a", b"a", b"")],
    ids=["trailers", "pipelined headers"],
)
def test_what_drips_ends_in_time(server: Server, start: bytes, drop: bytes, status: bytes) -> None:
    seconds, answer = drip(("127.0.0.1", server.port), start, drop=drop)
    assert 0.4 < seconds < limit_s(10)
    assert answer.startswith(status)


def test_a_deep_pipeline_is_answered_in_order_and_read_bit_by_bit(server: Server) -> None:
    """Its second request's headers are late only by our not reading them: that ends nothing."""
    count = 3000
    requests = b"".join(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number for number in range(count))
    slow = b"GET /slow HTTP/1.1\r\nHost: a\r\nx-sleep: %.1f\r\n\r\n" % limit_s(0.5)
    last = b"GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    with server.connection() as connection:
        connection.sendall(slow + requests + last)
        wait_until(lambda: server.uvicorn.server_state.connections)
        [protocol] = server.uvicorn.server_state.connections
        assert isinstance(protocol, Protocol)
        wait_until(lambda: protocol.pipeline)
        time.sleep(0.3)  # in which it would read more
        assert (
            0 < len(protocol.pipeline) <= PIECE_BYTES // len(b"GET /0 HTTP/1.1\r\nHost: a\r\n\r\n")
        )
        answer = read_to_end(connection)
    paths = [path.decode() for path in re.findall(rb'"path": "/(\w+)"', answer)]
    assert paths == ["slow", *map(str, range(count)), "last"]


OFFER = (
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
)
HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize(
    ("headers", "status", "said"),
    [
        (OFFER + b"Content-Length: %d\r\n" % len(HIDDEN), b"400", b"HttpClient.Version.HTTP_1_1"),
        (b"Transfer-Encoding: gzip, chunked\r\n", b"501", b"is chunked"),
    ],
    ids=["an offer of HTTP/2", "gzip"],
)
def test_what_would_change_the_framing_is_refused_and_nothing_after_it_is_read(
    server: Server, headers: bytes, status: bytes, said: bytes
) -> None:
    """uvicorn would take the body of the first one for the next request."""
    with server.connection() as connection:
        connection.sendall(START + headers + b"\r\n" + HIDDEN)
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 " + status) and said in answer
    assert answer.count(b"\r\n\r\n") == 1, "another answer follows"


UNFINISHED = START + b"Content-Length: 9\r\n\r\n"


def asked(server: Server, path: bytes) -> bytes:
    with server.connection() as connection:
        connection.sendall(b"GET %b HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % path)
        return read_to_end(connection)


@contextlib.contextmanager
def filled(
    server: Server, head: bytes, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[socket.socket]]:
    """As many connections as the server has, all with the same start of a request."""
    bounds = BOUNDS.model_copy(
        update={"max_connections": 8, "body_timeout_s": 600.0, "header_timeout_s": 600.0}
    )
    monkeypatch.setattr(Protocol, "bounds", bounds)
    with contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(server.connection()) for _ in range(bounds.max_connections)
        ]
        for connection in connections:
            connection.sendall(head)
        wait_until(lambda: len(server.uvicorn.server_state.connections) == bounds.max_connections)
        yield connections


def test_unfinished_bodies_keep_nobody_out(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the old code each new connection was the only one that was idle, and ended."""
    with filled(server, UNFINISHED, monkeypatch):
        for path in (b"/health", b"/x", b"/y"):
            assert b'"path"' in asked(server, path)


def test_a_slow_body_goes_before_a_connection_that_is_kept_alive(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Below 0, as uvloop's clock counts milliseconds
    monkeypatch.setattr(http_bounds, "SLOW_BODY_S", -1.0)
    with filled(server, b"", monkeypatch) as connections:
        for connection in connections[1:]:
            connection.sendall(UNFINISHED)
        protocols = server.uvicorn.server_state.connections
        wait_until(lambda: sum(p.cycle is not None for p in protocols) == len(connections) - 1)
        assert b'"path"' in asked(server, b"/x")
        connections[0].sendall(b"GET /kept HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert b'"/kept"' in read_to_end(connections[0])


def test_where_all_are_answered_probes_are_answered_too(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = b"GET /busy HTTP/1.1\r\nHost: a\r\nx-sleep: %.1f\r\n\r\n" % limit_s(2)
    with filled(server, busy, monkeypatch) as connections:
        wait_until(
            lambda: all(p.cycle is not None for p in server.uvicorn.server_state.connections)
        )
        assert b'"/health"' in asked(server, b"/health")
        refused = asked(server, b"/x")
        assert refused.startswith(b"HTTP/1.1 503 ") and b"all are in use" in refused
        for connection in connections:
            connection.close()


def test_a_tunnel_is_refused(server: Server) -> None:
    with server.connection() as connection:
        connection.sendall(b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n" + HIDDEN)
        assert read_to_end(connection).startswith(b"HTTP/1.1 400 ")

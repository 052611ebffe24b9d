"""Bounds that uvicorn does not have: on the time and size of headers and trailers, on pipelined
requests, idle connections and stalled readers. The only file that uses uvicorn's private names.

An offer to speak another protocol (`Upgrade`) is refused with a word: uvicorn's parser would
believe such a request to have no body, and take the body for the next request. A gateway speaks
other protocols.
"""

import asyncio
import json
import socket
import time
import uuid
from collections.abc import Sized
from itertools import chain
from typing import ClassVar

import httptools
import uvicorn.config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from cluster.settings.serve import HttpConfig
from serving.protocol.errors import ApiError, error_of
from serving.protocol.request_facts import timestamp
from serving.proxy.request_log import LogRequest

MAX_HEADER_BYTES = 64 << 10  # for the request line and all headers together
MAX_HEADERS = 100
# A stalled reader is noticed when this much waits for it; the kernel would take megabytes.
SEND_BUFFER_BYTES = 256 << 10
# Parsed at a time. A block of 256 KiB can be 10,000 whole requests, each of which uvicorn makes 3
# KB of objects from.
PIECE_BYTES = 4 << 10
PROBED_PATHS = ("/health", "/ready", "/-/healthz")
PROBE_CONNECTIONS = 16  # more than the most, on which only these are answered
SLOW_BODY_S = 1.0  # after which a body that has not arrived is its client's doing


def install_bounds(config: HttpConfig, log: LogRequest) -> None:
    """Makes every HTTP server that starts later in this process use `BoundedHttpProtocol`, which
    logs what it refuses."""
    BoundedHttpProtocol.bounds = config
    BoundedHttpProtocol.log = staticmethod(log)
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:BoundedHttpProtocol"


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection to the proxy."""

    bounds: ClassVar[HttpConfig] = HttpConfig()
    log: ClassVar[LogRequest] = staticmethod(lambda **_: None)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = PipelineFlow(transport, self.pipeline)
        transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES
        )
        self._refusal = error_of("invalid_http")
        self._unread = bytearray()
        self._in_headers = False
        self._answers_probes_only = False
        # Of headers, trailers and chunk ends since the last byte of a body
        self._num_header_bytes = 0
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._waits_since_s = self.loop.time()
        self._expect_headers()
        self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._header_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    @property
    def is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    @property
    def waits_for_client(self) -> bool:
        """Whether nothing happens on it before its client sends more."""
        return self.is_idle or bool(self.cycle.more_body)

    @property
    def _is_slow(self) -> bool:
        """Whether its client takes too long for the body of a request."""
        return not self.is_idle and self.loop.time() - self._waits_since_s > SLOW_BODY_S

    def data_received(self, data: bytes) -> None:
        self._unread += data
        self._read()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers = True
        self._expect_headers()  # also for a request that comes during an answer

    def on_header(self, name: bytes, value: bytes) -> None:
        """Drops trailers. As headers they would bypass a gateway that removes or sets such a
        header."""
        if self._in_headers:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        if not self.is_idle:
            self._num_header_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_header_bytes = 0
        super().on_message_complete()

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._num_header_bytes = 0
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        num_bytes = len(self.url) + sum(map(len, chain.from_iterable(self.headers)))
        if len(self.headers) > MAX_HEADERS or num_bytes > MAX_HEADER_BYTES:
            self._refusal = headers_too_large()
            raise ValueError("headers too large")  # uvicorn calls send_400_response
        if self.parser.get_method() == b"CONNECT":
            raise ValueError("this is not a forward proxy")
        if self.parser.should_upgrade():
            self._refusal = error_of("upgrade_offered")
            raise ValueError("an offer of another protocol")
        encodings = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
        if encodings not in ([], [b"chunked"]):
            self._refusal = error_of("transfer_encoding")
            raise ValueError("a transfer encoding besides chunked")
        if (
            self._answers_probes_only
            and self.url.decode("ascii", errors="replace") not in PROBED_PATHS
        ):
            self._refusal = error_of("too_many_connections", most=self.bounds.max_connections)
            raise ValueError("too many connections")
        self._waits_since_s = self.loop.time()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuses in OpenAI's shape. While other answers are under way the client could take this
        for one of them, so the connection is cut instead."""
        if not self.is_idle:
            if self.pipeline or self.cycle.response_started or not self.cycle.more_body:
                self.transport.abort()
                return
            self.cycle.disconnected = True  # it sends nothing more
            self.cycle.message_event.set()
        body = json.dumps(self._refusal.body())
        request_id, (status, reason) = uuid.uuid4().hex, (self._refusal.status, self._refusal.code)
        self.log(
            time=timestamp(time.time()),
            request_id=request_id,
            status=status,
            reason=reason,
            attempts=0,
        )
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
        rest = f"{head}x-request-id: {request_id}\r\n\r\n{body}"
        self.transport.write(STATUS_LINE[self._refusal.status] + rest.encode("ascii"))
        self.transport.close()

    def on_response_complete(self) -> None:
        self._waits_since_s = self.loop.time()
        super().on_response_complete()
        if self._unread:
            self.loop.call_soon(self._read)
        if self.transport.is_closing():  # a client gets this long to read the rest of the answer
            self.loop.call_later(self.bounds.write_timeout_s, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.bounds.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    def _read(self) -> None:
        """Parses what has arrived until a request waits for its turn. What follows that request is
        read after it."""
        while self._unread and not self.pipeline and not self.transport.is_closing():
            if self.is_idle:
                self._expect_headers()
            piece = bytes(self._unread[:PIECE_BYTES])
            del self._unread[:PIECE_BYTES]
            self._num_header_bytes += len(piece)
            self._parse(piece)
            if self._num_header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
                self._refusal = headers_too_large()
                self.send_400_response("")

    def _parse(self, piece: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserError:
            self.send_400_response("")

    def _expect_headers(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(
                self.bounds.header_timeout_s, self._headers_are_late
            )

    def _headers_are_late(self) -> None:
        self._header_timer = None
        if self.pipeline:  # late only because we do not read
            self._expect_headers()
        else:
            self.transport.abort()

    def _make_room(self) -> None:
        """Beyond the most connections, ends the one that has waited longest for its client, one
        with an unfinished body before others. Where all are being answered, or were opened just
        now, a few more are for probes alone."""
        if len(self.connections) <= self.bounds.max_connections:
            return
        bounded = [
            connection
            for connection in self.connections
            if isinstance(connection, BoundedHttpProtocol)
        ]
        open_ones = [connection for connection in bounded if not connection.transport.is_closing()]
        excess = len(open_ones) - self.bounds.max_connections
        if excess <= 0:
            return
        waiting = [
            connection
            for connection in open_ones
            if connection.waits_for_client and connection is not self
        ]
        if waiting:
            first = min(
                waiting, key=lambda connection: (not connection._is_slow, connection._waits_since_s)
            )
            first.transport.abort()
        elif excess <= PROBE_CONNECTIONS:
            self._answers_probes_only = True
        else:
            self.transport.abort()


class PipelineFlow(FlowControl):
    """Stops reading while a whole request waits for its turn; uvicorn resumes whenever it checks
    for a disconnect."""

    def __init__(self, transport: asyncio.Transport, pipeline: Sized) -> None:
        super().__init__(transport)
        self._pipeline = pipeline

    def resume_reading(self) -> None:
        if not self._pipeline:
            super().resume_reading()


def headers_too_large() -> ApiError:
    return error_of("headers_too_large", most_bytes=MAX_HEADER_BYTES, most_lines=MAX_HEADERS)

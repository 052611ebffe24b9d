"""Carries a streamed answer's bytes from a replica to the proxy on its machine, around Ray Serve.

Through Ray Serve each token would be a message between actors, 0.8 ms of processor time. So only
the start and the end of an answer go there, with all that depends on them (choice of a replica,
retries, cancellation, draining); the rest goes over a socket, one frame for each part: the answer's
number, the kind of frame, a length, bytes. The start goes both ways: a first token would wait for
Ray Serve's.

A proxy listens under a random name in Linux's abstract namespace, which leaves no file behind, and
sends replicas the name and the answer's number in a header. A replica on another machine cannot
reach it and answers through Ray Serve.
"""

import asyncio
import itertools
import json
import secrets
import socket
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from starlette.types import Message, Send

from cluster.endpoint.local_end import is_of_this_user

ASK_HEADER, YES_HEADER = b"x-raymill-relay", b"x-raymill-relayed"
PASSED_BYTES = 1 << 20
END_TIMEOUT_S = 5.0  # for an end that Ray Serve has already reported
_NAME_PREFIX = "\0raymill-relay-"
_FRAME = struct.Struct(">QBI")


class Frame(IntEnum):
    START = 0  # status, headers and what else is in the message, as JSON
    PART = 1  # of the body
    END = 2


@dataclass(eq=False)
class RelayedAnswer:
    """The proxy's end of one answer."""

    relay: "Relay"
    number: int
    on_start: Callable[[Message], None]  # called with the start of the answer if it arrives here
    _arrived: bytearray = field(default_factory=bytearray)
    _is_whole: bool = False
    # Made with its start, as most answers that come whole have none here
    _has_news: asyncio.Event | None = None
    _ended: asyncio.Event | None = None
    _pump: asyncio.Task[None] | None = None

    @property
    def header(self) -> tuple[bytes, bytes]:
        return ASK_HEADER, f"{self.relay.name}/{self.number}".encode()

    @property
    def started(self) -> bool:
        return self._pump is not None

    @property
    def has_ended(self) -> bool:
        """True once the whole answer has arrived."""
        return self.started and self._is_whole

    def start(self, message: Message, send: Send) -> None:
        """Starts to pass on the answer, whose start is `message`."""
        self._has_news, self._ended = asyncio.Event(), asyncio.Event()
        self._tell()
        self._pump = asyncio.create_task(self._pass_on(message, send, self._has_news))

    async def end(self) -> bool:
        """Waits until all of a started answer has been passed on. Returns False if its end does not
        arrive."""
        assert self._pump is not None and self._ended is not None
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await self._ended.wait()
        except TimeoutError:
            return False
        await self._pump
        return True

    async def close(self) -> None:
        """Stops passing on."""
        self.relay.answers.pop(self.number, None)
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.wait([self._pump])

    def put(self, frame: int, data: bytes) -> None:
        if frame == Frame.PART:
            self._arrived += data
            self._tell()
        elif frame == Frame.START:
            self.on_start(_start_message(data))
        elif frame == Frame.END:
            self._is_whole = True
            self._tell()

    def _tell(self) -> None:
        """Wakes who waits for more of a started answer."""
        if self._has_news is not None and self._ended is not None:
            self._has_news.set()
            if self._is_whole:
                self._ended.set()

    async def _pass_on(self, message: Message, send: Send, has_news: asyncio.Event) -> None:
        await send(message)
        while self._arrived or not self._is_whole:
            if not self._arrived:
                has_news.clear()
                await has_news.wait()
                continue
            # Several parts at once if the client is slow
            data = bytes(self._arrived[:PASSED_BYTES])
            del self._arrived[:PASSED_BYTES]
            await send({"type": "http.response.body", "body": data, "more_body": True})


def _start_message(data: bytes) -> Message:
    status, shown, others = json.loads(data)
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in shown]
    return {"type": "http.response.start", "status": status, "headers": headers, **others}


class Relay:
    """A proxy's socket, and the answers that arrive over it."""

    def __init__(self) -> None:
        self.name = secrets.token_hex(16)
        self.answers: dict[int, RelayedAnswer] = {}
        self._numbers = itertools.count()
        self._server: asyncio.Server | None = None
        self._starting = asyncio.Lock()

    async def open(self, *, on_start: Callable[[Message], None]) -> RelayedAnswer:
        if self._server is None and sys.platform == "linux":
            await self._listen()
        number = next(self._numbers)
        self.answers[number] = RelayedAnswer(self, number, on_start)
        return self.answers[number]

    async def _listen(self) -> None:
        async with self._starting:
            if self._server is None:
                loop = asyncio.get_running_loop()
                self._server = await loop.create_unix_server(
                    lambda: _Incoming(self.answers), _NAME_PREFIX + self.name
                )


class _Incoming(asyncio.Protocol):
    """A proxy's connection from one replica."""

    def __init__(self, answers: Mapping[int, RelayedAnswer]) -> None:
        self._answers = answers
        self._unread = b""  # of a frame that has not arrived whole

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not is_of_this_user(transport.get_extra_info("socket")):
            transport.close()

    def data_received(self, data: bytes) -> None:
        data = self._unread + data
        start, end = 0, _FRAME.size
        while end <= len(data):
            number, frame, length = _FRAME.unpack_from(data, start)
            if end + length > len(data):
                break
            if (answer := self._answers.get(number)) is not None:  # its client has not left
                answer.put(frame, data[end : end + length])
            start, end = end + length, end + length + _FRAME.size
        self._unread = data[start:]


@dataclass(frozen=True)
class RelayWriter:
    """A replica's end of one answer."""

    connection: "_Outgoing"
    number: int

    def start(self, status: int, headers: Iterable[tuple[bytes, bytes]], **others: Any) -> None:
        """Sends the start of the answer, with further keys of its message. Raises `ConnectionError`
        once the proxy is gone."""
        shown = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
        self._send(Frame.START, json.dumps([status, shown, others]).encode())

    def write(self, data: bytes) -> None:
        """Sends a part of the body. Raises `ConnectionError` once the proxy is gone."""
        self._send(Frame.PART, data)

    def end(self) -> None:
        self._send(Frame.END, b"")
        self.connection.flush()

    def _send(self, frame: Frame, data: bytes) -> None:
        self.connection.write(self.number, frame, data)


class RelayClient:
    """A replica's connections, one for each proxy on its machine."""

    def __init__(self) -> None:
        self._connections: dict[str, _Outgoing] = {}
        self._connecting = asyncio.Lock()

    async def open(self, headers: Iterable[tuple[bytes, bytes]]) -> RelayWriter | None:
        """Returns a writer for the request with these headers, or None if the answer goes through
        Ray Serve."""
        asked = [value for name, value in headers if name == ASK_HEADER]
        if len(asked) != 1:
            return None
        name, _, number = asked[0].decode("ascii", errors="replace").partition("/")
        if not number.isdecimal() or len(number) > 18:
            return None
        async with self._connecting:
            self._connections = {n: c for n, c in self._connections.items() if not c.is_closing}
            connection = self._connections.get(name) or await self._connect(name)
            if connection is None:
                return None
            self._connections[name] = connection
        return RelayWriter(connection, int(number))

    async def _connect(self, name: str) -> "_Outgoing | None":
        # uvloop cannot connect to a name that starts with a zero byte.
        end = socket.socket(socket.AF_UNIX)
        end.setblocking(False)
        with suppress(OSError):  # not on this machine
            end.connect(_NAME_PREFIX + name)
            if is_of_this_user(end):
                return (
                    await asyncio.get_running_loop().create_unix_connection(_Outgoing, sock=end)
                )[1]
        end.close()
        return None


class _Outgoing(asyncio.Protocol):
    """A replica's connection to a proxy. Sends what all answers of one step have in one write, and
    what one of them has in one frame."""

    def connection_made(self, transport: asyncio.WriteTransport) -> None:  # type: ignore[override]
        self._transport = transport
        self._waiting: list[tuple[int, Frame, list[bytes]]] = []  # number, kind, data in pieces

    @property
    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def write(self, number: int, frame: Frame, data: bytes) -> None:
        if self.is_closing:
            raise ConnectionError("the proxy has gone")
        if not self._waiting:
            # After the tasks that the same step has woken
            asyncio.get_running_loop().call_soon(self.flush)
        if frame is Frame.PART and self._waiting and self._waiting[-1][:2] == (number, frame):
            self._waiting[-1][2].append(data)
        else:
            self._waiting.append((number, frame, [data]))

    def flush(self) -> None:
        frames = []
        for number, frame, pieces in self._waiting:
            data = b"".join(pieces)
            frames += [_FRAME.pack(number, frame, len(data)), data]
        if frames:
            self._transport.write(b"".join(frames))
            self._waiting.clear()

"""Reads a request's body within bounds of time and size, of its own and of all that are unfinished
in one proxy."""

import asyncio

from starlette.types import Receive, Scope

from serving.protocol.errors import ApiError, error_of, overloaded
from serving.protocol.strict_json import MAX_BODY_BYTES

# Read of a body that is too large, so that its sender reads our answer
MAX_DISCARDED_BYTES = 64 << 20
MAX_UNFINISHED_BYTES = 64 << 20  # of all bodies that have not arrived whole
# In which the sender of a body that nobody wants may finish it, and then reads our answer
REFUSED_BODY_S = 1.0


class _Unfinished:
    """One body that is being read."""

    def __init__(self, timeout: asyncio.Timeout) -> None:
        self.timeout = timeout
        self.body = bytearray()
        self.has_to_go = False


class Bodies:
    """The unfinished bodies of a proxy. Where they take too much, the oldest goes: it waits for its
    client."""

    def __init__(self, *, most_bytes: int = MAX_UNFINISHED_BYTES) -> None:
        self._most_bytes = most_bytes
        self._num_bytes = 0
        self._unfinished: dict[_Unfinished, None] = {}  # the oldest first

    async def read(self, scope: Scope, receive: Receive, *, timeout_s: float) -> bytes | None:
        """Returns the whole body, or None if the client has left. Raises `ApiError` (408, 413,
        429)."""
        expects_continue, declared = False, 0
        for name, value in scope["headers"]:
            if name == b"content-length":
                declared = max(declared, int(value))
            elif name == b"expect":
                expects_continue = True
        if declared > (MAX_BODY_BYTES if expects_continue else MAX_DISCARDED_BYTES):
            raise error_of("body_too_large", most_bytes=MAX_BODY_BYTES)
        unfinished = _Unfinished(asyncio.timeout(timeout_s))
        self._unfinished[unfinished] = None
        try:
            async with unfinished.timeout:
                return await self._read(receive, unfinished)
        except TimeoutError:
            if unfinished.has_to_go:
                raise _too_many() from None
            raise error_of("request_timeout", most_s=timeout_s) from None
        finally:
            self._unfinished.pop(unfinished, None)
            self._drop(unfinished)

    async def discard(self, receive: Receive) -> None:
        """Reads what a client sends whose request is refused, for a moment."""
        num_bytes = 0
        try:
            async with asyncio.timeout(REFUSED_BODY_S):
                while num_bytes <= MAX_BODY_BYTES:
                    message = await receive()
                    if message["type"] == "http.disconnect" or not message["more_body"]:
                        return
                    num_bytes += len(message["body"])
        except TimeoutError:
            return

    async def _read(self, receive: Receive, unfinished: _Unfinished) -> bytes | None:
        num_bytes = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message["body"]
            num_bytes += len(part)
            if num_bytes <= MAX_BODY_BYTES and not unfinished.has_to_go:
                unfinished.body += part
                self._num_bytes += len(part)
            if not message["more_body"] or num_bytes > MAX_DISCARDED_BYTES:
                break
            self._make_room()
        if unfinished.has_to_go:  # its end has come before the timeout
            raise _too_many()
        if num_bytes > MAX_BODY_BYTES:
            raise error_of("body_too_large", most_bytes=MAX_BODY_BYTES)
        return bytes(unfinished.body)

    def _make_room(self) -> None:
        excess = self._num_bytes - self._most_bytes
        for unfinished in list(self._unfinished):
            if excess <= 0:
                return
            excess -= len(unfinished.body)
            if not unfinished.has_to_go:
                unfinished.has_to_go = True
                # now: its own task may run only after more of the others have come
                self._drop(unfinished)
                unfinished.timeout.reschedule(0.0)

    def _drop(self, unfinished: _Unfinished) -> None:
        self._num_bytes -= len(unfinished.body)
        unfinished.body = bytearray()


def _too_many() -> ApiError:
    error = overloaded("Too many bodies are being sent at the same time; try again later")
    error.headers["Connection"] = "close"
    return error

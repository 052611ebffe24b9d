"""A stand-in for Ray Serve behind the front door, and a client before it."""

import asyncio
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.settings.serve import HttpConfig
from serving.protocol.tracing import NO_TRACER
from serving.proxy.ending import AnswerOutcome
from serving.proxy.front_door import FrontDoor
from serving.proxy.key_check import ASKED_PATH
from serving.proxy.request_log import LogRequest, no_log
from tests.time_limits import limit_s

OK = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream")],
}


def scope(
    *headers: tuple[bytes, bytes], path: str = "/v1/completions", host: bytes = b"x"
) -> Scope:
    about = {"type": "http", "http_version": "1.1", "method": "POST", "path": path}
    return about | {"headers": [(b"host", host), *headers]}


def open_to_all(app: ASGIApp) -> ASGIApp:
    """An application that knows every key."""

    async def known(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == ASKED_PATH:
            await whole(send)
        else:
            await app(scope, receive, send)

    return known


async def answered(door: ASGIApp, *messages: Message, about: Scope) -> list[Message]:
    """What goes out to a client that sends `messages`, or else a small body, and then stays on the
    line."""
    sent: list[Message] = []
    incoming = list(messages) or [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive() -> Message:
        if not incoming:
            await asyncio.Event().wait()
        return incoming.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    await door(about, receive, send)
    return sent


def ask(
    app: ASGIApp,
    *messages: Message,
    headers: tuple[tuple[bytes, bytes], ...] = (),
    path: str = "/v1/completions",
    host: bytes = b"x",
    count: Callable[[AnswerOutcome, str], None] = lambda outcome, version: None,
    log: LogRequest = no_log,
) -> list[Message]:
    """What goes out to a client that sends `messages`, and then stays on the line. `app` is behind
    a new front door, unless it is one."""
    config = HttpConfig(body_timeout_s=limit_s(0.05))
    door = (
        app
        if isinstance(app, FrontDoor)
        else FrontDoor(open_to_all(app), config=config, count=count, log=log, tracer=NO_TRACER)
    )
    return asyncio.run(answered(door, *messages, about=scope(*headers, path=path, host=host)))


async def whole(send: Send) -> None:
    await send(OK)
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def half(send: Send) -> None:
    await send(OK)
    await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})

"""Asks a replica whether it knows a request's key, before the proxy takes the request's body.

Replicas alone know the keys, and decide again once they have the request. What they said of a key
is remembered for a while here: a body of a client that they know is read at once, and one of a
stranger never.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from serving.protocol.request_facts import FACTS

KNOWN_S = 300.0  # for which a key that opened something is not asked about again
UNKNOWN_S = 2.0  # as replicas reread their files
MAX_REMEMBERED = 10_000
MAX_QUESTIONS = 16  # at a time: strangers with many keys must not take all of the replicas' time
ASKED_PATH = "/version"
# To which a key that opens all others may have no right; each has a GET too
OWN_RIGHTS = ("/v1/trace",)
REFUSED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)


@dataclass
class Refusal:
    """A replica's answer to a key that it does not know."""

    status: int
    headers: Mapping[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    facts: dict[str, Any] = field(default_factory=dict)  # for the request log


class KeyCheck:
    """The verdicts on keys of the replicas behind one proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        # By the hash of a key and of what is asked, with their end
        self._verdicts: OrderedDict[bytes, tuple[float, Refusal | None]] = OrderedDict()
        self._questions = asyncio.Semaphore(MAX_QUESTIONS)

    async def refusal(self, scope: Scope) -> Refusal | None:
        """Returns the refusal of a request's key, None if its body may be read."""
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        path = scope["path"] if scope["path"] in OWN_RIGHTS else ASKED_PATH
        told = b"\n".join([path.encode(), *values])
        digest = hashlib.sha256(told).digest() if values else told
        ends_s, verdict = self._verdicts.get(digest, (0.0, None))
        if time.monotonic() < ends_s:
            return verdict
        async with self._questions:
            answer = await self._ask(scope, path)
        if answer.status in REFUSED:
            self._remember(digest, UNKNOWN_S, answer)
            return answer
        if answer.status == HTTPStatus.OK:
            self._remember(digest, KNOWN_S, None)
        return None  # without an answer the replica that gets the request decides

    def _remember(self, digest: bytes, for_s: float, verdict: Refusal | None) -> None:
        self._verdicts[digest] = time.monotonic() + for_s, verdict
        self._verdicts.move_to_end(digest)
        if len(self._verdicts) > MAX_REMEMBERED:
            self._verdicts.popitem(last=False)

    async def _ask(self, scope: Scope, path: str) -> Refusal:
        """Returns a replica's answer to a request without a body."""
        answer = Refusal(0)
        has_asked = False

        async def receive() -> Message:
            nonlocal has_asked
            if has_asked:
                await asyncio.Event().wait()  # the client stays
            has_asked = True
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = dict(message["headers"])
            answer.body += message.get("body", b"")
            answer.facts = message.get(FACTS, answer.facts)

        kept = [
            (name, value) for name, value in scope["headers"] if name in (b"host", b"authorization")
        ]
        about = {
            "method": "GET",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
        }
        await self._app({**scope, **about, "headers": kept}, receive, send)
        return answer

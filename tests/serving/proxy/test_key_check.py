"""A stranger's body is not read: a replica is asked about the key first, and remembered for a
while."""

import asyncio
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from cluster.settings.serve import HttpConfig
from serving.protocol.tracing import NO_TRACER
from serving.proxy.ending import AnswerOutcome
from serving.proxy.front_door import FrontDoor
from serving.proxy.key_check import ASKED_PATH, OWN_RIGHTS
from tests.serving.front_door_parts import answered, scope, whole
from tests.time_limits import limit_s

KNOWN = (b"authorization", b"Bearer known")
LARGE = [{"type": "http.request", "body": b"a" * 1000, "more_body": True}] * 3


class Endpoint:
    """Replicas that know one key, behind a front door."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.lines: list[dict[str, Any]] = []
        self.outcomes: list[AnswerOutcome] = []
        self.is_away = False
        config = HttpConfig(body_timeout_s=limit_s(0.5))
        self.door = FrontDoor(
            self._replica,
            config=config,
            count=lambda outcome, _version: self.outcomes.append(outcome),
            log=lambda **fields: self.lines.append(fields),
            tracer=NO_TRACER,
        )

    async def _replica(self, asked: Scope, _receive: Receive, send: Send) -> None:
        self.paths.append(asked["path"])
        if asked["path"] == ASKED_PATH:
            assert asked["method"] == "GET"
            status = 503 if self.is_away else 200 if KNOWN in asked["headers"] else 401
            await send(
                {
                    "type": "http.response.start",
                    "status": status,
                    "headers": [(b"x-model-version", b"1")],
                }
            )
            await send({"type": "http.response.body", "body": b"who are you?"})
        else:
            await whole(send)

    async def ask(
        self, *headers: tuple[bytes, bytes], body: list[Message] | None = None
    ) -> list[Message]:
        return await answered(self.door, *(body or []), about=scope(*headers))


def test_a_stranger_is_refused_without_a_body_and_asked_about_once() -> None:
    async def scenario() -> None:
        endpoint = Endpoint()
        for _ in range(3):
            sent = await endpoint.ask((b"authorization", b"Bearer wrong"))
            assert sent[0]["status"] == 401 and sent[1]["body"] == b"who are you?"
            headers = dict(sent[0]["headers"])
            assert headers[b"connection"] == b"close" and headers[b"x-request-id"]
        assert endpoint.paths == [ASKED_PATH]
        assert endpoint.outcomes == [AnswerOutcome.INVALID] * 3
        assert (
            endpoint.lines[-1]["status"] == 401 and endpoint.lines[-1]["reason"] == "unauthorized"
        )

    asyncio.run(scenario())


def test_a_right_of_its_own_is_asked_about_by_itself() -> None:
    """A key that opens everything else is no reason to read a body there."""

    async def scenario() -> None:
        endpoint = Endpoint()
        await endpoint.ask(KNOWN)
        about = scope(KNOWN, path=OWN_RIGHTS[0])
        for _ in range(2):
            await answered(endpoint.door, about=about)
        first = [ASKED_PATH, scope()["path"]]
        assert endpoint.paths == first + 3 * [OWN_RIGHTS[0]], "asked once, and answered twice"

    asyncio.run(scenario())


def test_an_unfinished_body_of_a_stranger_is_not_waited_for() -> None:
    async def scenario() -> None:
        endpoint = Endpoint()
        async with asyncio.timeout(limit_s(10)):
            sent = await endpoint.ask(body=LARGE)
        assert sent[0]["status"] == 401 and endpoint.paths == [ASKED_PATH]

    asyncio.run(scenario())


def test_a_known_key_is_asked_about_once_and_its_requests_go_on() -> None:
    async def scenario() -> None:
        endpoint = Endpoint()
        for _ in range(2):
            assert (await endpoint.ask(KNOWN))[0]["status"] == 200
        assert endpoint.paths == [ASKED_PATH, "/v1/completions", "/v1/completions"]

    asyncio.run(scenario())


def test_without_an_answer_the_replica_that_gets_the_request_decides() -> None:
    async def scenario() -> None:
        endpoint = Endpoint()
        endpoint.is_away = True
        assert (await endpoint.ask(KNOWN))[0]["status"] == 200
        endpoint.is_away = False
        assert (await endpoint.ask(KNOWN))[0]["status"] == 200
        assert endpoint.paths.count(ASKED_PATH) == 2

    asyncio.run(scenario())

"""The order to end a proxy: nothing new is taken, open streams become whole, and what remains gets an error event."""

import asyncio
import json
import secrets
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from cluster.endpoint.local_end import CUT, DRAIN, door_name, drain, order
from cluster.settings.serve import HttpConfig
from serving.protocol.tracing import NO_TRACER
from serving.proxy.doorkeeper import Doorkeeper
from serving.proxy.front_door import FrontDoor, Outcome
from serving.proxy.key_check import ASKED_PATH
from tests.serving.front_door_parts import OK, scope
from tests.waiting import wait_in_loop_until


class Door:
    """A front door before an application that streams until it is told to finish."""

    def __init__(self) -> None:
        self.finish = asyncio.Event()
        self.outcomes: list[Outcome] = []
        self.lines: list[dict[str, Any]] = []
        self.sent: list[Message] = []
        self.doorkeeper = Doorkeeper()
        self.door = FrontDoor(
            self._stream,
            config=HttpConfig(),
            count=lambda outcome, _version: self.outcomes.append(outcome),
            log=lambda **fields: self.lines.append(fields),
            tracer=NO_TRACER,
            doorkeeper=self.doorkeeper,
        )
        self.name = door_name("test", secrets.randbits(60))
        self.doorkeeper.listen(self.name)

    async def _stream(self, scope: Scope, _receive: Receive, send: Send) -> None:
        await send(OK)
        if scope["path"] == ASKED_PATH:  # it lets everybody in
            return
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await self.finish.wait()
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    def begin(self) -> asyncio.Task[None]:
        incoming = [{"type": "http.request", "body": b"{}", "more_body": False}]

        async def receive() -> Message:
            if not incoming:
                await asyncio.Event().wait()
            return incoming.pop(0)

        async def send(message: Message) -> None:
            self.sent.append(message)

        return asyncio.create_task(self.door(scope(), receive, send))


def test_an_endpoint_that_ends_finishes_its_streams_and_takes_no_more() -> None:
    async def scenario() -> None:
        door = Door()
        first = door.begin()
        await wait_in_loop_until(lambda: len(door.sent) == 2)
        seen: list[int] = []
        draining = asyncio.create_task(asyncio.to_thread(drain, door.name, on_open=seen.append))
        await wait_in_loop_until(lambda: seen == [1])
        await door.begin()
        assert door.sent[2]["status"] == 503 and json.loads(door.sent[3]["body"])["error"]["code"] == "ending"
        assert not first.done() and not draining.done()
        door.finish.set()
        await first
        assert await draining == 0
        assert door.sent[-1]["body"] == b"data: [DONE]\n\n"
        assert door.outcomes == [Outcome.DRAINED, Outcome.OK]

    asyncio.run(scenario())


def test_what_does_not_finish_in_time_ends_with_an_error_event_and_no_client_is_blamed() -> None:
    async def scenario() -> None:
        door = Door()
        first = door.begin()
        await wait_in_loop_until(lambda: len(door.sent) == 2)
        num_cut = await asyncio.to_thread(drain, door.name, on_open=lambda _: None, longest_s=0.1)
        await first
        assert num_cut == 1
        assert b'"error"' in door.sent[-1]["body"] and not door.sent[-1].get("more_body", False)
        assert door.outcomes == [Outcome.CUT]
        assert [line["reason"] for line in door.lines] == ["interrupted"]

    asyncio.run(scenario())


def test_an_unknown_order_changes_nothing_and_orders_may_be_repeated() -> None:
    async def scenario() -> None:
        door = Door()
        assert await asyncio.to_thread(order, door.name, b"what") == 0
        assert not door.doorkeeper.is_ending
        for command in (DRAIN, DRAIN, CUT, CUT):
            assert await asyncio.to_thread(order, door.name, command) == 0
        assert door.doorkeeper.is_ending

    asyncio.run(scenario())


def test_without_a_proxy_there_is_nothing_to_wait_for() -> None:
    assert drain(door_name("test", secrets.randbits(60)), on_open=print) == 0

"""The order to end a proxy: nothing new is taken, open streams become whole, and what remains gets
an error event."""

import asyncio
import json
import secrets
import socket
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from cluster.endpoint.local_end import (
    CUT,
    DRAIN,
    door_of,
    doors_at,
    drain,
    entrance_of,
    order,
    order_all,
)
from cluster.settings.serve import HttpConfig
from serving.protocol.tracing import NO_TRACER
from serving.proxy.doorkeeper import Doorkeeper
from serving.proxy.ending import AnswerOutcome
from serving.proxy.front_door import FrontDoor
from serving.proxy.key_check import ASKED_PATH
from tests.serving.front_door_parts import OK, scope
from tests.waiting import wait_in_loop_until


def new_entrance() -> str:
    return entrance_of("test", secrets.randbits(60))


class Door:
    """A front door before an application that streams until it is told to finish."""

    def __init__(self, *, entrance: str | None = None, pid: int = 1) -> None:
        self.finish = asyncio.Event()
        self.outcomes: list[AnswerOutcome] = []
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
        self.entrance = entrance or new_entrance()
        self.name = door_of(self.entrance, pid)
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
        draining = asyncio.create_task(asyncio.to_thread(drain, door.entrance, on_open=seen.append))
        await wait_in_loop_until(lambda: seen == [1])
        await door.begin()
        assert (
            door.sent[2]["status"] == 503
            and json.loads(door.sent[3]["body"])["error"]["code"] == "ending"
        )
        assert not first.done() and not draining.done()
        door.finish.set()
        await first
        assert await draining == 0
        assert door.sent[-1]["body"] == b"data: [DONE]\n\n"
        assert door.outcomes == [AnswerOutcome.DRAINED, AnswerOutcome.OK]

    asyncio.run(scenario())


def test_what_does_not_finish_in_time_ends_with_an_error_event_and_no_client_is_blamed() -> None:
    async def scenario() -> None:
        door = Door()
        first = door.begin()
        await wait_in_loop_until(lambda: len(door.sent) == 2)
        num_cut = await asyncio.to_thread(
            drain, door.entrance, on_open=lambda _: None, longest_s=0.1
        )
        await first
        assert num_cut == 1
        assert b'"error"' in door.sent[-1]["body"] and not door.sent[-1].get("more_body", False)
        assert door.outcomes == [AnswerOutcome.CUT]
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


def test_an_endpoint_of_several_proxies_ends_once_all_have_finished() -> None:
    async def scenario() -> None:
        doors = [
            Door(entrance=(entrance := new_entrance()), pid=1),
            Door(entrance=entrance, pid=22),
        ]
        assert doors_at(entrance) == [door.name for door in doors]
        streams = [door.begin() for door in doors]
        await wait_in_loop_until(lambda: all(len(door.sent) == 2 for door in doors))
        seen: list[int] = []
        draining = asyncio.create_task(asyncio.to_thread(drain, entrance, on_open=seen.append))
        await wait_in_loop_until(lambda: seen == [2])
        doors[0].finish.set()
        await streams[0]
        assert await asyncio.to_thread(order_all, entrance, DRAIN) == 1 and not draining.done()
        doors[1].finish.set()
        assert await draining == 0

    asyncio.run(scenario())


def test_a_proxy_that_has_ended_holds_no_other_up() -> None:
    async def scenario() -> None:
        door = Door()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(door_of(door.entrance, 333))  # it does not listen any more
            assert await asyncio.to_thread(drain, door.entrance, on_open=print) == 0
        assert door.doorkeeper.is_ending
        assert doors_at(door.entrance) == [door.name]

    asyncio.run(scenario())


def test_the_doors_of_another_endpoint_are_not_asked() -> None:
    Door(entrance="raymill-door-test-80")
    assert doors_at("raymill-door-test-8") == []


def test_without_a_proxy_there_is_nothing_to_wait_for() -> None:
    assert drain(new_entrance(), on_open=print) == 0

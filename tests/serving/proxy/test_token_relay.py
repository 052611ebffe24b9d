"""The socket that streamed answers take from a replica to its proxy: same answer, same endings, two
messages through Ray Serve."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.proxy import token_relay as relay
from serving.proxy.token_relay import (
    ASK_HEADER,
    YES_HEADER,
    Frame,
    Relay,
    RelayClient,
    RelayedAnswer,
    RelayWriter,
)
from tests.serving.front_door_parts import OK, ask, half
from tests.waiting import wait_in_loop_until

PARTS = [f"data: {i}\n\n".encode() for i in range(100)]
START = OK | {"headers": [*OK["headers"], (YES_HEADER, b"1")]}
END = {"type": "http.response.body", "body": b""}


def replica(answer: Callable[[RelayWriter, Send], Awaitable[None]]) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["body"] == b"{}"
        writer = await RelayClient().open(scope["headers"])
        assert writer is not None
        await answer(writer, send)

    return app


async def whole(writer: RelayWriter, send: Send) -> None:
    await send(START)
    for part in PARTS:
        writer.write(part)
        await asyncio.sleep(0)
    writer.end()
    await send(END)


async def before_its_start(writer: RelayWriter, send: Send) -> None:
    for part in PARTS:
        writer.write(part)
    writer.end()
    await asyncio.sleep(0.05)
    await send(START)
    await send(END)


async def starts_here_alone(writer: RelayWriter, send: Send) -> None:
    writer.start(200, OK["headers"])
    for part in PARTS:
        writer.write(part)
    writer.end()
    await asyncio.sleep(0.05)


async def starts_both_ways(writer: RelayWriter, send: Send) -> None:
    writer.start(200, OK["headers"])
    await whole(writer, send)


async def is_taken_for_dead_after_its_end(writer: RelayWriter, send: Send) -> None:
    await starts_here_alone(writer, send)
    await fails(send)


async def stops_before_it_says_so(writer: RelayWriter, send: Send) -> None:
    await send(START)
    for part in PARTS:
        writer.write(part)
    writer.end()
    await asyncio.sleep(0.05)


async def breaks_off(writer: RelayWriter, send: Send) -> None:
    await send(START)
    writer.write(PARTS[0])
    await asyncio.sleep(0.05)


async def dies_after_its_start(writer: RelayWriter, send: Send) -> None:
    """Ray Serve, which has not seen the start, answers for it."""
    writer.start(200, OK["headers"])
    writer.write(PARTS[0])
    await asyncio.sleep(0.05)
    await fails(send)


async def fails(send: Send) -> None:
    await send({"type": "http.response.start", "status": 500, "headers": []})
    await send({"type": "http.response.body", "body": b"of Ray Serve"})


async def says_that_it_ended(writer: RelayWriter, send: Send) -> None:
    await breaks_off(writer, send)
    await send(END)


def without_request_id(start: Message) -> Message:
    [*others, (name, _)] = start["headers"]
    assert name == b"x-request-id"
    return {**start, "headers": others}


def body(sent: list[Message]) -> bytes:
    return b"".join(message["body"] for message in sent[1:])


@pytest.mark.parametrize(
    "answer",
    [
        whole,
        before_its_start,
        starts_here_alone,
        starts_both_ways,
        is_taken_for_dead_after_its_end,
        stops_before_it_says_so,
    ],
)
def test_an_answer_arrives_whole_and_in_order(
    answer: Callable[[RelayWriter, Send], Awaitable[None]],
) -> None:
    sent = ask(replica(answer))
    assert without_request_id(sent[0]) == OK  # and without the header that is between us
    assert body(sent) == b"".join(PARTS)
    assert [message.get("more_body", False) for message in sent[1:]] == [True] * (len(sent) - 2) + [
        False
    ]


@pytest.mark.parametrize("answer", [breaks_off, says_that_it_ended, dies_after_its_start])
def test_one_that_breaks_off_ends_in_an_error_event(
    answer: Callable[[RelayWriter, Send], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "END_TIMEOUT_S", 0.1)
    sent = ask(replica(answer))
    assert without_request_id(sent[0]) == OK
    assert sent[1]["body"] == PARTS[0]
    assert json.loads(sent[-1]["body"].removeprefix(b"data: "))["error"]["code"] == "interrupted"
    assert not sent[-1].get("more_body")


def test_an_answer_that_has_been_refused_starts_no_more() -> None:
    async def late(writer: RelayWriter, send: Send) -> None:
        await fails(send)
        await starts_here_alone(writer, send)

    start, message = ask(replica(late))
    assert start["status"] == 500
    assert json.loads(message["body"])["error"]["code"] == "internal_server_error"


def test_nothing_remains_of_a_replica_that_died_before_its_start() -> None:
    numbers = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        numbers.append(dict(scope["headers"])[ASK_HEADER])
        if len(numbers) == 1:
            (await RelayClient().open(scope["headers"])).write(b"data: of the dead\n\n")  # type: ignore[union-attr]
            await asyncio.sleep(0.05)
        else:
            await replica(whole)(scope, receive, send)

    assert body(ask(app)) == b"".join(PARTS)
    assert len(set(numbers)) == 2


def test_what_a_step_gives_one_answer_is_one_frame() -> None:
    """Each frame wakes a task of the proxy."""
    frames: list[tuple[int, int, bytes]] = []

    @dataclass(eq=False)
    class Recorded(RelayedAnswer):
        def put(self, frame: int, data: bytes) -> None:
            frames.append((self.number, frame, data))

    async def run() -> None:
        server, client = Relay(), RelayClient()
        answers = [await server.open(on_start=lambda _: None) for _ in range(2)]
        for answer in answers:
            server.answers[answer.number] = Recorded(server, answer.number, answer.on_start)
            writer = await client.open([answer.header])
            assert writer is not None
            for part in PARTS[:3]:
                writer.write(part)
        writer.end()
        await wait_in_loop_until(lambda: len(frames) == 3)

    asyncio.run(run())
    joined = b"".join(PARTS[:3])
    assert frames == [(0, Frame.PART, joined), (1, Frame.PART, joined), (1, Frame.END, b"")]


def test_a_slow_client_gets_parts_joined_and_holds_up_no_other() -> None:
    async def run() -> None:
        server, released, got = Relay(), asyncio.Event(), {"slow": [], "fast": []}  # type: ignore[var-annotated]
        answers = {name: await server.open(on_start=lambda _: None) for name in got}
        client = RelayClient()

        def send_to(name: str) -> Send:
            async def send(message: Message) -> None:
                if name == "slow":
                    await released.wait()
                got[name].append(message.get("body", b""))

            return send

        for name, answer in answers.items():
            answer.start(START, send_to(name))
        for part in PARTS:
            for answer in answers.values():
                (await client.open([answer.header])).write(part)  # type: ignore[union-attr]
            await asyncio.sleep(0)
        for answer in answers.values():
            (await client.open([answer.header])).end()  # type: ignore[union-attr]
        assert await answers["fast"].end() and b"".join(got["fast"]) == b"".join(PARTS)
        assert not got["slow"]
        released.set()
        assert await answers["slow"].end() and b"".join(got["slow"]) == b"".join(PARTS)
        assert len(got["slow"]) < 5
        for answer in answers.values():
            await answer.close()
        assert not server.answers

    asyncio.run(run())


@pytest.mark.parametrize(
    "value", [b"", b"x/1", b"../1", b"0" * 32 + b"/1", b"\xff/1", b"x/" + b"9" * 30, b"x/-1"]
)
def test_whoever_names_another_socket_is_answered_the_usual_way(value: bytes) -> None:
    assert asyncio.run(RelayClient().open([(ASK_HEADER, value)])) is None


def test_a_clients_own_header_goes_nowhere() -> None:
    seen: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(value for name, value in scope["headers"] if name == ASK_HEADER)
        await half(send)

    ask(app, headers=((ASK_HEADER, b"mine/1"),))
    assert len(seen) == 1 and seen != [b"mine/1"]

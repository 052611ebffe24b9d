"""The front door before a stand-in for Ray Serve: what it hands on, when it asks again, and how it
ends an answer."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import ResponseErrorEvent
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.cli import main
from cluster.settings.serve import HttpConfig, ServeConfig
from raymill.errors import UserError
from serving.app import build_app
from serving.delivery.routed_request import RETRY_HEADER
from serving.protocol.errors import DRAINING_HEADER
from serving.protocol.request_facts import FACTS
from serving.protocol.tracing import NO_TRACER
from serving.proxy import exchange
from serving.proxy.ending import AnswerOutcome
from serving.proxy.front_door import FrontDoor, clean_request_id
from serving.proxy.quarantine import QUARANTINE_S, Quarantine
from serving.proxy.request_log import no_log
from serving.proxy.token_relay import ASK_HEADER
from tests.serving.front_door_parts import OK, ask, half, open_to_all, scope, whole
from tests.time_limits import limit_s

Answer = Callable[[Send], Awaitable[None]]


def error(sent: list[Message]) -> dict[str, Any]:
    return dict(json.loads(sent[1]["body"])["error"])


def changing(times: int, first: Answer, later: Answer) -> ASGIApp:
    """Ray Serve that gives so many requests its first answer, and the others a later one."""
    calls = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal calls
        calls += 1
        assert (await receive())["body"] == b"{}"
        await (later if calls > times else first)(send)

    return app


async def nothing(_send: Send) -> None:
    """What Ray Serve says when a replica has died before it answered."""


async def not_found(send: Send) -> None:
    """What Ray Serve says in a proxy that has not heard of the application yet."""
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 404, "headers": headers})
    await send({"type": "http.response.body", "body": b"Path '/v1/completions' not found."})


def dies(times: int, answer: Answer) -> ASGIApp:
    return changing(times, nothing, answer)


@pytest.mark.parametrize("deaths", [0, 1])
def test_a_request_outlives_a_replica(deaths: int) -> None:
    sent = ask(dies(deaths, whole))
    assert len(sent) == 2 and sent[0]["status"] == 200


def test_a_request_that_ends_its_replicas_ends_two_and_its_client_is_told_so() -> None:
    retries: list[bool] = []

    async def end(scope: Scope, receive: Receive, send: Send) -> None:
        retries.append((RETRY_HEADER, b"1") in scope["headers"])

    sent = ask(end, headers=((RETRY_HEADER, b"1"),))  # a client cannot say that this is a retry
    assert retries == [False, True]
    assert len(sent) == 2 and sent[0]["status"] == 500
    assert dict(sent[0]["headers"])[b"x-should-retry"] == b"false"  # OpenAI's clients heed it
    assert error(sent)["code"] == "replicas_ended" and "2 replicas ended" in error(sent)["message"]


def test_a_request_that_ended_its_replicas_is_not_tried_again() -> None:
    """A client in a loop would end two of them each time."""
    now_s, calls = 0.0, 0

    async def end(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal calls
        calls += 1
        if (await receive())["body"] != b"poison":
            await whole(send)

    door = FrontDoor(
        open_to_all(end), config=HttpConfig(), count=lambda *_: None, log=no_log, tracer=NO_TRACER
    )
    door._quarantine = Quarantine(clock=lambda: now_s)
    poison = {"type": "http.request", "body": b"poison", "more_body": False}
    assert error(ask(door, dict(poison)))["code"] == "replicas_ended" and calls == 2
    assert error(ask(door, dict(poison)))["code"] == "quarantined" and calls == 2
    assert ask(door)[0]["status"] == 200
    now_s += QUARANTINE_S
    assert error(ask(door, dict(poison)))["code"] == "replicas_ended" and calls == 5


def test_an_order_is_given_once_and_its_sender_is_told_what_to_look_at() -> None:
    """On the old code a rollback was carried out twice, and so undid itself."""
    orders: list[str] = []

    async def end(scope: Scope, receive: Receive, send: Send) -> None:
        orders.append(scope["path"])

    sent = ask(end, path="/admin/rollback")
    assert orders == ["/admin/rollback"]
    assert sent[0]["status"] == 500 and error(sent)["code"] == "order_interrupted"
    assert dict(sent[0]["headers"])[b"x-should-retry"] == b"false"


@pytest.mark.parametrize("path", ["/v1/completions", "/admin/rollback"])
def test_a_proxy_that_has_just_started_answers_once_it_knows_the_application(path: str) -> None:
    """It shares its port with others, so clients come before it does."""
    logged: list[dict[str, Any]] = []
    sent = ask(changing(3, not_found, whole), path=path, log=lambda **fields: logged.append(fields))
    assert len(sent) == 2 and sent[0]["status"] == 200
    assert [(line["status"], line["attempts"]) for line in logged] == [(200, 1)]


@pytest.mark.parametrize("path", ["/v1/completions", "*"])
def test_an_application_that_is_not_there_is_not_waited_for_long(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        exchange, "ROUTE_TIMEOUT_S", 0.1 if path == "/v1/completions" else limit_s(60)
    )
    sent = ask(changing(10**6, not_found, whole), path=path)
    assert len(sent) == 2 and sent[0]["status"] == 404 and error(sent)["code"] == "not_found"


def test_a_stream_that_breaks_off_ends_in_an_error_event() -> None:
    *_, last = ask(dies(0, half))
    assert json.loads(last["body"].removeprefix(b"data: "))["error"]["code"] == "interrupted"
    assert not last.get("more_body")
    *_, last = ask(dies(0, half), path="/v1/responses")
    name, data = last["body"].decode().strip().split("\n")
    event = json.loads(data.removeprefix("data: "))
    assert name == "event: error" and event["error"]["code"] == "interrupted"
    assert ResponseErrorEvent.model_validate(event, strict=True).code == "interrupted"
    assert event["sequence_number"] == 1, "one has gone out"


def test_a_client_that_has_gone_is_not_served_again() -> None:
    calls = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal calls
        calls += 1
        await receive()
        assert (await receive())["type"] == "http.disconnect"

    sent = ask(
        app, {"type": "http.request", "body": b"", "more_body": False}, {"type": "http.disconnect"}
    )
    assert (calls, sent) == (1, [])


def test_the_words_of_ray_serve_become_those_of_openai() -> None:
    async def refuse(send: Send) -> None:
        headers = [(b"content-type", b"text/plain"), (b"retry-after", b"7")]
        await send({"type": "http.response.start", "status": 429, "headers": headers})
        await send({"type": "http.response.body", "body": b"Request dropped due to backpressure"})

    sent = ask(dies(0, refuse))
    assert len(sent) == 2 and sent[0]["status"] == 429
    assert dict(sent[0]["headers"])[b"retry-after"] == b"7"
    assert error(sent)["type"] == "rate_limit_error"


def test_a_body_that_stops_is_refused_and_reaches_nobody() -> None:
    sent = ask(dies(0, whole), {"type": "http.request", "body": b"{", "more_body": True})
    assert sent[0]["status"] == 408 and dict(sent[0]["headers"])[b"connection"] == b"close"


def test_a_refusal_before_the_body_is_read_ends_the_connection() -> None:
    """Or the body would be taken for the next request, with an answer of its own."""
    sent = ask(dies(0, whole), headers=((b"host", b"y"),))
    assert sent[0]["status"] == 400 and error(sent)["code"] == "invalid_host"
    assert dict(sent[0]["headers"])[b"connection"] == b"close"


def test_headers_that_ray_serve_would_obey_are_kept_from_it() -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(scope["headers"])
        await whole(send)

    ask(
        app,
        headers=(
            (b"x-request-disconnect-disabled", b"?1"),
            (b"serve_multiplexed_model_id", b"\xff"),
            (b"x-request-timeout-seconds", b"1e9"),
            (b"x-request-id", b"a\r\nb"),
            (b"x-mine", b"kept"),
        ),
    )
    headers = dict(seen)
    assert set(headers) == {
        b"host",
        b"x-request-timeout-seconds",
        b"x-request-id",
        b"x-mine",
        ASK_HEADER,
    }
    assert headers[b"x-request-timeout-seconds"] == b"1e9"
    assert headers[b"x-request-id"].isalnum()


def test_a_redeployed_endpoint_has_the_newest_route_of_its_own() -> None:
    """Epochs begin at 1 again, while old replicas still answer. The higher epoch of the endpoint
    before was kept."""
    answered = [
        "5:3:0:0.0:old",
        "1:1:0:0.0:new",
        "5:3:0:0.0:old",
        "2:2:0:0.0:new",
        "1:1:0:0.0:new",
        "6:4:0:0.0:old",
    ]
    seen: list[set[str]] = []

    async def replica(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append({value.decode() for name, value in scope["headers"] if name == b"x-route"})
        await send({**OK, "headers": [(b"x-route", answered[len(seen) - 1].encode())]})
        await send({"type": "http.response.body", "body": b""})

    door = FrontDoor(
        open_to_all(replica),
        config=HttpConfig(),
        count=lambda *_: None,
        log=no_log,
        tracer=NO_TRACER,
    )
    for _ in answered:
        ask(door, headers=((b"x-route", b"9:9:0:0.0:new"),))  # a client may not choose
    assert seen[0] == set() and seen[1] == {answered[0]}
    assert seen[2] == seen[3] == {answered[0], answered[1]} and seen[4] == seen[5] == {
        answered[0],
        answered[3],
    }


def test_each_completion_is_counted_once_by_how_its_client_saw_it_end() -> None:
    def says(status: int, *more: tuple[bytes, bytes]) -> ASGIApp:
        async def answer(send: Send) -> None:
            headers = [(b"x-model-version", b"1"), *more]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": b"{}"})

        return dies(0, answer)

    async def leaves(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await receive()

    body, gone = (
        {"type": "http.request", "body": b"{}", "more_body": False},
        {"type": "http.disconnect"},
    )
    cases: list[tuple[ASGIApp, list[Message], AnswerOutcome, tuple[int | None, str, int]]] = [
        (dies(1, whole), [], AnswerOutcome.OK, (200, "ok", 2)),
        (says(400), [], AnswerOutcome.INVALID, (400, "bad_request", 1)),
        (says(429), [], AnswerOutcome.REFUSED, (429, "too_many_requests", 1)),
        (says(500), [], AnswerOutcome.FAILED, (500, "internal_server_error", 1)),
        (says(503), [], AnswerOutcome.FAILED, (503, "service_unavailable", 1)),
        (
            says(503, (DRAINING_HEADER.encode(), b"1")),
            [],
            AnswerOutcome.DRAINED,
            (503, "service_unavailable", 1),
        ),
        (dies(2, whole), [], AnswerOutcome.FAILED, (500, "replicas_ended", 2)),
        (dies(0, half), [], AnswerOutcome.CUT, (200, "interrupted", 1)),
        (leaves, [body, gone], AnswerOutcome.LEFT, (None, "client_left", 1)),
        (dies(0, whole), [gone], AnswerOutcome.LEFT, (None, "client_left", 0)),
    ]
    for app, messages, expected, line in cases:
        counted: list[tuple[AnswerOutcome, str]] = []
        logged: list[dict[str, Any]] = []
        ask(
            app,
            *messages,
            count=lambda *ended, counted=counted: counted.append(ended),
            log=lambda logged=logged, **fields: logged.append(fields),
        )
        assert counted == [(expected, "")]
        assert [(fields["status"], fields["reason"], fields["attempts"]) for fields in logged] == [
            line
        ]
        assert all(
            fields["route"] == "/v1/completions" and fields["total_s"] >= 0 for fields in logged
        )


@pytest.mark.parametrize(
    ("path", "begin"),
    [
        ("/v1/completions", b"data: 1\n\ndata: 2\n\n"),
        (
            "/v1/responses",
            b"event: response.created\ndata: 0\n\n"
            + b"event: response.output_text.delta\ndata: 1\n\n" * 2,
        ),
    ],
)
@pytest.mark.parametrize("is_whole", [True, False])
def test_what_the_replica_knows_is_logged_and_goes_no_further(
    is_whole: bool, path: str, begin: bytes
) -> None:
    """Without its last word the tokens are those that have gone out."""
    facts = {
        "key": "alice",
        "model_version": "v1",
        "stream": True,
        "completion_tokens": None,
        "reason": None,
        "prompt_tokens": 3,
    }

    async def answer(send: Send) -> None:
        await send({**OK, FACTS: facts})
        await send({"type": "http.response.body", "body": begin, "more_body": True})
        if is_whole:
            last = {FACTS: facts | {"completion_tokens": 7, "reason": "stop"}}
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", **last})

    logged: list[dict[str, Any]] = []
    counted: list[tuple[AnswerOutcome, str]] = []
    sent = ask(
        dies(0, answer),
        path=path,
        count=lambda *ended: counted.append(ended),
        log=lambda **fields: logged.append(fields),
    )
    assert counted == [(AnswerOutcome.OK if is_whole else AnswerOutcome.CUT, "v1")]
    assert not any(FACTS in message for message in sent)
    [line] = logged
    assert (line["key"], line["prompt_tokens"]) == ("alice", 3)
    assert (line["completion_tokens"], line["reason"]) == (
        (7, "stop") if is_whole else (2, "interrupted")
    )


@pytest.mark.parametrize("trace", [None, "5a" * 16])
def test_without_a_collector_a_client_s_trace_goes_on_and_none_begins(trace: str | None) -> None:
    headers = (
        () if trace is None else ((b"traceparent", f"00-{trace}-00f067aa0ba902b7-01".encode()),)
    )
    seen: list[tuple[bytes, bytes]] = []
    logged: list[dict[str, Any]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(header for header in scope["headers"] if header[0].startswith(b"trace"))
        await whole(send)

    ask(app, headers=headers, log=lambda **fields: logged.append(fields))
    assert seen == list(headers)
    assert [line["trace_id"] for line in logged] == [trace]


def test_probes_and_what_is_only_read_are_not_logged() -> None:
    async def answer(send: Send) -> None:
        await send({**OK, "status": statuses.pop(0), "headers": [(b"x-model-version", b"1")]})
        await send({"type": "http.response.body", "body": b""})

    statuses = [503, 200, 404, 200, 404]
    logged: list[tuple[str, int]] = []
    door = FrontDoor(
        open_to_all(dies(0, answer)),
        config=HttpConfig(),
        count=lambda *_: None,
        log=lambda **fields: logged.append((fields["route"], fields["status"])),
        tracer=NO_TRACER,
    )
    for method, path in (
        ("GET", "/ready"),
        ("GET", "/v1/models"),
        ("GET", "/v1/nothing"),
        ("POST", "/tokenize"),
        ("POST", "/" + "x" * 999),
    ):

        async def receive() -> Message:
            return {"type": "http.request", "body": b"{}", "more_body": False}

        about = scope((b"x-model-version", b"1"), path=path) | {"method": method}
        asyncio.run(door(about, receive, lambda _: asyncio.sleep(0)))
    assert logged == [("/v1/nothing", 404), ("/tokenize", 200), ("/" + "x" * 127, 404)]


def test_haproxy_in_place_of_the_proxies_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(UserError, match="RAY_SERVE_ENABLE_HA_PROXY=1 makes HAProxy"):
        build_app(ServeConfig())
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    assert build_app(ServeConfig())


def test_serve_refuses_it_before_a_cluster_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    monkeypatch.setattr(
        "cluster.stages.stage.connected", lambda *_, **__: pytest.fail("a cluster was started")
    )
    assert main(["serve", "latest"]) == 1
    assert "RAY_SERVE_ENABLE_HA_PROXY=1" in capsys.readouterr().err


@given(st.lists(st.binary(max_size=70), max_size=2))
def test_any_request_id_becomes_a_harmless_one(values: list[bytes]) -> None:
    request_id = clean_request_id([(b"x-request-id", value) for value in values])
    assert request_id.replace(b"-", b"a").isalnum() and len(request_id) <= 64

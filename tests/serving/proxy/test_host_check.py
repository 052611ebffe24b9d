"""Where nobody needs a key, a request has to call the endpoint by a name of the loopback
interface; its answer does not tell what only proxies read."""

import json

import pytest
from starlette.types import Receive, Scope, Send

from cluster.settings.serve import HttpConfig
from serving.protocol.tracing import NO_TRACER
from serving.proxy.front_door import FrontDoor
from serving.proxy.request_log import no_log
from tests.serving.front_door_parts import OK, ask, open_to_all

OWN = [b"localhost", b"LOCALHOST:8000", b"127.0.0.1", b"127.0.0.1:1", b"[::1]", b"[::1]:80"]
FOREIGN = [
    b"rebound.example",
    b"rebound.example:8000",
    b"localhost.rebound.example",
    b"127.0.0.1.rebound.example",
    b"rebound.example:127.0.0.1",
    b"10.0.0.1",
    b"0.0.0.0:8000",
    b"[::]",
    b"[fe80::1]:80",
    b"",
    b":8000",
    b"localhost@rebound.example",
]


async def answers(scope: Scope, receive: Receive, send: Send) -> None:
    shown = [(b"x-route", b"1:1:0:0.0:a"), (b"x-model-version", b"v")]
    await send({**OK, "headers": shown})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def status_for(host: bytes, *, only_loopback: bool, path: str = "/v1/completions") -> int:
    door = FrontDoor(
        open_to_all(answers),
        config=HttpConfig(),
        count=lambda *_: None,
        log=no_log,
        tracer=NO_TRACER,
        only_loopback=only_loopback,
    )
    start, body = ask(door, path=path, host=host)[:2]
    if start["status"] != 200:
        error = json.loads(body["body"])["error"]
        assert (start["status"], error["code"]) == (421, "foreign_host")
        assert "started without keys" in error["message"] and len(error["message"]) < 500
        assert dict(start["headers"])[b"connection"] == b"close"  # its body is not read
    return int(start["status"])


@pytest.mark.parametrize("host", OWN)
def test_a_name_of_the_loopback_interface__is_answered(host: bytes) -> None:
    assert status_for(host, only_loopback=True) == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_any_other_name__is_refused_where_nobody_needs_a_key(host: bytes) -> None:
    assert status_for(host, only_loopback=True) == 421
    assert status_for(host, only_loopback=False) == 200


def test_a_foreign_name__reads_no_page_and_no_metrics_either() -> None:
    for path in ("/", "/metrics", "/health", "/v1/models", "/-/routes"):
        assert status_for(FOREIGN[0], only_loopback=True, path=path) == 421


def test_an_answer__has_no_header_that_only_proxies_read() -> None:
    [start, _] = ask(answers)
    assert start["headers"] == [(b"x-model-version", b"v")]

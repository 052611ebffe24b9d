"""Hostile requests on a real endpoint: each gets its right answer, and the same replica serves the
next one."""

import asyncio
import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.settings.serve import EngineConfig, HttpConfig, ReplicaConfig, ServeConfig
from model.text.tokenizer import Tokenizer
from serving.api.access import RELOAD_S
from tests.serving.endpoint_parts import Endpoints, assert_error, engine_and_replica, metric
from tests.serving.hostile_requests import (
    AT_THE_ENDPOINT,
    FRAMINGS,
    HEAD,
    KEY,
    MODEL,
    Hostile,
    post,
)
from tests.serving.raw_http import drip, read_to_end
from tests.serving.tiny_models import FRAGILE_POSITION
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster

ADMIN_KEY, LIMITED_KEY = "sk-admin", "sk-limited"
SECRET_PROMPT = "\x1b[31mmarker-of-a-prompt\x1b[0m\n[link](javascript:x)"
BOUNDS = HttpConfig(
    header_timeout_s=limit_s(0.25),
    body_timeout_s=limit_s(0.25),
    write_timeout_s=limit_s(0.4),
    max_connections=40,
)
NUM_SLOTS, MAX_WAITING = 8, 100


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def url(endpoints: Endpoints, fragile_checkpoint: Path, keys: Path) -> str:
    (keys / "user").write_text(f"{LIMITED_KEY}\n{KEY}\n")
    (keys / "admin").write_text(f"{ADMIN_KEY}\n")
    config = ServeConfig(
        checkpoint=str(fragile_checkpoint),
        model_name=MODEL,
        api_key_file=str(keys / "user"),
        admin_key_file=str(keys / "admin"),
        http=BOUNDS,
        replicas=ReplicaConfig(max_ongoing_requests=20, max_requests_per_key=12),
        # PyTorch is slow enough for a flood to last.
        engine=EngineConfig(kernels="torch", max_num_seqs=NUM_SLOTS, max_waiting=MAX_WAITING),
    )
    return str(endpoints.deployed(config)["url"])


@pytest.fixture(scope="module")
def address(url: str) -> tuple[str, int]:
    return "127.0.0.1", int(url.rpartition(":")[2])


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with httpx.Client(base_url=url, headers=headers, timeout=limit_s(20)) as http:
        yield http


@pytest.fixture(scope="module")
def processes(url: str, fragile_checkpoint: Path) -> set[int]:
    return engine_and_replica(fragile_checkpoint)


@pytest.fixture(autouse=True)
def same_replica_serves_on(
    url: str, processes: set[int], fragile_checkpoint: Path
) -> Iterator[None]:
    """After each test: a valid request gets 200, from the processes that were there at the
    start."""
    yield
    answer = httpx.post(
        f"{url}/v1/completions",
        json=completion(),
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=limit_s(20),
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 1
    assert engine_and_replica(fragile_checkpoint) == processes


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "x", "max_tokens": 1, "ignore_eos": True} | fields


def flood(**fields: Any) -> dict[str, Any]:
    """All the sequences that the replica can hold, each to where the logits end."""
    return completion(prompt=[[1]] * 27, n=4, max_tokens=FRAGILE_POSITION - 1, stream=True) | fields


@pytest.mark.parametrize("case", AT_THE_ENDPOINT, ids=lambda case: f"{case.number} {case.name}")
def test_refused(http: httpx.Client, case: Hostile) -> None:
    headers = [
        (name, value)
        for name, value in http.headers.items()
        if name not in map(str.lower, case.headers)
    ]
    answer = httpx.request(
        case.route.split()[0],
        f"{http.base_url}".rstrip("/") + case.route.split()[1],
        content=case.body() if callable(case.body) else case.body,
        headers=[*headers, *case.headers.items()],
        timeout=limit_s(20),
    )
    error = assert_error(answer, case.status)
    assert case.code in (None, error["code"])
    assert error["param"] == case.param
    if case.status == 405:
        assert answer.headers["allow"] == "POST"
    if case.status == 401:
        assert "sk-" not in answer.text


def exchange(address: tuple[str, int], request: bytes, *, timeout_s: float = limit_s(10)) -> bytes:
    """Everything that comes back until the server closes the connection, which it must."""
    with socket.create_connection(address, timeout=timeout_s) as connection:
        with contextlib.suppress(ConnectionError):  # refused before all of it was sent
            connection.sendall(request)
        return read_to_end(connection)


def parsed(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, body


@pytest.mark.parametrize(("number", "request_bytes", "status"), FRAMINGS)
def test_framing_and_headers(
    address: tuple[str, int], number: int, request_bytes: bytes, status: int
) -> None:
    answer = exchange(address, request_bytes)
    if number in (42, 59) and not answer:
        return  # closed with bytes unread: the kernel may drop the answer
    found, headers, body = parsed(answer)
    assert found == status
    assert headers["connection"] == "close"
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "name", ["x-session-id", "session_id", "serve-multiplexed-model-id", "traceparent", "cookie"]
)
def test_43_a_header_that_is_no_utf_8_is_no_failure(address: tuple[str, int], name: str) -> None:
    asked = post(json.dumps(completion()).encode(), more=f"{name}: PLACE\r\nConnection: close\r\n")
    assert parsed(exchange(address, asked.replace(b"PLACE", b"\xff\xfe")))[0] == 200


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_43_no_bytes_make_a_5xx(address: tuple[str, int], data: st.DataObject) -> None:
    whole = post(json.dumps(completion()).encode(), more="Connection: close\r\n")
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    mutated = whole[:start] + data.draw(st.binary(max_size=30)) + whole[end:]
    with contextlib.suppress(TimeoutError):  # it waits for the rest
        answer = exchange(address, mutated, timeout_s=0.3)
        assert re.match(rb"HTTP/1\.1 (200|4\d\d) |$", answer), (mutated, answer)


@pytest.mark.slow
def test_49_500_clients_that_go_leave_nothing_behind(
    address: tuple[str, int], http: httpx.Client, processes: set[int]
) -> None:
    def footprint() -> list[tuple[int, int]]:
        found = [psutil.Process(pid) for pid in sorted(processes)]
        return [(process.memory_info().rss, process.num_fds()) for process in found]

    def leave(times: int) -> None:
        for i in range(times):
            with socket.create_connection(address, timeout=limit_s(5)) as connection:
                connection.sendall(
                    post(json.dumps(completion(max_tokens=100, stream=True, seed=i)).encode())
                )
                if i % 3:  # a third leaves before the answer
                    assert connection.recv(100).startswith(b"HTTP/1.1 200")
        wait_until(lambda: idle(http), timeout_s=5)

    leave(100)
    before = footprint()
    leave(500)
    for (rss, num_fds), (old_rss, old_num_fds) in zip(footprint(), before, strict=True):
        assert rss < old_rss + (20 << 20) and num_fds <= old_num_fds + 5


def test_38_39_head_and_options(url: str, http: httpx.Client) -> None:
    assert http.head("/v1/completions").status_code == 405
    assert_error(http.request("OPTIONS", "/v1/completions"), 405)


@pytest.mark.parametrize("path", ["/admin", "/admin/", "/admin/nowhere"])
def test_41_everything_under_admin_needs_an_admin_key(url: str, path: str) -> None:
    for key, status in ((None, 401), ("sk-wrong", 401), (KEY, 403), (ADMIN_KEY, 404)):
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        assert_error(httpx.get(f"{url}{path}", headers=headers, timeout=limit_s(30)), status)


def test_41_keys_are_added_and_revoked_while_it_serves(url: str, keys: Path) -> None:
    def statuses(path: str, *names: str) -> list[int]:
        headers = [{"Authorization": f"Bearer {name}"} for name in names]
        return [
            httpx.get(f"{url}{path}", headers=header, timeout=limit_s(30)).status_code
            for header in headers
        ]

    users, admins = (keys / "user").read_text(), (keys / "admin").read_text()
    (keys / "user").write_text(f"{KEY}\nsk-added\n")
    wait_until(
        lambda: statuses("/v1/models", "sk-added", LIMITED_KEY, KEY) == [200, 401, 200],
        timeout_s=10,
    )
    (keys / "admin").write_text("sk-admin-2\n")
    wait_until(
        lambda: statuses("/admin/nowhere", "sk-admin-2", ADMIN_KEY) == [404, 401], timeout_s=10
    )
    (keys / "user").write_text("")
    (keys / "admin").unlink()
    time.sleep(2 * RELOAD_S)
    assert statuses("/v1/models", "sk-added", KEY, "sk-wrong") == [200, 200, 401]
    assert statuses("/admin/nowhere", "sk-admin-2", ADMIN_KEY) == [404, 401]
    (keys / "user").write_text(users)
    (keys / "admin").write_text(admins)
    wait_until(lambda: statuses("/v1/models", "sk-added", LIMITED_KEY) == [401, 200], timeout_s=10)
    wait_until(lambda: statuses("/admin/nowhere", ADMIN_KEY) == [404], timeout_s=10)


def test_41_a_key_of_a_megabyte_is_no_key(url: str) -> None:
    answer = httpx.get(
        f"{url}/v1/models", headers={"Authorization": "Bearer " + "x" * 50_000}, timeout=limit_s(30)
    )
    assert_error(answer, 401)


@pytest.mark.parametrize("given", ["x" * 10_000, "ü", "a b", "", "../x", "a;b"])
def test_45_a_strange_request_id_is_replaced(url: str, given: str) -> None:
    answer = httpx.get(
        f"{url}/health", headers=[(b"x-request-id", given.encode())], timeout=limit_s(30)
    )
    [request_id] = answer.headers.get_list("x-request-id")
    assert request_id != given and re.fullmatch(r"[A-Za-z0-9-]{1,64}", request_id)
    assert httpx.get(
        f"{url}/health", headers={"x-request-id": "mine-1"}, timeout=limit_s(30)
    ).headers.get_list("x-request-id") == ["mine-1"]


@pytest.mark.parametrize(
    ("start", "drop"),
    [
        (b"", b"\r\n"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nx: ", b"a"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\r\n"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HTTP/1.1\r\nx: ", b"a"),
    ],
)
def test_46_headers_that_drip_end_in_time(
    address: tuple[str, int], start: bytes, drop: bytes
) -> None:
    seconds, _ = drip(address, start, drop=drop)
    assert 0.5 * BOUNDS.header_timeout_s < seconds < BOUNDS.header_timeout_s + limit_s(2)


def test_46_a_connection_that_says_nothing_is_closed(address: tuple[str, int]) -> None:
    began = time.monotonic()
    assert exchange(address, b"") == b""
    assert time.monotonic() - began < BOUNDS.header_timeout_s + limit_s(2)


@pytest.mark.parametrize("drop", [b"", b"a"])
def test_47_a_body_that_drips_gets_408(address: tuple[str, int], drop: bytes) -> None:
    seconds, answer = drip(address, HEAD.encode() + b"Content-Length: 1000\r\n\r\n{", drop=drop)
    status, headers, body = parsed(answer)
    assert seconds < BOUNDS.body_timeout_s + limit_s(2)
    assert status == 408 and headers["connection"] == "close"
    assert json.loads(body)["error"]["code"] == "request_timeout"


def test_48_a_reader_that_stops_is_cut_and_its_slots_are_free(
    address: tuple[str, int], http: httpx.Client
) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(address)
        connection.sendall(post(json.dumps(flood(logprobs=5)).encode()))
        wait_until(lambda: metric(http, "vllm:num_requests_running") > 0, timeout_s=5)
        aborted = metric(http, "vllm:request_success_total", finished_reason="abort")
        wait_until(lambda: idle(http), timeout_s=10)
        assert metric(http, "vllm:request_success_total", finished_reason="abort") > aborted


def idle(http: httpx.Client) -> bool:
    return (
        metric(http, "vllm:num_requests_running") + metric(http, "vllm:num_requests_waiting") == 0
    )


@pytest.mark.parametrize("stream", [False, True])
def test_49_a_client_that_goes_frees_its_slots_within_a_second(
    address: tuple[str, int], http: httpx.Client, stream: bool
) -> None:
    with socket.create_connection(address) as connection:
        # One that has Ray Serve go on regardless must not help.
        more = "x-request-disconnect-disabled: ?1\r\n"
        connection.sendall(post(json.dumps(flood(stream=stream)).encode(), more=more))
        wait_until(lambda: metric(http, "vllm:num_requests_running") > 0, timeout_s=5)
    wait_until(lambda: idle(http), timeout_s=1)


def test_50_idle_connections_make_room_for_others(address: tuple[str, int], url: str) -> None:
    connections = [
        socket.create_connection(address, timeout=limit_s(5))
        for _ in range(3 * BOUNDS.max_connections)
    ]
    try:
        assert httpx.get(f"{url}/health", timeout=limit_s(30)).status_code == 200
        assert read_to_end(connections[0]) == b""  # the oldest one is closed
    finally:
        for connection in connections:
            connection.close()


def test_51_pipelined_requests_are_answered_in_order(address: tuple[str, int]) -> None:
    first, second = (
        json.dumps(completion(prompt=[i], echo=True, logprobs=0)).encode() for i in (65, 66)
    )
    bad = post(b"{")
    answer = exchange(address, post(first) + bad + post(second, more="Connection: close\r\n"))
    assert [int(s) for s in re.findall(rb"HTTP/1\.1 (\d+)", answer)] == [200, 400, 200]
    texts = [
        json.loads(body)["choices"][0]["text"] for body in re.findall(rb'\{"id".*?\}\}', answer)
    ]
    assert len(texts) == 2 and texts[0] != texts[1]


def test_52_a_flood_gets_429_with_retry_after_and_the_shape_of_openai(
    url: str, http: httpx.Client
) -> None:
    async def ask_all() -> list[httpx.Response]:
        headers = {"Authorization": f"Bearer {KEY}"}
        limits = httpx.Limits(max_connections=38)
        async with httpx.AsyncClient(
            base_url=url, headers=headers, timeout=limit_s(60), limits=limits
        ) as client:
            asked = completion(max_tokens=100)
            return await asyncio.gather(
                *(client.post("/v1/completions", json=asked) for _ in range(200))
            )

    answers = asyncio.run(ask_all())
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(refused) < 200
    for answer in refused:
        assert_error(answer, 429)
        assert int(answer.headers["retry-after"]) >= 1


def test_52_one_key_has_its_own_limit(url: str, http: httpx.Client) -> None:
    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=limit_s(60)) as client:
            asked = completion(max_tokens=FRAGILE_POSITION - 1)
            return await asyncio.gather(
                *(
                    client.post(
                        "/v1/completions", json=asked, headers={"Authorization": f"Bearer {key}"}
                    )
                    for key in [LIMITED_KEY] * 16 + [KEY] * 2
                )
            )

    *limited, other, another = asyncio.run(ask_all())
    refused = [answer for answer in limited if answer.status_code != 200]
    assert len(refused) == 4
    assert {assert_error(answer, 429)["code"] for answer in refused} == {"rate_limit_exceeded"}
    assert other.status_code == another.status_code == 200


def test_57_logits_that_are_no_numbers_fail_their_own_request_only(
    url: str, http: httpx.Client
) -> None:
    broken = completion(prompt=[1] * FRAGILE_POSITION, max_tokens=5)
    good = completion(prompt=[1], max_tokens=FRAGILE_POSITION - 1, seed=1)
    expected = http.post("/v1/completions", json=good).json()["choices"]

    async def ask_both() -> list[httpx.Response]:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=limit_s(60)) as client:
            return await asyncio.gather(
                *(client.post("/v1/completions", json=asked) for asked in [good, broken] * 3)
            )

    answers = asyncio.run(ask_both())
    for fine, failed in zip(answers[::2], answers[1::2], strict=True):
        assert fine.json()["choices"] == expected
        assert assert_error(failed, 500)["code"] == "internal_error"
    events = http.post(
        "/v1/completions", json=broken | {"prompt": [1] * (FRAGILE_POSITION - 2), "stream": True}
    ).text
    assert (
        len(events.strip().split("\n\n")) == 3 + 1
        and '"error"' in events
        and "[DONE]" not in events
    )


@pytest.mark.parametrize("asked", ["nan", "-1", "1e9", "inf", "x", "0", "\xff"])
def test_53_a_strange_timeout_changes_nothing(http: httpx.Client, asked: str) -> None:
    headers = [(b"x-request-timeout-seconds", asked.encode("latin-1"))]
    assert http.post("/v1/completions", json=completion(), headers=headers).status_code == 200


def test_53_a_timeout_is_kept_before_and_within_a_stream(http: httpx.Client) -> None:
    def within(timeout_s: float) -> dict[str, str]:
        return {"x-request-timeout-seconds": str(timeout_s)}

    assert_error(http.post("/v1/completions", json=flood(stream=False), headers=within(0.2)), 408)
    for timeout_s in (0.2, 0.8, 3.2):  # in which a busy machine must send the first byte
        with http.stream(
            "POST", "/v1/completions", json=flood(), headers=within(timeout_s)
        ) as answer:
            lines = [line for line in answer.iter_lines() if line]
        if answer.status_code == 200:
            break
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "interrupted"
    assert "data: [DONE]" not in lines
    wait_until(lambda: idle(http), timeout_s=2)


@pytest.mark.parametrize(
    "prompt", ["NUL \x00 and \x1b[31m", "", SECRET_PROMPT, "<script>", "\U0001f600" * 5]
)
def test_7_54_any_text_is_a_prompt(http: httpx.Client, prompt: str) -> None:
    answer = http.post("/v1/completions", json=completion(prompt=prompt, echo=True))
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["text"].startswith(prompt)


def test_54_prompts_and_keys_are_in_no_log(http: httpx.Client, endpoints: Endpoints) -> None:
    http.post("/v1/completions", json=completion(prompt=SECRET_PROMPT))
    http.post("/v1/completions", json=completion(prompt=SECRET_PROMPT, n=0))
    http.post("/v1/completions", json=completion(model="marker-of-a-prompt"))
    for path in endpoints.ray_logs.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"marker-of-a-prompt" not in content and KEY.encode() not in content, path


def test_55_special_text_is_text(http: httpx.Client, tokenizer: Tokenizer) -> None:
    answer = http.post("/tokenize", json={"prompt": "<|endoftext|>"}).json()
    assert len(answer["tokens"]) > 1 and tokenizer.eot_id not in answer["tokens"]
    echoed = http.post("/v1/completions", json=completion(prompt="<|endoftext|>", echo=True)).json()
    assert echoed["choices"][0]["text"].startswith("<|endoftext|>")


def test_errors_are_the_right_exceptions_of_the_client_library(url: str) -> None:
    def client(key: str = KEY, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, **settings)

    def ask(client: openai.OpenAI, **fields: Any) -> Any:
        return client.chat.completions.create(
            **{"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
            | fields
        )

    with client() as user, client("sk-wrong") as stranger:
        with pytest.raises(openai.AuthenticationError):
            ask(stranger)
        with pytest.raises(openai.NotFoundError):
            ask(user, model="other")
        with pytest.raises(openai.BadRequestError) as caught:
            ask(user, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
        assert caught.value.code == "tools_unsupported" and caught.value.param == "tools"
        with pytest.raises(openai.PermissionDeniedError):
            user.with_options(base_url=f"{url}/admin").models.list()
        with pytest.raises(openai.APIError) as cut:
            list(
                ask(
                    user,
                    max_tokens=100,
                    n=8,
                    stream=True,
                    extra_headers={"x-request-timeout-seconds": "0.05"},
                )
            )
        assert not isinstance(cut.value, openai.APIConnectionError)
        assert ask(user).choices[0].message.role == "assistant"

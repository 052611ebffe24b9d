"""What an operator sees of a real endpoint: a line for each request, an entry for each order, and
one trace through all its processes."""

import contextlib
import importlib.util
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.local.local_cluster import free_port
from cluster.settings.run import StorageConfig
from cluster.settings.serve import EngineConfig, HttpConfig, ServeConfig
from cluster.storage.registry import AUDIT, served_checkpoints
from cluster.storage.uris import open_storage
from serving.app import run
from serving.proxy.request_log import FIELDS
from tests.serving.endpoint_parts import children_with, ray_cluster
from tests.serving.otlp_receiver import Collector, Seen, collector
from tests.serving.raw_http import read_to_end
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster

ALICE, BOB, OLD, OPS = "sk-of-alice", "sk-of-bob", "sk-old", "sk-of-ops"
MODEL, SECRET_TEXT = "tiny", "the quick brown secret"
ASKED = {"model": MODEL, "prompt": SECRET_TEXT, "max_tokens": 6, "ignore_eos": True, "seed": 3}
MANY = {"prompt": [SECRET_TEXT] * 8, "n": 8, "max_tokens": 100, "stream": True}
needs_exporter = pytest.mark.skipif(
    importlib.util.find_spec("opentelemetry.exporter.otlp") is None,
    reason="needs `pip install '.[tracing]'`",
)


class Operator:
    """An endpoint, its request log and its traces."""

    def __init__(self, url: str, folder: Path, traces: Collector) -> None:
        self.url, self.folder, self.traces = url, folder, traces

    def client(self, key: str | None = ALICE) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=limit_s(60))

    def ask(
        self, path: str = "/v1/completions", *, key: str | None = ALICE, **asked: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The answer to a POST, and its line."""
        with self.client(key) as http:
            answer = http.post(path, **asked)
        return answer, self.line(answer.headers["x-request-id"])

    @property
    def lines(self) -> list[dict[str, Any]]:
        path = self.folder / "requests.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def line(self, request_id: str) -> dict[str, Any]:
        """The one line of a request."""
        wait_until(lambda: [line for line in self.lines if line["request_id"] == request_id])
        time.sleep(0.5)  # in which a second one would come
        [line] = [line for line in self.lines if line["request_id"] == request_id]
        assert tuple(line) == FIELDS
        return line


@pytest.fixture(scope="module")
def operator(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    folder = tmp_path_factory.mktemp("operator")
    (folder / "keys").write_text(
        f"{ALICE} name=alice\n{BOB} name=bob max_requests=1\n{OLD} name=old expires=2026-01-01\n"
    )
    (folder / "admin").write_text(f"{OPS} name=ops\n")
    config = ServeConfig(
        checkpoint=str(checkpoint),
        model_name=MODEL,
        port=free_port(),
        api_key_file=str(folder / "keys"),
        admin_key_file=str(folder / "admin"),
        engine=EngineConfig(max_num_seqs=2),
        http=HttpConfig(request_log=str(folder / "requests.jsonl"), body_timeout_s=limit_s(0.5)),
        storage=StorageConfig(uri=str(folder / "storage")),
    )
    with collector() as (address, traces):
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": address, "OTEL_BSP_SCHEDULE_DELAY": "200"}
        with ray_cluster(environment=variables):
            yield Operator(str(run(config)["url"]), folder, traces)


@pytest.mark.parametrize("stream", [False, True])
def test_each_answer_has_a_line(operator: Operator, stream: bool) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer, line = operator.ask(json=ASKED | {"n": 2} | options)
    usage = (
        json.loads(answer.text.split("\n\n")[-3].removeprefix("data: "))["usage"]
        if stream
        else answer.json()["usage"]
    )
    assert (line["key"], line["route"], line["stream"], line["status"]) == (
        "alice",
        "/v1/completions",
        stream,
        200,
    )
    assert (line["reason"], line["model_version"]) == ("length", answer.headers["x-model-version"])
    assert (line["prompt_tokens"], line["completion_tokens"]) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )
    assert (
        0 <= line["queue_s"] <= line["first_token_s"] <= line["total_s"] and line["attempts"] == 1
    )
    text = (operator.folder / "requests.jsonl").read_text()
    assert "secret" not in text and ALICE not in text


@pytest.mark.parametrize(
    ("path", "key", "asked", "status", "reason", "name"),
    [
        ("/v1/completions", ALICE, {"content": b"{", "headers": {"content-type": "application/json"}}, 400, "invalid_json", "alice"),
        ("/v1/completions", ALICE, {"json": ASKED | {"model": "other"}}, 404, "model_not_found", "alice"),
        ("/v1/completions", ALICE, {"json": ASKED | {"n": 999}}, 400, "invalid_value", "alice"),
        ("/v1/completions", ALICE, {"content": b"x" * (2 << 20)}, 413, "body_too_large", None),
        ("/v1/completions", "sk-wrong", {"json": ASKED}, 401, "invalid_api_key", None),
        ("/v1/completions", OLD, {"json": ASKED}, 401, "expired_api_key", None),
        ("/v1/nothing", ALICE, {"json": {}}, 404, "not_found", "alice"),
        ("/admin/drain", ALICE, {"json": {}}, 403, "admin_key_required", None),
        ("/tokenize", BOB, {"json": {"prompt": "a"}}, 200, "ok", "bob"),
    ],
)  # fmt: skip
def test_each_refusal_has_a_line_with_its_reason(
    operator: Operator,
    path: str,
    key: str,
    asked: dict[str, Any],
    status: int,
    reason: str,
    name: str | None,
) -> None:
    answer, line = operator.ask(path, key=key, **asked)
    assert (answer.status_code, line["status"], line["reason"], line["key"]) == (
        status,
        status,
        reason,
        name,
    )
    if reason == "expired_api_key":
        assert (
            "API key old has expired (2026-01-01T00:00:00+00:00)"
            in answer.json()["error"]["message"]
        )


def test_what_no_replica_has_seen_has_a_line_too(operator: Operator) -> None:
    """A body that stops, and headers that are too many."""
    before = len(operator.lines)
    address = ("127.0.0.1", int(operator.url.rpartition(":")[2]))
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n"
    head += b"authorization: Bearer %b\r\n" % ALICE.encode()  # a stranger would not be waited for
    for status, rest in ((b" 408 ", b"\r\n{"), (b" 431 ", b"a: b\r\n" * 101 + b"\r\n")):
        with socket.create_connection(address, timeout=limit_s(30)) as connection:
            connection.sendall(head + rest)
            assert status in read_to_end(connection)
    wait_until(lambda: len(operator.lines) == before + 2)
    late, large = operator.lines[-2:]
    assert (late["status"], late["reason"], late["attempts"]) == (408, "request_timeout", 0)
    assert (large["status"], large["reason"], large["route"]) == (431, "headers_too_large", None)


def test_a_key_has_a_limit_of_its_own(operator: Operator) -> None:
    with (
        operator.client(BOB) as http,
        http.stream("POST", "/v1/completions", json=ASKED | MANY) as first,
    ):
        lines = first.iter_lines()  # the answer ends with its iterator
        next(lines)
        answer, line = operator.ask(key=BOB, json=ASKED)
        assert (answer.status_code, line["reason"], line["key"]) == (
            429,
            "rate_limit_exceeded",
            "bob",
        )
        assert operator.ask(key=ALICE, json=ASKED)[0].status_code == 200


@pytest.mark.parametrize("has_begun", [True, False])
def test_a_client_that_leaves_has_a_line(operator: Operator, has_begun: bool) -> None:
    headers, timeout_s = {"x-request-id": secrets.token_hex(8)}, limit_s(60) if has_begun else 0.5
    [engine] = children_with("serving.engine_process.run_engine")
    if not has_begun:
        os.kill(engine.pid, signal.SIGSTOP)  # for less time than its replica would bear
    try:
        with (
            contextlib.nullcontext() if has_begun else pytest.raises(httpx.ReadTimeout),
            operator.client() as http,
            http.stream(
                "POST", "/v1/completions", json=ASKED | MANY, headers=headers, timeout=timeout_s
            ) as answer,
        ):
            next(answer.iter_lines())
        line = operator.line(headers["x-request-id"])  # before the engine could answer after all
    finally:
        os.kill(engine.pid, signal.SIGCONT)
    # Its replica tells both with the first byte
    known = ("alice", 200) if has_begun else (None, None)
    assert (line["reason"], (line["key"], line["status"])) == ("client_left", known)
    assert (line["completion_tokens"] or 0) >= int(has_begun)


def test_a_key_with_a_long_queue_keeps_no_other_waiting(operator: Operator) -> None:
    with (
        operator.client() as http,
        http.stream("POST", "/v1/completions", json=ASKED | MANY) as many,
    ):
        lines = many.iter_lines()
        next(lines)
        answer, line = operator.ask(key=BOB, json=ASKED)
        assert (answer.status_code, line["key"]) == (200, "bob")
        num_left = sum('"finish_reason":"length"' in line for line in lines)
    assert num_left >= 32, "of 64"


def test_probes_leave_no_line(operator: Operator) -> None:
    read = ["/health", "/ready", "/metrics", "/v1/models"]
    with operator.client() as http:
        assert [http.get(path).status_code for path in read] == [200] * 4
    operator.ask(json=ASKED)  # whose line comes after theirs
    assert {line["route"] for line in operator.lines}.isdisjoint(read)


def test_orders_are_kept_with_who_gave_them(operator: Operator, checkpoint: Path) -> None:
    with operator.client(OPS) as http:
        orders: list[tuple[str, dict[str, Any], int]] = [
            ("promote", {"checkpoint": str(checkpoint), "gate_text": SECRET_TEXT}, 400),
            ("rollback", {"reason": "a test"}, 409),
            ("drain", {}, 200),
            ("drain", {"drain": False}, 200),
        ]
        ids = []
        for order, asked, status in orders:
            answer = http.post(f"/admin/{order}", json=asked)
            assert answer.status_code == status, answer.text
            ids.append(answer.headers["x-request-id"])
        seen = http.get("/admin/audit").json()["orders"]
    storage = open_storage(str(operator.folder / "storage"))
    [file] = storage.list(AUDIT)
    stored = storage.read_bytes(file.key).decode()
    assert [json.loads(line) for line in stored.splitlines()] == seen
    assert [(entry["key"], entry["order"], entry["request_id"]) for entry in seen] == [
        ("ops", order, request_id) for (order, _, _), request_id in zip(orders, ids, strict=True)
    ]
    assert {entry["old"]["checkpoint"] for entry in seen} == {str(checkpoint)}
    assert [entry["result"].partition(":")[0] for entry in seen] == [
        "checkpoint_refused",
        "delivery_conflict",
        "obeyed",
        "obeyed",
    ]
    assert seen[2]["new"] == seen[2]["old"] and seen[0]["new"] is None
    assert seen[1]["asked"] == {"reason": "a test"} and seen[3]["asked"] == {"drain": False}
    assert "secret" not in stored and OPS not in stored
    assert served_checkpoints(storage) == {str(checkpoint)}
    assert operator.line(ids[0])["key"] == "ops"


def trace(operator: Operator, trace_id: str, num_spans: int) -> list[Seen]:
    wait_until(
        lambda: len(operator.traces.of(trace_id)) >= num_spans,
        why=lambda: operator.traces.of(trace_id),
    )
    spans = operator.traces.of(trace_id)
    assert len(spans) == num_spans, spans
    return spans


@needs_exporter
def test_a_streamed_request_is_one_trace_through_all_processes(operator: Operator) -> None:
    trace_id, client_span = secrets.token_hex(16), secrets.token_hex(8)
    headers = {"traceparent": f"00-{trace_id}-{client_span}-01"}
    _, line = operator.ask(json=ASKED | {"stream": True}, headers=headers)
    spans = {span.name: span for span in trace(operator, trace_id, 6)}
    door, attempt, replica = spans["POST /v1/completions"], spans["attempt"], spans["replica"]
    assert (door.parent_id, attempt.parent_id, replica.parent_id) == (
        client_span,
        door.span_id,
        attempt.span_id,
    )
    assert (door.service, attempt.service, replica.service) == (
        "raymill-proxy",
        "raymill-proxy",
        "raymill-replica",
    )
    queue, prefill, decode = stages = [spans[name] for name in ("queue", "prefill", "decode")]
    assert {stage.parent_id for stage in stages} == {replica.span_id}
    assert door.start_ns <= attempt.start_ns <= queue.start_ns <= queue.end_ns <= prefill.end_ns
    assert (
        abs(prefill.end_ns - decode.start_ns) < 10_000
        and decode.start_ns <= decode.end_ns <= door.end_ns
    )
    assert (
        replica.attributes["gen_ai.usage.output_tokens"] == 6
        and replica.attributes["raymill.key"] == "alice"
    )
    assert (line["trace_id"], door.attributes["raymill.request_id"]) == (
        trace_id,
        line["request_id"],
    )
    assert SECRET_TEXT not in repr(spans)


@needs_exporter
def test_what_the_client_does_not_sample_is_not_kept(operator: Operator) -> None:
    ids = [secrets.token_hex(16) for _ in range(2)]
    for trace_id, flag in zip(ids, ("00", "01"), strict=True):
        operator.ask(
            json=ASKED, headers={"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-{flag}"}
        )
    trace(operator, ids[1], 6)
    assert operator.traces.of(ids[0]) == []


@needs_exporter
def test_a_request_that_outlives_its_replica_is_one_trace_with_both_attempts(
    operator: Operator,
) -> None:
    trace_id = secrets.token_hex(16)
    found: list[tuple[Any, dict[str, Any]]] = []

    def ask() -> None:
        headers = {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}
        found.append(operator.ask(json=ASKED | {"stream": True}, headers=headers))

    [engine] = children_with("serving.engine_process.run_engine")
    # So nothing is answered until the replica misses its heartbeat, and ends
    os.kill(engine.pid, signal.SIGSTOP)
    asking = threading.Thread(target=ask)
    asking.start()
    asking.join()
    [(answer, line)] = found
    assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")
    assert (line["status"], line["reason"], line["attempts"]) == (200, "length", 2)
    spans = trace(operator, trace_id, 7)
    [door] = [span for span in spans if span.name.startswith("POST")]
    first, second = [span for span in spans if span.name == "attempt"]
    [served] = [span for span in spans if span.name == "replica"]
    assert (
        first.parent_id == second.parent_id == door.span_id and served.parent_id == second.span_id
    )
    assert (first.is_error, second.is_error, door.is_error) == (True, False, False)
    assert [first.attributes["raymill.attempt"], second.attributes["raymill.attempt"]] == [1, 2]

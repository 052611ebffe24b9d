"""The endpoint as `raymill complete` and `raymill promote` see it, in front of a server that
answers as one does."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from cluster.cli import main
from cluster.commands import delivery_commands
from cluster.endpoint import delivery
from cluster.endpoint.delivery import Operator, OrderRefusedError, progress_of
from cluster.endpoint.endpoint import Endpoint, stream_completion, url_of
from raymill.errors import UserError

CONTEXT = 64


@contextmanager
def served(answer: Any) -> Iterator[str]:
    """A server on loopback; `answer(path, body)` gives status and text. Yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers.get("content-length", 0))
            status, text = answer(self.path, json.loads(self.rfile.read(size) or b"{}"))
            self.send_response(status)
            self.send_header("content-length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self) -> None:
            self.do_POST()

        def log_message(self, *words: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("text", ["hi", "hi\n"])
def test_a_completion_ends_its_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Or the prompt of the shell would stand behind the answer."""
    chunk = json.dumps({"choices": [{"text": text, "finish_reason": "length"}]})

    def answer(path: str, body: dict[str, Any]) -> tuple[int, str]:
        if path == "/v1/models":
            return 200, json.dumps({"data": [{"id": "mine"}]})
        return 200, f"data: {chunk}\n\ndata: [DONE]\n\n"

    with served(answer) as url:
        assert main(["complete", "To be", "--max-tokens", "2", "--url", url]) == 0
    assert capsys.readouterr().out == "hi\n"


@pytest.mark.parametrize(
    ("num_prompt_tokens", "asked", "expected"),
    [(3, None, 61), (0, None, 64), (64, None, 1), (3, 7, 7), (None, None, 64)],
)
def test_a_completion_takes_what_fits(
    num_prompt_tokens: int | None, asked: int | None, expected: int
) -> None:
    """`num_prompt_tokens` None: an endpoint without /tokenize."""
    bodies: list[dict[str, Any]] = []

    def answer(path: str, body: dict[str, Any]) -> tuple[int, str]:
        if path == "/tokenize":
            known = num_prompt_tokens is not None
            return (200 if known else 404), json.dumps(
                {"count": num_prompt_tokens, "max_model_len": CONTEXT}
            )
        bodies.append(body)
        return (
            200,
            'data: {"choices": [{"text": "hi", "finish_reason": "length"}]}\n\ndata: [DONE]\n\n',
        )

    with served(answer) as url:
        request = {"prompt": "import os", "max_tokens": asked}
        assert (
            stream_completion(Endpoint(url, "second", None), request, on_text=lambda text: None)[
                "text"
            ]
            == "hi"
        )
    assert [body["max_tokens"] for body in bodies] == [expected]


@pytest.mark.parametrize("words", [["x"], ["--follow", "run"]])
def test_a_promotion_that_is_not_allowed_is_refused_before_anything_is_read(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It took a minute on a busy machine, most of it for PyTorch."""
    monkeypatch.setattr(
        delivery_commands, "_gate_rows", lambda *_: pytest.fail("the gate's rows were read")
    )
    with served(
        lambda path, body: (404, json.dumps({"error": {"message": "There is nothing"}}))
    ) as url:
        assert main(["promote", *words, "--url", url, "--storage.uri", str(tmp_path)]) == 1
    assert "asks for an admin key: give --admin-key-file" in capsys.readouterr().err


def state(phase: str, **fields: Any) -> dict[str, Any]:
    terms = {"canary_percent": 5.0, "watch_s": 60.0}
    live = {"checkpoint": "/old"}
    return {
        "phase": phase,
        "live": live,
        "candidate": None,
        "terms": terms,
        "outcome": None,
    } | fields


def test_a_promotion_is_reported_while_it_lasts(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (key := tmp_path / "key").write_text("k\n")
    new = {"checkpoint": "/new"}
    watching = state("watching", live=new)
    states = [
        state("loading", candidate=new),
        watching,
        watching,
        state("steady", live=new, terms=None),
    ]
    monkeypatch.setattr(delivery, "POLL_S", 0.01)
    monkeypatch.setattr(delivery, "SAY_S", 0.0)

    def answer(path: str, body: dict[str, Any]) -> tuple[int, str]:
        phase_s = 20.0 * (4 - len(states))
        return 200, json.dumps({"delivery": states.pop(0), "phase_s": phase_s})

    with served(answer) as url:
        assert Operator(Endpoint(url, "", None, str(key))).wait()["phase"] == "steady"
    assert capsys.readouterr().err.splitlines() == [
        "loading: each replica loads and tests /new, for 0 s so far; /old serves",
        "watching: /new serves; for 40 s more, errors or slowness roll it back",
        "watching: /new serves; for 20 s more, errors or slowness roll it back",
        "steady: /new serves",
    ]


def test_a_promotion_of_what_is_not_there_says_that_alone_and_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("key").write_text("k\n")
    paths: list[str] = []

    def answer(path: str, body: dict[str, Any]) -> tuple[int, str]:
        paths.append(path)
        return 200, json.dumps({"delivery": state("steady"), "phase_s": 1.0})

    with served(answer) as url:
        assert main(["promote", "nosuch", "--url", url, "--admin-key-file", "key"]) == 1
    [said] = capsys.readouterr().err.splitlines()
    assert "unknown checkpoint" in said and "nosuch" in said
    assert "/admin/promote" not in paths


def test_a_canary_is_reported_with_its_share() -> None:
    said = progress_of(state("canary", candidate={"checkpoint": "/new"}), phase_s=12.0)
    assert (
        said
        == "canary: /new serves 5% of the clients (an API key keeps its version), and is watched for 48 s more"
    )


def test_a_refused_promotion_says_why(tmp_path: Any) -> None:
    (key := tmp_path / "key").write_text("k\n")
    outcome = {
        "result": "refused",
        "reason": "its loss is worse",
        "version": {"checkpoint": "/new"},
    }
    body = json.dumps({"delivery": state("steady", outcome=outcome), "phase_s": 1.0})
    with (
        served(lambda path, asked: (200, body)) as url,
        pytest.raises(OrderRefusedError, match="/new was refused: its loss"),
    ):
        Operator(Endpoint(url, "", None, str(key))).wait()


def test_the_operator_of_an_adapter_sees_and_changes_that_one_alone(tmp_path: Path) -> None:
    (key := tmp_path / "key").write_text("k\n")
    asked: list[tuple[str, Any]] = []
    support = state("watching", live={"checkpoint": "/support/2"})
    body = {
        "delivery": state("steady") | {"adapters": {"support": support}},
        "phase_s": 1.0,
        "adapters_phase_s": {"support": 20.0},
    }

    def answer(path: str, given: Any) -> tuple[int, str]:
        asked.append((path, given))
        order = {"adapters": {"support": support}} | state("loading")
        return 200, json.dumps(body if path == "/admin/status" else order)

    with served(answer) as url:
        operator = Operator(Endpoint(url, "", None, str(key)), adapter="support")
        assert operator.roll_back() == support
        operator.promote("/support/3", terms={}, gate={})
        assert operator.wait(until=("watching",)) == support
        stranger = Operator(Endpoint(url, "", None, str(key)), adapter="sql")
        with pytest.raises(UserError, match=r"no adapter is called sql; .* serves support"):
            stranger.wait_until_steady()
    named = {"adapter": "support"}
    assert asked[:2] == [
        ("/admin/rollback", named),
        ("/admin/promote", named | {"checkpoint": "/support/3"}),
    ]


def test_a_text_may_hold_what_ends_lines_elsewhere() -> None:
    """JSON has U+2028, U+2029 and U+0085 as they are, and httpx would end lines at them."""
    text = "one\u2028two\u2029three\x85four"
    chunk = json.dumps({"choices": [{"text": text, "finish_reason": "stop"}]}, ensure_ascii=False)
    with served(lambda path, body: (200, f"data: {chunk}\n\ndata: [DONE]\n\n")) as url:
        request = {"prompt": "x", "max_tokens": 8}
        assert (
            stream_completion(Endpoint(url, "second", None), request, on_text=lambda _: None)[
                "text"
            ]
            == text
        )


@pytest.mark.parametrize(
    ("url", "asks"),
    [
        ("http://127.0.0.1:8000", False),
        ("http://localhost:8000", False),
        ("http://[::1]:8000", False),
        ("http://0.0.0.0:8000", False),
        ("http://192.0.2.1:8000", True),
        ("https://models.example.com", True),
    ],
)
def test_only_for_another_machine_a_proxy_is_asked(url: str, asks: bool) -> None:
    assert Endpoint(url, "", None).asks_proxies is asks


def test_no_proxy_stands_before_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # where nothing listens
    (key := tmp_path / "key").write_text("k\n")

    def answer(path: str, body: dict[str, Any]) -> tuple[int, str]:
        if path == "/admin/status":
            return 200, json.dumps({"delivery": state("steady")})
        return 200, 'data: {"choices": [{"text": "hi", "finish_reason": "length"}]}\n\n'

    with served(answer) as url:
        endpoint = Endpoint(url, "second", None, str(key))
        request = {"prompt": "x", "max_tokens": 8}
        assert stream_completion(endpoint, request, on_text=lambda _: None)["text"] == "hi"
        assert Operator(endpoint).wait_until_steady()["phase"] == "steady"


@pytest.mark.parametrize(
    "content", ['{"error": "no such thing"}', "[1]", "<html>no such thing</html>", '{"error": []}']
)
@pytest.mark.parametrize("status", [400, 404, 502])
def test_what_another_kind_of_server_answers_is_quoted(
    content: str, status: int, tmp_path: Path
) -> None:
    (key := tmp_path / "key").write_text("k\n")
    with served(lambda path, body: (status, content)) as url:
        endpoint = Endpoint(url, "second", None, str(key))
        with pytest.raises(UserError, match=re.escape(content)):
            stream_completion(endpoint, {"prompt": "x", "max_tokens": 8}, on_text=lambda _: None)
        with pytest.raises(UserError, match=re.escape(content)):
            Operator(endpoint).require_access()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("::1", "http://[::1]:8000"),
        ("gpu", "http://gpu:8000"),
    ],
)
def test_an_address_with_colons_stands_in_brackets(host: str, url: str) -> None:
    assert url_of(host, 8000) == url and httpx.URL(url).host == host

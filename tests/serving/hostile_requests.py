"""Requests that must be refused, each with its right answer, as one table. The protocol refuses most
bodies in process (protocol/test_hostile_bodies.py); the rest, and ten of those, are sent to an
endpoint. Those that need a raw socket, time or a second model are in endpoint/test_hostile.py under
the same numbers."""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MODEL, KEY = "tiny", "sk-test"
COMPLETIONS, CHAT, EMBEDDINGS = (
    "POST /v1/completions",
    "POST /v1/chat/completions",
    "POST /v1/embeddings",
)


@dataclass(frozen=True)
class Hostile:
    number: int  # several rows may be one kind
    name: str
    route: str
    status: int
    code: str | None = None
    param: str | None = None
    # A large one is made when it is sent, not wherever tests are collected
    body: bytes | Callable[[], bytes] = b""
    headers: dict[str, str] = field(default_factory=dict)


def raw(
    number: int,
    name: str,
    content: bytes | Callable[[], bytes],
    status: int,
    code: str | None = None,
    **more: Any,
) -> Hostile:
    return Hostile(number, name, COMPLETIONS, status, code, body=content, **more)


def completion(
    number: int, name: str, param: str, *, status: int = 400, code: str | None = None, **fields: Any
) -> Hostile:
    """One whose JSON is right and whose field `param` is not."""
    content = {"model": MODEL, "prompt": "x", "max_tokens": 1} | fields
    return Hostile(number, name, COMPLETIONS, status, code, param, json.dumps(content).encode())


def chat(number: int, name: str, param: str, *, code: str | None = None, **fields: Any) -> Hostile:
    content = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 1,
    } | fields
    return Hostile(number, name, CHAT, 400, code, param, json.dumps(content).encode())


def embedding(
    number: int, name: str, param: str, *, status: int = 400, code: str | None = None, **fields: Any
) -> Hostile:
    content = {"model": MODEL, "input": "x"} | fields
    return Hostile(number, name, EMBEDDINGS, status, code, param, json.dumps(content).encode())


def literal(number: int, name: str, text: str) -> Hostile:
    return raw(
        number,
        name,
        b'{"model":"tiny","prompt":"x","temperature":' + text.encode() + b"}",
        400,
        "invalid_json",
    )


INVALID_JSON = [
    raw(1, "empty body", b"", 400, "invalid_json"),
    raw(2, "broken JSON", b'{"model":', 400, "invalid_json"),
    raw(3, "an array", b"[1]", 400, "invalid_json"),
    raw(3, "a number", b"3", 400, "invalid_json"),
    raw(4, "invalid UTF-8", b'{"model":"tiny","prompt":"\xff"}', 400, "invalid_json"),
    raw(5, "UTF-16", '{"model":"tiny","prompt":"x"}'.encode("utf-16"), 400, "invalid_json"),
    raw(
        5,
        "byte order mark",
        '{"model":"tiny","prompt":"x"}'.encode("utf-8-sig"),
        400,
        "invalid_json",
    ),
    raw(6, "half a surrogate pair", b'{"model":"tiny","prompt":"\\ud800"}', 400, "invalid_json"),
    literal(8, "NaN", "NaN"),
    literal(8, "Infinity", "-Infinity"),
    literal(8, "overflow", "1e999"),
    literal(8, "a number of 400 digits", "9" * 400),
    literal(13, "5,000 digits", "9" * 5000),
    *(
        raw(
            8,
            f"{name} NaN",
            b'{"model":"tiny","prompt":"x","%b":NaN}' % name.encode(),
            400,
            "invalid_json",
        )
        for name in ("min_tokens", "prompt_logprobs", "stop_token_ids")
    ),
    raw(
        30,
        "stop_token_ids twice",
        b'{"prompt":"x","stop_token_ids":[1],"stop_token_ids":[2]}',
        400,
        "invalid_json",
    ),
    raw(30, "a key twice", b'{"model":"tiny","model":"tiny","prompt":"x"}', 400, "invalid_json"),
    raw(
        31,
        "nested 100,000 deep",
        b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        400,
        "invalid_json",
    ),
    raw(31, "nested 33 deep", b'{"prompt":' + b"[" * 32 + b"]" * 32 + b"}", 400, "invalid_json"),
]

WRONG_VALUES = [
    completion(9, "NaN as text", "temperature", temperature="nan"),
    *(completion(10, f"temperature {t}", "temperature", temperature=t) for t in (-1, 2.1, 1e308)),
    *(completion(11, f"top_p {p}", "top_p", top_p=p) for p in (-0.1, 0, 1.1)),
    completion(12, "10^9 choices", "n", n=10**9),
    completion(13, "10^300 choices", "n", n=10**300),
    *(completion(14, f"n {n!r}", "n", n=n) for n in (True, 1.0, "1", 0, -1)),
    completion(15, "best_of", "best_of", code="unsupported_parameter", best_of=1000, stream=True),
    *(completion(16, f"max_tokens {m}", "max_tokens", max_tokens=m) for m in (0, -1, 10**12)),
    completion(17, "longer than the context", "max_tokens", code="context_length_exceeded", max_tokens=128),
    completion(19, "no prompt", "prompt", prompt=None, code="missing_required_parameter"),
    completion(19, "an empty list", "prompt", prompt=[]),
    completion(20, "10^5 prompts", "prompt", prompt=["x"] * 10**5),
    *(completion(21, f"token id {i!r}", "prompt", prompt=[i]) for i in (-1, 10**6, 2**63, 1.5, True)),
    completion(22, "ids and text mixed", "prompt", prompt=[1, "a"]),
    completion(22, "lists and text mixed", "prompt", prompt=[[1], "a"]),
    completion(23, "10^5 stop strings", "stop", stop=["a"] * 10**5),
    completion(23, "17 stop strings", "stop", stop=["a"] * 17),
    completion(23, "an empty stop string", "stop", stop=""),
    completion(23, "a long stop string", "stop", stop="x" * 10**5),
    completion(23, "a number to stop at", "stop", stop=[1]),
    completion(24, "a bias beyond the vocabulary", "logit_bias", logit_bias={"99999": 1}),
    completion(25, "a bias for a word", "logit_bias", logit_bias={"AI": 1}),
    completion(25, "a huge bias", "logit_bias.1", logit_bias={"1": 1e9}),
    completion(25, "50,000 biases", "logit_bias", logit_bias={str(i): 1 for i in range(50_000)}),
    *(completion(26, f"logprobs {k}", "logprobs", logprobs=k) for k in (-1, 10**6)),
    *(completion(27, f"{name} penalty", f"{name}_penalty", **{f"{name}_penalty": 1e9})
      for name in ("presence", "frequency", "repetition")),
    completion(27, "a penalty that vanishes", "repetition_penalty", repetition_penalty=5e-324),
    *(completion(28, f"seed {s!r}"[:20], "seed", seed=s) for s in (2**100, "x")),
    completion(29, "unknown field", "temprature", code="unknown_parameter", temprature=1),
    completion(32, "no model", "model", model=None, code="missing_required_parameter"),
    completion(32, "a path as model", "model", status=404, code="model_not_found", model="../../etc"),
    completion(32, "a line break in the model", "model", status=404, code="model_not_found", model="a\r\nb: c"),
    completion(32, "a long model", "model", status=404, code="model_not_found", model="x" * 10**6),
    completion(33, "stream as text", "stream", stream="yes"),
    completion(33, "options without a stream", "stream_options", stream_options={"include_usage": True}),
    completion(34, "suffix", "suffix", code="unsupported_parameter", suffix="x"),
    chat(34, "tools", "tools.0.function.name", code="missing_required_parameter", tools=[{"type": "function", "function": {}}]),
    chat(34, "a tool's answer", "messages.1.tool_calls.0.function", code="missing_required_parameter", messages=[
        {"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    ]),
    chat(34, "an image", "messages.0.content", messages=[
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}
    ]),
    chat(35, "unknown role", "messages.0.role", messages=[{"role": "root", "content": "x"}]),
    chat(35, "no content", "messages.0.content", messages=[{"role": "user", "content": None}]),
    chat(35, "no messages", "messages", messages=[]),
    chat(35, "15,000 messages", "messages", messages=[{"role": "user", "content": ""}] * 15_000),
    chat(35, "a template's own name", "chat_template_kwargs", code="invalid_value", chat_template_kwargs={"messages": []}),
    completion(36, "a response format", "response_format.type", code="invalid_value", response_format={"type": "x"}),
    completion(20, "257 prompts", "prompt", prompt=["x"] * 257),
    *(completion(60, f"a token id {i!r} to stop at"[:40], "stop_token_ids", stop_token_ids=[1, i])
      for i in (-1, 300, 10**6, 2**70)),
    *(completion(60, f"{i!r} to stop at", "stop_token_ids.0", stop_token_ids=[i]) for i in (True, 1.5, "1", None, [])),
    completion(60, "10^5 tokens to stop at", "stop_token_ids", stop_token_ids=[1] * 10**5),
    *(completion(61, f"min_tokens {m!r}", "min_tokens", min_tokens=m) for m in (-1, 2, 10**12, 10**300, True, "1", 1.5)),
    chat(61, "min_tokens above a chat's max_tokens", "min_tokens", min_tokens=2),
    *(completion(62, f"prompt_logprobs {k!r}", "prompt_logprobs", prompt_logprobs=k) for k in (-1, 21, 10**9, True, "1")),
    completion(62, "prompt_logprobs of a stream", "prompt_logprobs", prompt_logprobs=1, stream=True),
    *(completion(63, f"return_token_ids {v!r}", "return_token_ids", return_token_ids=v) for v in (1, "yes", {})),
    embedding(64, "no input", "input", code="missing_required_parameter", input=None),
    embedding(64, "257 inputs", "input", input=["x"] * 257),
    *(embedding(64, f"token id {i!r}"[:40], "input", input=[i]) for i in (-1, 10**6, 2**70, 1.5, True)),
    embedding(64, "longer than the context", "input", code="context_length_exceeded", input=[1] * 129),
    embedding(64, "dimensions", "dimensions", code="unsupported_parameter", dimensions=8),
    embedding(64, "an encoding", "encoding_format", encoding_format="int8"),
    embedding(64, "another model", "model", status=404, code="model_not_found", model="../x"),
    completion(36, "a grammar", "guided_grammar", code="unsupported_parameter", guided_grammar="(" * 99),
]  # fmt: skip

OUTSIDE_THE_BODY = [
    raw(18, "2 MiB", b'{"prompt":"' + b"x" * (2 << 20), 413, "body_too_large"),
    raw(18, "50 MB", lambda: b'{"prompt":"' + b"x" * 50_000_000, 413, "body_too_large"),
    raw(25, "10^6 biases", lambda: json.dumps({str(i): 1 for i in range(10**6)}).encode(), 413, "body_too_large"),
    raw(37, "text", b"{}", 415, headers={"Content-Type": "text/plain"}),
    raw(37, "no type", b"{}", 415, headers={"Content-Type": ""}),
    raw(38, "a gzip bomb", lambda: gzip.compress(b"x" * 10**8), 415, headers={"Content-Encoding": "gzip"}),
    *(Hostile(39, f"{m} {path}", f"{m} {path}", 405)
      for m in ("GET", "PUT", "DELETE")
      for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/tokenize")),
    *(Hostile(40, path, f"GET {path}", 404) for path in (
        "/nowhere", "//", "/v1//completions", "/v1/models/../../etc/passwd", "/v1/completions/", "/%2e%2e/x", "/V1/models",
    )),
    *(Hostile(41, f"key {key[:20]!r}", "GET /v1/models", 401, "invalid_api_key", headers={"Authorization": key})
      for key in ("", "Bearer", "Bearer sk-wrong", "Basic sk-test", "Bearer sk-test,sk-test")),
    *(Hostile(41, f"{path} without a key", f"GET {path}", 401, "invalid_api_key", headers={"Authorization": ""})
      for path in ("/v1/models", "/metrics", "/version", "/nowhere", "/docs")),
    Hostile(41, "a user's key for /admin", "POST /admin/promote", 403, "admin_key_required"),
    Hostile(41, "an admin's key for /v1", "GET /v1/models", 401, headers={"Authorization": "Bearer sk-admin"}),
    Hostile(42, "100 KB of headers", "GET /v1/models", 431, "headers_too_large", headers={"x-a": "a" * 100_000}),
    Hostile(42, "200 headers", "GET /v1/models", 431, "headers_too_large", headers={f"x-{i}": "a" for i in range(200)}),
    *(Hostile(58, path, f"GET {path}", 404)
      for path in ("/docs", "/redoc", "/openapi.json", "/-/routes", "/docs/oauth2-redirect")),
]  # fmt: skip

BODIES = INVALID_JSON + WRONG_VALUES

NEEDS_THE_MODEL = {
    "longer than the context",
    "token id -1",
    "token id 1000000",
    "token id 9223372036854775808",
    "token id 1180591620717411303424",
    "a bias beyond the vocabulary",
    "a path as model",
    "a line break in the model",
    "a long model",
    "another model",
    "a token id -1 to stop at",
    "a token id 300 to stop at",
    "a token id 1000000 to stop at",
    "a token id 1180591620717411303424 to sto",
    "min_tokens 2",
    "min_tokens above a chat's max_tokens",
}
"""Bodies that only a replica can refuse, by its vocabulary, its context and the models that it
serves."""

TEN_OF_THE_PROTOCOL = {
    "empty body",
    "invalid UTF-8",
    "NaN",
    "5,000 digits",
    "nested 100,000 deep",
    "n True",
    "unknown field",
    "tools",
    "unknown role",
    "no input",
}
"""Bodies that are sent to an endpoint too, though the protocol refuses them by itself."""

AT_THE_ENDPOINT = [
    *(case for case in BODIES if case.name in NEEDS_THE_MODEL | TEN_OF_THE_PROTOCOL),
    *OUTSIDE_THE_BODY,
]

HEAD = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"


def post(content: bytes, *, more: str = "") -> bytes:
    return f"{HEAD}{more}Content-Length: {len(content)}\r\n\r\n".encode() + content


CHUNKED = HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\n"
FRAMINGS: list[tuple[int, bytes, int]] = [
    (41, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer sk-test\r\nAuthorization: Bearer sk-test\r\n"
         b"Connection: close\r\n\r\n", 401),
    (41, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\xfe\r\nConnection: close\r\n\r\n", 401),
    (42, b"GET / HTTP/1.1\r\nHost: localhost\r\nx: " + b"a" * 10_000_000 + b"\r\n\r\n", 431),
    (42, b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"x-%d: a\r\n" % i for i in range(10_000)) + b"\r\n", 431),
    (42, b"GET /" + b"a" * 1_000_000, 431),
    (43, HEAD.encode() + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}", 400),
    (43, HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
    (43, HEAD.encode() + b"Content-Length: -1\r\n\r\n", 400),
    (43, HEAD.encode() + b"Content-Length: 1" + b"0" * 30 + b"\r\n\r\n", 400),
    (43, HEAD.encode() + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
    (43, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 40, 400),
    (43, b"GET / HTTP/1.1\r\nHost: localhost\r\nx: a\x00b\r\n\r\n", 400),
    (43, b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    (44, b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
    (44, b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close\r\n\r\n", 400),
    (18, HEAD.encode() + b"Content-Length: 99000000000\r\n\r\n", 413),
    (18, HEAD.encode() + b"Expect: 100-continue\r\nContent-Length: 2000000\r\n\r\n", 413),
    (59, CHUNKED + b"1\r\na\r\n0\r\n" + b"a:\r\n" * 1_000_000, 431),
    (59, CHUNKED + b"1\r\na\r\n0\r\na: " + b"a" * 1_000_000, 431),
    (59, CHUNKED + b"1;" + b"a" * 1_000_000, 431),
]  # fmt: skip

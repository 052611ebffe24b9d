"""Generated requests on a real endpoint: each gets 200 or a 4xx in OpenAI's shape, and the same
replica serves on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving.endpoint_parts import assert_error, engine_and_replica
from tests.serving.hostile_requests import MODEL
from tests.serving.openapi import openapi
from tests.serving.responses.response_types import streamed
from tests.time_limits import limit_s

pytestmark = pytest.mark.cluster

ROUTES = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
    "/v1/xray",
)
TIMEOUT_S = limit_s(30)  # an answer that takes longer counts as none
VOCAB_SIZE = 300
bounded = settings(
    deadline=None,
    print_blob=True,
    # What failed is printed; making it smaller would take minutes
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def http(open_url: str, run_checkpoint: Path) -> Iterator[httpx.Client]:
    before = engine_and_replica(run_checkpoint)
    with httpx.Client(
        base_url=open_url, timeout=TIMEOUT_S, headers={"Content-Type": "application/json"}
    ) as http:
        yield http
        answer = http.post(
            "/v1/completions",
            json={"model": MODEL, "prompt": "x", "max_tokens": 3, "ignore_eos": True},
        )
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3
    assert engine_and_replica(run_checkpoint) == before


def anything() -> st.SearchStrategy[Any]:
    scalars = (
        st.none()
        | st.booleans()
        | st.integers(-(2**65), 2**65)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=20)
    )
    return st.recursive(
        scalars,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
        ),
    )


def number(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high) | st.integers(int(low), int(high))


TEXTS = st.text(max_size=60)
IDS = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=40)
SAMPLING: dict[str, st.SearchStrategy[Any]] = {
    "temperature": number(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-1, 400),
    "min_p": st.floats(0, 1),
    "seed": st.integers(-(2**63), 2**63 - 1),
}
GENERATION = SAMPLING | {
    "n": st.integers(1, 8),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries(
        {},
        optional={
            "include_usage": st.booleans(),
            "continuous_usage_stats": st.booleans() | st.none(),
        },
    ),
    "stop": st.text(min_size=1, max_size=5) | st.lists(st.text(min_size=1, max_size=3), max_size=4),
    "user": TEXTS,
    "logit_bias": st.dictionaries(
        st.integers(0, VOCAB_SIZE).map(str), number(-100, 100), max_size=5
    ),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "repetition_penalty": st.floats(0, 2),
    "ignore_eos": st.booleans(),
    "stop_token_ids": st.lists(st.integers(0, VOCAB_SIZE), max_size=9),
    "min_tokens": st.integers(0, 20),
    "prompt_logprobs": st.integers(0, 21),
    "return_token_ids": st.booleans(),
    "suffix": TEXTS,
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}])
    | st.dictionaries(st.sampled_from(["type", "enum", "minimum"]), anything(), max_size=2).map(
        lambda schema: {
            "type": "json_schema",
            "json_schema": {"name": "generated", "schema": schema},
        }
    ),
    "structured_outputs": st.fixed_dictionaries({"regex": st.text(min_size=1, max_size=12)})
    | st.fixed_dictionaries({"choice": st.lists(TEXTS, max_size=3)}),
    "tools": st.just([]),
    "temprature": st.just(1),
}
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]),
        "content": TEXTS
        | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}), max_size=3),
    },
    optional={"name": TEXTS, "tool_call_id": TEXTS},
)
ITEM = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "developer", "user", "assistant"]),
        "content": TEXTS
        | st.lists(
            st.fixed_dictionaries({"type": st.just("input_text"), "text": TEXTS}), max_size=3
        ),
    }
) | st.fixed_dictionaries(
    {
        "type": st.sampled_from(["function_call", "function_call_output", "reasoning", "x"]),
        "call_id": TEXTS,
    },
    optional={"name": st.just("f"), "arguments": TEXTS, "output": TEXTS},
)
TOOL = st.fixed_dictionaries(
    {"type": st.just("function"), "function": st.fixed_dictionaries({"name": st.just("f")})}
)
NEW_TOKENS = st.integers(0, 9) | st.integers(0, 200)
REQUIRED: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "/v1/completions": {
        "prompt": TEXTS | IDS | st.lists(TEXTS, max_size=5) | st.lists(IDS, max_size=5)
    },
    "/v1/chat/completions": {"messages": st.lists(MESSAGE, max_size=4), "max_tokens": NEW_TOKENS},
    "/v1/responses": {"input": TEXTS | st.lists(ITEM, max_size=4), "max_output_tokens": NEW_TOKENS},
    "/v1/embeddings": {
        "input": TEXTS | IDS | st.lists(TEXTS, max_size=5) | st.lists(IDS, max_size=5)
    },
    "/tokenize": {"prompt": TEXTS},
    "/detokenize": {"tokens": IDS},
    "/v1/xray": {"prompt": TEXTS | IDS},
}
OPTIONAL: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "/v1/completions": GENERATION
    | {
        "max_tokens": NEW_TOKENS,
        "max_completion_tokens": NEW_TOKENS,
        "logprobs": st.integers(0, 21),
        "echo": st.booleans(),
        "add_special_tokens": st.booleans(),
        "parse_special": st.booleans(),
    },
    "/v1/chat/completions": GENERATION
    | {
        "max_completion_tokens": NEW_TOKENS,
        "logprobs": st.booleans(),
        "top_logprobs": st.integers(0, 21),
        "tools": st.lists(TOOL, max_size=2),
        "tool_choice": st.sampled_from(["none", "auto", "required"]),
    },
    "/v1/responses": {
        name: field
        for name, field in GENERATION.items()
        if name not in ("n", "prompt_logprobs", "return_token_ids", "response_format")
    }
    | {
        "instructions": TEXTS,
        "top_logprobs": st.integers(0, 21),
        "text": st.fixed_dictionaries({"format": GENERATION["response_format"]})
        | st.fixed_dictionaries({}, optional={"verbosity": st.sampled_from(["low", "x"])}),
        "reasoning": st.fixed_dictionaries({}, optional={"effort": st.sampled_from(["low", None])}),
        "tools": st.lists(
            st.fixed_dictionaries({"type": st.just("function"), "name": st.just("f")}), max_size=2
        ),
        "tool_choice": st.sampled_from(["none", "auto", "required"]),
    },
    "/v1/embeddings": {"encoding_format": st.sampled_from(["float", "base64"]), "user": TEXTS},
    "/tokenize": {
        "add_special_tokens": st.booleans(),
        "parse_special": st.booleans(),
        "return_token_strs": st.booleans(),
    },
    "/detokenize": {},
    "/v1/xray": SAMPLING
    | {
        "max_tokens": NEW_TOKENS,
        "layers": st.lists(st.integers(0, 2), max_size=3),
        "heads": st.lists(st.integers(0, 2), max_size=3),
        "top": st.integers(0, 21),
        "step": st.integers(0, 9),
    },
}


@st.composite
def bodies(draw: st.DrawFn, route: str) -> dict[str, Any]:
    """Mostly fields that are right, so that they are read and meet each other; one in eight is
    anything."""

    def value(field: st.SearchStrategy[Any]) -> Any:
        return draw(anything() if draw(st.integers(0, 7)) == 0 else field)

    names = draw(
        st.lists(st.sampled_from(sorted(OPTIONAL[route]) or [""]), unique=True, max_size=6)
    )
    body = {name: value(OPTIONAL[route][name]) for name in names if name}
    body |= {name: value(field) for name, field in REQUIRED[route].items()}
    return body | {"model": value(st.just(MODEL))}


def check_answer(body: dict[str, Any], answer: httpx.Response) -> None:
    if answer.status_code != 200:
        assert answer.status_code in (400, 404, 429), (answer.status_code, answer.text)
        assert_error(answer, answer.status_code)
    elif answer.text.startswith("event: response.created"):
        streamed(answer.text)
    elif answer.headers["content-type"].startswith("text/event-stream"):
        *events, done, rest = answer.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        parts = [json.loads(event.removeprefix("data: ")) for event in events]
        reasons = [
            c["finish_reason"]
            for part in parts
            for c in part["choices"]
            if c["finish_reason"] is not None
        ]
        assert (
            reasons
            and set(reasons) <= {"stop", "length"}
            and len(reasons) % (body.get("n") or 1) == 0
        )
    else:
        assert isinstance(strict_json(answer.text), dict)


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("route", ROUTES)
@settings(bounded, max_examples=80)
@given(data=st.data())
def test_any_fields_get_an_answer(http: httpx.Client, route: str, data: st.DataObject) -> None:
    body = data.draw(bodies(route))
    check_answer(body, http.post(route, content=json.dumps(body).encode()))


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/xray"])
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 5e-324},
        {"temperature": 1, "top_p": 5e-324, "top_k": 2},
        {"temperature": 2e-5},
    ],
)
def test_the_smallest_numbers_are_greedy(
    http: httpx.Client, route: str, fields: dict[str, float]
) -> None:
    asked = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 5, "seed": 1}
    greedy, small = (
        http.post(route, json=asked | more).json() for more in ({"temperature": 0}, fields)
    )
    if route == "/v1/completions":
        assert small["choices"] == greedy["choices"]
    else:
        assert small["tokens"] == greedy["tokens"]


schema = schemathesis.openapi.from_dict(openapi())


@schema.parametrize()
@settings(bounded, max_examples=60)
def test_the_schema_and_the_endpoint_agree(
    case: schemathesis.Case, open_url: str, http: httpx.Client
) -> None:
    """Answers have the shapes, types and status codes of the schema, and a body that is not of it
    is refused."""
    case.call_and_validate(
        base_url=open_url,
        timeout=TIMEOUT_S,
        checks=[
            not_a_server_error,
            status_code_conformance,
            content_type_conformance,
            response_schema_conformance,
            negative_data_rejection,
        ],
    )

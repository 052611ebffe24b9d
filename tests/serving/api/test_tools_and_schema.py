"""Tools together with a schema over HTTP, on a replica without Ray: an answer is a call or a text by
the schema, whichever the model chooses."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from model.config import GPTConfig
from model.gpt import GPT
from model.text.chat_format import ChatFormat
from model.text.tokenizer import Tokenizer
from serving.delivery.versions import Versions
from tests.serving.endpoint_parts import Run, shared_replica
from tests.serving.structured.schema_cases import closed
from tests.serving.tiny_models import write_model
from tests.serving.tools.templates import HERMES_TEMPLATE, LLAMA_TEMPLATE

CITY = closed({"city": {"enum": ["Wien", "Graz"]}})
TRIP = closed({"name": {"enum": ["weather", "tea"]}, "days": {"type": "integer", "maximum": 9}})
NOTES = {"description": "x" * 200_000, "title": "y" * 20_000}
"""More than a grammar may have, which is no part of one."""
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Looks.", "parameters": CITY},
    },
    {"type": "function", "function": {"name": "time"}},
]
BY_SCHEMA = {
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "trip", "schema": TRIP | NOTES, "strict": True, **NOTES},
    }
}
del BY_SCHEMA["response_format"]["json_schema"]["title"]  # type: ignore[attr-defined]
USER = {"role": "user", "content": "the fox"}


@pytest.fixture(scope="module", params=[HERMES_TEMPLATE, LLAMA_TEMPLATE], ids=["Hermes", "Llama"])
def run(
    request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Run]:
    shape = {"n_positions": 1024, "n_layer": 1, "n_head": 2, "n_embd": 32}
    gpt = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, initializer_range=0.3, **shape))
    gpt.init_weights(3)
    chat = ChatFormat(request.param, "", tokenizer.end_of_text)
    talking = Tokenizer.from_json(tokenizer.to_json(), chat)
    folder = write_model(tmp_path_factory.mktemp("both") / "step-1", gpt.eval(), talking)
    with shared_replica(folder) as run:
        yield run


async def ask(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    asked = {"model": "tiny", "messages": [USER], "seed": 1, "max_tokens": 300, "tools": TOOLS}
    answer = await http.post("/v1/chat/completions", json=asked | BY_SCHEMA | fields)
    assert answer.status_code == 200, answer.text
    return answer


def kind_of(choice: dict[str, Any]) -> str:
    """The kind of a choice, which is right."""
    message, calls = choice["message"], choice["message"].get("tool_calls", [])
    if not calls:
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(message["content"]), TRIP)
        return "text"
    assert choice["finish_reason"] == "tool_calls" and message["content"] is None
    for call in calls:
        arguments = json.loads(call["function"]["arguments"])
        is_weather = call["function"]["name"] == "weather"
        jsonschema.validate(arguments, CITY if is_weather else {"maxProperties": 0})
    return "calls"


@pytest.mark.more
def test_an_answer_is_a_call_or_a_text_by_the_schema_streamed_or_not(run: Run) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        asked = {"n": 8, "parallel_tool_calls": False}
        found = [
            choice
            for seed in range(3)
            for choice in (await ask(http, **asked, seed=seed)).json()["choices"]
        ]
        assert {kind_of(choice) for choice in found} == {"text", "calls"}
        streamed: dict[int, dict[str, str]] = {}
        for line in (await ask(http, **asked, seed=0, stream=True)).text.split("\n\n")[:-2]:
            [part] = json.loads(line.removeprefix("data: "))["choices"]
            choice = streamed.setdefault(part["index"], {"content": "", "call": ""})
            choice["content"] += part["delta"].get("content") or ""
            for piece in part["delta"].get("tool_calls", []):
                choice["call"] += piece["function"].get("name", "") + piece["function"]["arguments"]
        for choice in found[:8]:
            [call] = choice["message"].get("tool_calls", []) or [None]
            written = "" if call is None else call["function"]["name"]
            written += "" if call is None else call["function"]["arguments"]
            content = choice["message"]["content"] or ""
            assert streamed[choice["index"]] == {"content": content, "call": written}

    run(check)


def test_required_calls_follow_no_schema_and_without_tools_all_texts_do(run: Run) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        named = {"type": "function", "function": {"name": "weather"}}
        long = {"type": "function", "function": {"name": "long", "description": "x" * 500_000}}
        for choice, tools in (("required", TOOLS), (named, TOOLS), ("none", [long])):
            asked = {"tool_choice": choice, "tools": tools, "parallel_tool_calls": False}
            answer = await ask(http, n=4, **asked)
            kinds = {kind_of(found) for found in answer.json()["choices"]}
            assert kinds == ({"text"} if choice == "none" else {"calls"})
        only = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "time"}}]}
        answer = await ask(
            http, n=8, tool_choice={"type": "allowed_tools", "allowed_tools": only}, seed=2
        )
        for found in answer.json()["choices"]:
            kind_of(found)
            calls = found["message"].get("tool_calls", [])
            assert {call["function"]["name"] for call in calls} <= {"time"}

    run(check)


def test_any_json_object_and_vllms_words_go_with_tools_too(run: Run) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        outputs = {"structured_outputs": {"json": json.dumps(TRIP)}, "response_format": None}
        for found in (await ask(http, **outputs, n=4)).json()["choices"]:
            kind_of(found)
        anything = {"response_format": {"type": "json_object"}, "n": 4}
        for found in (await ask(http, **anything)).json()["choices"]:
            text = found["message"]["content"]
            assert text is None or text.startswith("{")
        bad = BY_SCHEMA["response_format"] | {
            "json_schema": {"name": "a", "schema": closed({"a": {"not": {}}})}
        }
        asked = {"model": "tiny", "messages": [USER], "tools": TOOLS, "response_format": bad}
        error = (await http.post("/v1/chat/completions", json=asked)).json()["error"]
        assert error["param"] == "response_format" and "#/properties/a" in error["message"]

    run(check)

"""Clients that others wrote, unchanged, which ask a real endpoint by the route that is their
default: /v1/responses."""

import json
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from openai.types.responses import ResponseFunctionToolCall
from pydantic import BaseModel, ConfigDict, Field

from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from tests.serving.client_parts import (
    CLIENTS_PYTHON,
    SCRIPTS,
    greedy_text,
    installed,
    node_installed,
    run_client,
    run_node_client,
)
from tests.serving.hostile_requests import MODEL
from tests.serving.responses.response_types import said, streamed
from tests.time_limits import limit_s

ASKED: dict[str, Any] = {"model": MODEL, "input": "a trip", "temperature": 0}
pytestmark = [pytest.mark.cluster, pytest.mark.slow]


class Trip(BaseModel):
    """A trip to one city."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Vienna", "Graz"]
    days: int = Field(ge=1, le=7)


TOOL = {"type": "function", "name": "Trip", "parameters": Trip.model_json_schema(), "strict": True}


@pytest.fixture
def answer_token(tokenizer: Tokenizer) -> str:
    """The token that opens an object, for a random model's bias."""
    [token] = tokenizer.encode("{")
    return str(token)


def test_openai__asks_parses_streams_and_calls(
    tool_url: str, roomy_model: GPT, tokenizer: Tokenizer
) -> None:
    client = openai.OpenAI(base_url=f"{tool_url}/v1", api_key="none needed", max_retries=0)
    plain = client.responses.create(**ASKED, max_output_tokens=12)
    expected = greedy_text(roomy_model, tokenizer, "<|user|>a trip<|assistant|>", max_tokens=12)
    assert plain.output_text == expected
    body = ASKED | {"max_output_tokens": 12, "stream": True}
    stream = httpx.post(f"{tool_url}/v1/responses", json=body, timeout=limit_s(30))
    assert said(streamed(stream.text)) == [plain.output_text], "through the proxy"

    parsed = client.responses.parse(**ASKED, max_output_tokens=200, text_format=Trip)
    assert isinstance(parsed.output_parsed, Trip)
    with client.responses.stream(**ASKED, max_output_tokens=200, text_format=Trip) as events:
        assert [event.type for event in events][-1] == "response.completed"
        assert events.get_final_response().output_parsed == parsed.output_parsed

    calling: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required"}
    called = client.responses.create(**ASKED, **calling, parallel_tool_calls=False)
    [call] = called.output
    assert isinstance(call, ResponseFunctionToolCall)
    assert Trip.model_validate_json(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "booked"}
    history: list[Any] = [{"role": "user", "content": "a trip"}, call, result]
    after = client.responses.create(**ASKED | {"input": history}, max_output_tokens=8)
    assert after.usage is not None and plain.usage is not None
    assert after.usage.input_tokens > plain.usage.input_tokens
    with pytest.raises(openai.BadRequestError, match="send the earlier items again"):
        client.responses.create(**ASKED, previous_response_id=called.id)


@installed
def test_the_agents_sdk__runs_agents_at_its_defaults(
    tool_url: str, answer_token: str, tmp_path: Path
) -> None:
    command = [CLIENTS_PYTHON, SCRIPTS / "agents_responses.py", tool_url, MODEL, answer_token]
    answers = json.loads(run_client(command, folder=tmp_path))
    assert answers["streamed"]["text"] == answers["streamed"]["final"] == answers["first"]
    assert answers["second"] != answers["first"]
    assert answers["guided_items"] == [
        "tool_call_item",
        "tool_call_output_item",
        "message_output_item",
    ]
    assert answers["guided_requests"] == [2, True, True]
    assert len(answers["called"]) == 2, "once whole, once by the stream"
    assert answers["guided_stream"]["final"] == answers["guided"]
    for trip in (answers["trip"], answers["guided"]):
        assert trip["city"] in {"Vienna", "Graz"} and trip["days"] in {1, 2, 3}
    assert "send the earlier items again" in answers["refusal"]


@node_installed
def test_the_vercel_ai_sdk__asks_by_its_default_model(
    tool_url: str, roomy_model: GPT, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    answers = run_node_client("ai_sdk_responses.mjs", tool_url, MODEL, folder=tmp_path)

    def reply(*turns: str) -> str:
        prompt = "".join(turns) + "<|assistant|>"
        return greedy_text(roomy_model, tokenizer, prompt, max_tokens=12)

    system, question = "<|system|>be brief", "<|user|>the weather?"
    assert answers["text"] == answers["streamed"]["text"] == reply(system, question)
    assert answers["reason"] == "length" and answers["usage"]["outputTokens"] == 12
    assert Trip.model_validate(answers["object"])
    [given], after = answers["inputs"]
    assert Trip.model_validate(given) and after == []
    assert answers["results"] == [[{"sky": "rain"}], []]
    assert {"tool-input-delta", "tool-call", "tool-result"} <= set(answers["calling_stream"])
    said_before = f"<|assistant|>{answers['text']}"
    assert answers["second_turn"] == reply(question, said_before, "<|user|>and?")
    assert "store: false" in answers["second_turn_by_default"]

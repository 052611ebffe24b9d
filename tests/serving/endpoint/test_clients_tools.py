"""Clients that others wrote, unchanged, which have a model call tools at a real endpoint."""

import json
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from tests.serving.client_parts import (
    CLIENTS_PYTHON,
    SCRIPTS,
    installed,
    node_installed,
    run_client,
    run_node_client,
)
from tests.serving.hostile_requests import MODEL

CITIES = {"Vienna", "Graz"}
pytestmark = [pytest.mark.cluster, pytest.mark.slow]


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Vienna", "Graz"]
    days: int = Field(ge=1, le=7)


def asked(messages: list[Any], **fields: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": messages,
        "temperature": 0,
        "max_tokens": 200,
        "tools": [openai.pydantic_function_tool(Weather)],
        "parallel_tool_calls": False,
    } | fields


def test_openai__parses_a_call_streamed_or_not_and_answers_after_its_result(tool_url: str) -> None:
    client = openai.OpenAI(base_url=f"{tool_url}/v1", api_key="none needed", max_retries=0)
    messages: list[Any] = [{"role": "user", "content": "the weather?"}]
    question = asked(messages, tool_choice="required")
    choice = client.chat.completions.parse(**question).choices[0]
    [call] = choice.message.tool_calls or []
    assert choice.finish_reason == "tool_calls"
    assert call.function.name == "Weather"
    assert isinstance(call.function.parsed_arguments, Weather)

    with client.chat.completions.stream(**question) as stream:
        events = list(stream)
    pieces = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    [done] = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert len(pieces) > 1 and "".join(piece.arguments_delta for piece in pieces) == done.arguments
    assert done.parsed_arguments == call.function.parsed_arguments

    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    history = [*messages, choice.message, result]
    after = client.chat.completions.create(**asked(history, max_tokens=8))
    assert after.usage is not None and after.choices[0].message.role == "assistant"
    whole = client.chat.completions.create(**asked(messages, max_tokens=8))
    assert whole.usage is not None and after.usage.prompt_tokens > whole.usage.prompt_tokens


@node_installed
def test_openai_node__runs_tools_in_turn(tool_url: str, tmp_path: Path) -> None:
    answers = run_node_client("openai_tools.mjs", tool_url, MODEL, folder=tmp_path)
    assert len(answers["given"]) == 2 and all(given["city"] in CITIES for given in answers["given"])
    assert answers["roles"] == ["user", "assistant", "tool", "assistant", "tool"]
    assert answers["streamed"] == answers["given"][0]


@node_installed
def test_the_vercel_ai_sdk__runs_a_tool_and_goes_on(tool_url: str, tmp_path: Path) -> None:
    answers = run_node_client("ai_sdk_tools.mjs", tool_url, MODEL, folder=tmp_path)
    first, second = answers["steps"]
    [given] = first["inputs"]
    assert given["city"] in CITIES and first["reason"] == "tool-calls"
    assert first["results"] == [{"sky": "rain"}]
    assert second["reason"] in {"stop", "length"}
    assert answers["calls"] == [given, given]  # once more by the stream
    assert answers["streamed"]["reasons"] == [first["reason"], second["reason"]]
    assert {"tool-input-delta", "tool-call", "tool-result"} <= set(answers["streamed"]["parts"])


@installed
def test_langchain__calls_tools_and_runs_agents(tool_url: str, tmp_path: Path) -> None:
    command = [CLIENTS_PYTHON, SCRIPTS / "langchain_tools.py", tool_url, MODEL]
    answers = json.loads(run_client(command, folder=tmp_path))
    [given] = answers["called"]
    assert given["city"] in CITIES and answers["streamed"] == [given]
    assert answers["agent"] == [
        ["human", "the weather?"],
        ["ai", ""],
        ["tool", f"rain in {given['city']}"],
        ["ai", ""],
    ]
    assert answers["planner"]["city"] in CITIES and answers["structured"]["city"] in CITIES


def test_open_webui__offers_its_own_tools_in_every_chat(tool_url: str) -> None:
    """As its page does by default (`get_builtin_tools` in its `utils/tools.py`)."""
    now = {
        "type": "function",
        "function": {
            "name": "get_current_timestamp",
            "description": "Tells the time.",
            "parameters": {"type": "object", "properties": {}, "required": []},
        },
    }
    client = openai.OpenAI(base_url=f"{tool_url}/v1", api_key="none needed", max_retries=0)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "tea?"}],
        tools=[now],  # type: ignore[list-item]
        stream=True,
        max_tokens=8,
    )
    assert [part.choices[0].finish_reason for part in stream if part.choices][-1] == "length"

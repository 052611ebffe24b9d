"""Clients that others wrote, unchanged, which ask a real endpoint for answers that follow a schema."""

import json
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
import yaml
from pydantic import BaseModel, Field

from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from tests.serving.client_parts import (
    CLIENTS_PYTHON,
    LLAMA_INDEX_PYTHON,
    SCRIPTS,
    greedy_text,
    installed,
    llama_index_installed,
    reply,
    run_client,
)
from tests.serving.hostile_requests import MODEL

CLOSED_SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Vienna", "Graz"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
pytestmark = [pytest.mark.cluster, pytest.mark.slow]


class Stop(BaseModel):
    by: Literal["train", "bus"]
    minutes: int = Field(ge=1, le=90)


class Trip(BaseModel):
    """A trip to one city."""

    city: Literal["Vienna", "Graz"]
    days: int = Field(ge=1, le=7)
    stops: list[Stop] = Field(max_length=2)
    guide: bool | None


@pytest.fixture
def client(roomy_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{roomy_url}/v1", api_key="none needed", max_retries=0)


def asked(question: str, *, max_tokens: int) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": max_tokens,
    }


def test_openai__parses_an_answer_into_a_pydantic_model(
    client: openai.OpenAI, roomy_model: GPT, tokenizer: Tokenizer
) -> None:
    question = asked("a trip", max_tokens=200)
    unbound = reply(roomy_model, tokenizer, [("User", "a trip")], max_tokens=200)
    with pytest.raises(ValueError, match="Trip"):
        Trip.model_validate_json(unbound)

    choice = client.chat.completions.parse(**question, response_format=Trip).choices[0]
    assert isinstance(choice.message.parsed, Trip) and choice.finish_reason == "stop"
    beta = client.beta.chat.completions.parse(**question, response_format=Trip)
    assert beta.choices[0].message.parsed == choice.message.parsed
    drawn = client.chat.completions.parse(
        **question | {"temperature": 1.0}, n=4, seed=5, response_format=Trip
    )
    trips = [choice.message.parsed for choice in drawn.choices]
    assert len(trips) == 4 and all(isinstance(trip, Trip) for trip in trips)

    # The message goes back as it is, with what was parsed
    history: list[Any] = [*question["messages"], choice.message, {"role": "user", "content": "ok"}]
    after = client.chat.completions.create(**question | {"messages": history, "max_tokens": 8})
    turns = [("User", "a trip"), ("Assistant", choice.message.content or ""), ("User", "ok")]
    expected = reply(roomy_model, tokenizer, turns, max_tokens=8)
    assert after.choices[0].message.content == expected


def test_openai__parses_a_stream_into_a_pydantic_model_as_it_comes(client: openai.OpenAI) -> None:
    question = asked("a trip", max_tokens=200)
    whole = client.chat.completions.parse(**question, response_format=Trip).choices[0].message
    with client.chat.completions.stream(
        **question, response_format=Trip, stream_options={"include_usage": True}
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    deltas = [event for event in events if event.type == "content.delta"]
    assert "".join(event.delta for event in deltas) == whole.content
    assert len(deltas) > 5 and deltas[-2].parsed["city"] == whole.parsed.city
    [done] = [event for event in events if event.type == "content.done"]
    assert done.parsed == final.choices[0].message.parsed == whole.parsed
    assert final.usage is not None and final.usage.completion_tokens > 5


def test_openai__shows_that_a_parsed_answer_was_cut(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**asked("a trip", max_tokens=4), response_format=Trip)


@installed
def test_langchain__structures_answers_streams_and_agents(roomy_url: str, tmp_path: Path) -> None:
    command = [CLIENTS_PYTHON, SCRIPTS / "langchain_structured.py", roomy_url, MODEL]
    answers = json.loads(run_client(command, folder=tmp_path))
    assert answers["strict"]["city"] in {"Vienna", "Graz"}  # pydantic has checked the rest
    assert answers["invoked"] == answers["streamed"] == answers["strict"]
    assert set(answers["agent"]) == {"city", "days", "guide"}
    assert answers["tokens"] > 5
    assert answers["responding"] == answers["responding_stream"] == answers["strict"]


@llama_index_installed
def test_llama_index__completes_chats_streams_and_predicts_objects(
    roomy_url: str, roomy_model: GPT, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    command = [LLAMA_INDEX_PYTHON, SCRIPTS / "llama_index_answers.py", roomy_url, MODEL]
    answers = json.loads(run_client(command, folder=tmp_path))
    text = greedy_text(roomy_model, tokenizer, "the quick", max_tokens=12)
    assert answers["text"] == answers["streamed_text"] == text
    turns = [("System", "be brief"), ("User", "tea?")]
    expected = reply(roomy_model, tokenizer, turns, max_tokens=100)
    assert answers["chat"] == answers["streamed_chat"] == expected
    for trip in (answers["predicted"], answers["as_structured"]):  # pydantic has checked them
        assert trip["city"] in {"Vienna", "Graz"} and 1 <= trip["days"] <= 7


@installed
def test_llm__prompts_streams_and_follows_a_schema(
    roomy_url: str, roomy_model: GPT, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    models = [
        {
            "model_id": "mine",
            "model_name": MODEL,
            "api_base": f"{roomy_url}/v1",
            "supports_schema": True,
        }
    ]
    (tmp_path / "extra-openai-models.yaml").write_text(yaml.safe_dump(models))

    def prompt(text: str, *options: str) -> str:
        command = [CLIENTS_PYTHON, "-m", "llm", "prompt", "-m", "mine", text, *options]
        greedy = ("-o", "temperature", "0", "-o", "max_tokens", "200")
        return run_client([*command, *greedy], folder=tmp_path)

    expected = reply(roomy_model, tokenizer, [("User", "tea?")], max_tokens=200)
    assert prompt("tea?") == prompt("tea?", "--no-stream") == f"{expected}\n"
    trip = json.loads(prompt("a trip", "--schema", json.dumps(CLOSED_SCHEMA)))
    assert trip["city"] in {"Vienna", "Graz"} and isinstance(trip["days"], int)
    log = run_client([CLIENTS_PYTHON, "-m", "llm", "logs", "--json", "-n", "1"], folder=tmp_path)
    [entry] = json.loads(log)
    assert json.loads(entry["response"]) == trip and entry["output_tokens"] > 5

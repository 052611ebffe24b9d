"""Agents that others wrote, unchanged, which offer tools together with a schema at a real
endpoint."""

import json
from pathlib import Path
from typing import Any

import pytest

from model.text.tokenizer import Tokenizer
from tests.serving.client_parts import CLIENTS_PYTHON, SCRIPTS, installed, run_client
from tests.serving.hostile_requests import MODEL

CITIES = {"Vienna", "Graz"}
pytestmark = [pytest.mark.cluster, pytest.mark.slow, installed]


@pytest.fixture
def tokens(tokenizer: Tokenizer) -> list[str]:
    """The tokens with which a call and an answer begin, for a random model's bias."""
    [[call], [answer]] = tokenizer.encode("<"), tokenizer.encode("{")
    return [str(call), str(answer)]


def answers_of(script: str, url: str, tokens: list[str], folder: Path) -> dict[str, Any]:
    command = [CLIENTS_PYTHON, SCRIPTS / script, url, MODEL, *tokens]
    answers: dict[str, Any] = json.loads(run_client(command, folder=folder))
    return answers


def is_trip(found: dict[str, Any]) -> bool:
    return set(found) == {"city", "days"} and found["city"] in CITIES and 1 <= found["days"] <= 7


def test_the_agents_sdk__answers_by_its_output_type_or_calls(
    tool_url: str, tokens: list[str], tmp_path: Path
) -> None:
    answers = answers_of("agents_chat.py", tool_url, tokens, tmp_path)
    assert all(is_trip(answers[name]) for name in ("answer", "after", "streamed"))
    [city] = answers["called"]
    assert city in CITIES and answers["items"] == ["tool_call_item", "tool_call_output_item"]
    assert answers["num_events"] > 5 and answers["thought"]


def test_haystack__calls_or_answers_by_a_pydantic_model(
    tool_url: str, tokens: list[str], tmp_path: Path
) -> None:
    answers = answers_of("haystack_chat.py", tool_url, tokens, tmp_path)
    [given] = answers["called"]
    assert given["city"] in CITIES and answers["streamed"] == [given]
    assert answers["num_parts"] > 5
    assert answers["roles"] == ["system", "user", "assistant", "tool"]
    assert is_trip(answers["after"]) and answers["reason"] == "stop"


def test_langgraph_smolagents_and_outlines__call_and_answer(
    tool_url: str, tokens: list[str], tmp_path: Path
) -> None:
    answers = answers_of("small_agents.py", tool_url, tokens, tmp_path)
    assert answers["graph"] == ["human", "ai", "tool"]
    assert is_trip(answers["agent"])
    [called] = answers["small"]
    assert called in {"sky", "final_answer"}
    assert all(is_trip(json.loads(text)) for text in answers["outlines"])
    assert answers["choice"] in {"yes", "no"}
    assert len(answers["digits"]) == 3 and answers["digits"].isdecimal()

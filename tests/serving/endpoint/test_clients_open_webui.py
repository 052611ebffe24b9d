"""The requests that Open WebUI 0.12.4 sends to a connection of OpenAI's kind, as its public source
has them. It is too large to install, and nothing of it runs here.

`get_models_request` and `generate_chat_completion` in `routers/openai.py` send them. Before that,
`main.py` and `utils/middleware.py` take out what is its own: `metadata`, `features`, `variables`,
`session_id`. `routers/tasks.py` asks for titles, tags and follow-ups, with a page of instructions.
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from tests.serving.client_parts import reply
from tests.serving.endpoint_parts import assert_error
from tests.serving.hostile_requests import MODEL
from tests.time_limits import limit_s

CHAT = "/v1/chat/completions"
INSTRUCTIONS = "Say in two to four words what the conversation is about. " * 26
BUILTIN_TOOL = {
    "type": "function",
    "function": {
        "name": "get_current_timestamp",
        "description": "Tells the time.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}
pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def http(roomy_url: str) -> Iterator[httpx.Client]:
    headers = {"Content-Type": "application/json", "Accept": "*/*"}
    with httpx.Client(base_url=roomy_url, headers=headers, timeout=limit_s(60)) as client:
        yield client


def test_it_lists_the_models(http: httpx.Client) -> None:
    listed = http.get("/v1/models").json()
    assert listed["object"] == "list" and [model["id"] for model in listed["data"]] == [MODEL]


def test_it_streams_a_conversation_with_what_a_user_may_set(
    http: httpx.Client, roomy_model: GPT, tokenizer: Tokenizer
) -> None:
    turns = [("System", "be brief"), ("User", "tea?"), ("Assistant", "a fox"), ("User", "and?")]
    asked: dict[str, Any] = {
        "stream": True,
        "model": MODEL,
        "messages": [{"role": role.lower(), "content": text} for role, text in turns],
        "temperature": 0.0,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "seed": 42,
        "stop": ["\nUser:"],
        "max_tokens": 12,
        "stream_options": {"include_usage": True},
    }
    answer = http.post(CHAT, json=asked)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")

    *events, done = [line for line in answer.text.split("\n\n") if line]
    assert done == "data: [DONE]"
    parts = [json.loads(event.removeprefix("data: ")) for event in events]
    deltas = [choice["delta"] for part in parts for choice in part["choices"]]
    text = "".join(delta.get("content") or "" for delta in deltas)
    assert text == reply(roomy_model, tokenizer, turns, max_tokens=12)
    assert parts[-1]["choices"] == [] and parts[-1]["usage"]["completion_tokens"] == 12


def test_its_files_come_as_a_list_of_texts(
    http: httpx.Client, roomy_model: GPT, tokenizer: Tokenizer
) -> None:
    content = [{"type": "text", "text": "tea?"}]
    asked = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 9}
    answer = http.post(CHAT, json={"model": MODEL, "stream": False, **asked})
    expected = reply(roomy_model, tokenizer, [("User", "tea?")], max_tokens=9)
    assert answer.json()["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize("task", ["title", "tags", "follow_ups"])
def test_it_asks_for_titles_tags_and_follow_ups(http: httpx.Client, task: str) -> None:
    content = f'{INSTRUCTIONS}\nJSON format: {{ "{task}": … }}\n<chat_history>\nUSER: tea?\n</chat_history>'
    answer = http.post(
        CHAT,
        json={
            "model": MODEL,
            "messages": [{"role": "user", "content": content}],
            "stream": False,
            "max_tokens": 1000,
        },
    )
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"]


def test_it_reads_that_a_model_takes_no_tools(http: httpx.Client) -> None:
    """Its page offers some by default (`get_builtin_tools` in `utils/tools.py`)."""
    message = {"role": "user", "content": "tea?"}
    asked = {"model": MODEL, "messages": [message], "stream": True, "tools": [BUILTIN_TOOL]}
    error = assert_error(http.post(CHAT, json=asked), 400)
    assert error["param"] == "tools"

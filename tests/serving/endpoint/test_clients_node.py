"""Clients in JavaScript that others wrote, unchanged, each with its usual calls, against a real
endpoint: openai-node and the Vercel AI SDK."""

from pathlib import Path

import httpx
import pytest

from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from tests.serving.client_parts import node_installed, reply, run_node_client, spoken
from tests.serving.endpoint_parts import metric
from tests.serving.hostile_requests import MODEL
from tests.time_limits import limit_s
from tests.waiting import wait_until

QUESTION = ("User", "the quick fox")
MANY_TOKENS = 1900  # that the scripts ask for, and leave
pytestmark = [pytest.mark.cluster, pytest.mark.slow, node_installed]


class Aborts:
    """Counts the sequences that an endpoint has given up."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=limit_s(30))
        self._before = self._count("vllm:request_success_total", finished_reason="abort")
        self._tokens_before = self._count("vllm:generation_tokens_total")

    def _count(self, name: str, **labels: str) -> float:
        return metric(self._http, name, **labels)

    def assert_one(self) -> None:
        """Asserts that one more was given up, before all of its tokens were there."""
        wait_until(
            lambda: (
                self._count("vllm:request_success_total", finished_reason="abort")
                == self._before + 1
            ),
            timeout_s=limit_s(30),
        )
        assert self._count("vllm:num_requests_running") == 0
        assert self._count("vllm:generation_tokens_total") - self._tokens_before < MANY_TOKENS


def test_openai_node__chats_streams_parses_leaves_and_shows_refusals(
    roomy_url: str, roomy_model: GPT, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    aborts = Aborts(roomy_url)
    answers = run_node_client("openai_answers.mjs", roomy_url, MODEL, folder=tmp_path)

    assert answers["models"] == [MODEL]
    expected = reply(roomy_model, tokenizer, [QUESTION], max_tokens=12)
    assert answers["chat"] == answers["streamed"]["text"] == expected
    usage = answers["streamed"]["usage"]
    assert usage["prompt_tokens"] == len(tokenizer.encode(spoken([QUESTION])))
    assert usage["completion_tokens"] == 12

    # zod has checked it, and would have thrown
    trip = answers["parsed"]
    assert set(trip) == {"city", "days", "stops", "guide"}
    assert answers["parsed_from_stream"] == trip

    assert len(answers["before_abort"]) == 3
    aborts.assert_one()

    responded = answers["responded"]
    assert (responded["text"], responded["reason"]) == (expected, "max_output_tokens")
    assert responded["parsed"] == responded["from_stream"] and set(responded["parsed"]) == set(trip)
    assert responded["last"] == "response.completed"
    stored = answers["no_such_response"]
    assert (stored["name"], stored["status"]) == ("NotFoundError", 404)
    assert "stores no responses" in stored["message"]
    assert answers["no_such_field"] == {
        "name": "BadRequestError",
        "status": 400,
        "message": "400 Unknown field: temprature; did you mean temperature?",
    }


def test_the_vercel_ai_sdk__generates_text_and_objects_streams_and_leaves(
    roomy_url: str, roomy_model: GPT, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    aborts = Aborts(roomy_url)
    answers = run_node_client("ai_sdk_answers.mjs", roomy_url, MODEL, folder=tmp_path)

    turns = [("System", "be brief"), QUESTION]
    assert answers["chat"] == reply(roomy_model, tokenizer, turns, max_tokens=12)
    assert answers["usage"]["inputTokens"] == len(tokenizer.encode(spoken(turns)))
    streamed = answers["streamed"]
    assert streamed["text"] == reply(roomy_model, tokenizer, [QUESTION], max_tokens=12)
    assert (streamed["usage"]["outputTokens"], streamed["reason"]) == (12, "length")

    # Its schema has checked them
    assert set(answers["output"]) == {"city", "days"}
    assert answers["object"] == answers["output"]
    assert isinstance(answers["json"], dict)

    assert answers["before_abort"][-2:] == ["text-delta", "abort"]
    aborts.assert_one()

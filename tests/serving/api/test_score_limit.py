"""The number of log-probabilities in an answer over HTTP: a chat without a limit of its own gets
what has room, and a stream's new tokens take none."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.api import score_limit
from serving.delivery.versions import Versions
from tests.serving.endpoint_parts import Run, shared_replica

MOST = 1000
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "the quick fox"}],
    "ignore_eos": True,
    "logit_bias": {"10": -100},  # no line ends, so no speaker's line does
    "logprobs": True,
    "top_logprobs": 20,
}


@pytest.fixture(scope="module")
def run(checkpoint: Path) -> Iterator[Run]:
    with shared_replica(checkpoint) as run:
        yield run


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the context of 128 tokens were a long one."""
    monkeypatch.setattr(score_limit, "MAX_SCORES", MOST)


@pytest.mark.parametrize("num_choices", [1, 2])
def test_a_chat_without_a_limit_gets_as_many_tokens_as_its_scores_have_room(
    run: Run, num_choices: int
) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        answer = await http.post("/v1/chat/completions", json=CHAT | {"n": num_choices})
        assert answer.status_code == 200, answer.text
        choices = answer.json()["choices"]
        assert {choice["finish_reason"] for choice in choices} == {"length"}
        counts = [len(choice["logprobs"]["content"]) for choice in choices]
        assert counts == [MOST // 21 // num_choices] * num_choices

    run(check)


def test_a_limit_that_the_client_names_is_kept_or_refused(run: Run) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        refused = await http.post("/v1/chat/completions", json=CHAT | {"max_completion_tokens": 60})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logprobs")
        fewer = await http.post(
            "/v1/chat/completions", json=CHAT | {"max_completion_tokens": 60, "top_logprobs": 3}
        )
        assert fewer.json()["usage"]["completion_tokens"] == 60
        plain = await http.post(
            "/v1/chat/completions", json=CHAT | {"logprobs": False, "top_logprobs": 0}
        )
        assert plain.json()["usage"]["total_tokens"] == 128, (
            "an answer without scores fills the context"
        )

    run(check)


def test_a_streams_new_tokens_do_not_count_as_none_is_held(run: Run) -> None:
    asked = {
        "model": "tiny",
        "prompt": [5] * 40,
        "max_tokens": 80,
        "ignore_eos": True,
        "logprobs": 20,
        "stream": True,
    }

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        answer = await http.post("/v1/completions", json=asked)
        assert answer.status_code == 200, answer.text
        *events, done = answer.text.strip().split("\n\n")
        parts = [
            json.loads(event.removeprefix("data: "))["choices"][0]["logprobs"]["tokens"]
            for event in events
        ]
        assert done == "data: [DONE]" and sum(map(len, parts)) == 80
        echoed = await http.post("/v1/completions", json=asked | {"echo": True, "n": 2})
        assert echoed.status_code == 400, "each choice's copy of the prompt is held"
        chat = await http.post("/v1/chat/completions", json=CHAT | {"stream": True, "n": 2})
        assert chat.text.count('"logprob"') > 2 * MOST

    run(check)

"""The choices of a request whose prompt is scored: the engine reads the prompt once, and each
choice shows its scores."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.generation.sampling_params import SamplingParams
from serving.delivery.versions import Versions
from serving.engine.messages import Candidates, SequenceRequest, TokenEvent
from serving.output.shared_prompts import SharedPrompts
from tests.serving.endpoint_parts import Run, metric_sum, shared_replica

PROMPT = [(7 * place) % 250 for place in range(100)]
NUM_CHOICES = 8
BLOCK_TOKENS = 16
ASKED: dict[str, Any] = {
    "model": "tiny",
    "prompt": PROMPT,
    "max_tokens": 3,
    "ignore_eos": True,
    "seed": 1,
    "n": 8,
}
SCORES = [None, Candidates(-1.0, [], 1)]


@pytest.fixture(scope="module")
def run(checkpoint: Path) -> Iterator[Run]:
    with shared_replica(checkpoint) as run:
        yield run


async def computed(http: httpx.AsyncClient) -> float:
    """Tokens that the engine has computed so far, of prompts and of answers."""
    return metric_sum((await http.get("/metrics")).text, "vllm:iteration_tokens_total_sum")


@pytest.mark.parametrize(
    "fields", [{"echo": True, "logprobs": 2}, {"prompt_logprobs": 2}, {}], ids=str
)
def test_choices_read_their_prompt_once(run: Run, fields: dict[str, Any]) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        # Which the cache does not have yet
        prompt = [token_id + len(fields) for token_id in PROMPT]
        before = await computed(http)
        answer = await http.post("/v1/completions", json=ASKED | {"prompt": prompt} | fields)
        assert answer.status_code == 200, answer.text
        # The first one comes with the prompt's last token
        num_drawn = NUM_CHOICES * (ASKED["max_tokens"] - 1)
        num_read = await computed(http) - before - num_drawn
        rest = len(prompt) % BLOCK_TOKENS  # no full block, so each choice reads it
        assert num_read == len(prompt) + (NUM_CHOICES - 1) * rest

    run(check)


def test_each_choice_is_as_if_it_had_read_its_prompt_alone(run: Run) -> None:
    asked = ASKED | {
        "echo": True,
        "logprobs": 2,
        "prompt_logprobs": 1,
        "prompt": [PROMPT, [3, 4, 5]],
        "n": 3,
    }

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        choices = (await http.post("/v1/completions", json=asked)).json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(6))
        for first, prompt in zip(choices[::3], asked["prompt"], strict=True):
            alone = await http.post("/v1/completions", json=asked | {"prompt": prompt, "n": 1})
            assert alone.json()["choices"] == [first | {"index": 0}]
        for place, choice in enumerate(choices):
            first, prompt = choices[place - place % 3], asked["prompt"][place // 3]
            assert choice["prompt_logprobs"] == first["prompt_logprobs"]
            for name, values in choice["logprobs"].items():
                assert values[: len(prompt)] == first["logprobs"][name][: len(prompt)]
        parts = await http.post(
            "/v1/completions", json=asked | {"stream": True, "prompt_logprobs": None}
        )
        assert len(re.findall('"tokens":\\[', parts.text)) == 6 * ASKED["max_tokens"]

    run(check)


def test_a_choice_that_is_faster_than_its_prompts_scores_waits_for_them() -> None:
    """As one does whose prompt was in the cache already."""
    greedy = SamplingParams(temperature=0.0)
    sequences = [SequenceRequest(seq_id, [1, 2], 2, greedy) for seq_id in (10, 11)]
    scored = [SequenceRequest(10, [1, 2], 2, greedy, num_prompt_logprobs=0), sequences[1]]
    early, first, late = (TokenEvent(seq_id, 5, None, None, None) for seq_id in (11, 10, 11))
    first = first._replace(prompt_logprobs=SCORES)
    shared = SharedPrompts(scored, num_choices=2)
    assert shared.take(early) == []
    assert shared.take(first) == [first, early._replace(prompt_logprobs=SCORES)]
    assert shared.take(late) == [late._replace(prompt_logprobs=SCORES)]
    assert SharedPrompts(sequences, num_choices=2).take(early) == [early]

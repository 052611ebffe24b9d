"""The choices of a prompt share its log-probabilities, whichever of them is first."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.settings.serve import EngineConfig, ServeConfig
from serving.api.choice_output import SharedEchoes
from serving.engine.messages import Candidates, FinishReason, TokenEvent
from tests.serving.endpoint_parts import loopback_server, replica_app

ECHO = [None, Candidates(-1.0, [])]


def event(seq_id: int, token_id: int, *, echo: list[Candidates | None] | None = None, last: bool = False) -> TokenEvent:
    return TokenEvent(seq_id, token_id, FinishReason.LENGTH if last else None, None, echo)


def test_a_choice_that_is_faster_than_the_first_waits_for_the_prompts_logprobs() -> None:
    shared = SharedEchoes([10, 11, 20, 21], num_choices=2)
    assert shared.complete(event(11, 1)) == []
    assert shared.complete(event(20, 7, echo=ECHO)) == [event(20, 7, echo=ECHO)], "another prompt waits for nothing"
    assert shared.complete(event(11, 2, last=True)) == []
    assert shared.complete(event(10, 3, echo=ECHO)) == [
        event(11, 1, echo=ECHO),
        event(11, 2, last=True),
        event(10, 3, echo=ECHO),
    ]
    assert shared.complete(event(10, 4, last=True)) == [event(10, 4, last=True)]
    assert shared.complete(event(21, 8)) == [event(21, 8, echo=ECHO)]


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_each_choice_has_the_log_probabilities_of_the_prompt(
    checkpoint: Path, prompts: list[list[int]], prefix_cache: bool
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": prompts[6:], "echo": True, "logprobs": 2, "seed": 1}
    asked |= {"max_tokens": 6, "ignore_eos": True}

    async def scenario() -> None:
        config = ServeConfig(engine=EngineConfig(max_num_seqs=8, prefix_cache=prefix_cache))
        async with (
            replica_app(checkpoint, name="tiny", config=config) as (app, _),
            loopback_server(app) as url,
            httpx.AsyncClient(base_url=url, timeout=None) as http,
        ):

            async def choices(**fields: Any) -> list[dict[str, Any]]:
                answer = await http.post("/v1/completions", json=asked | fields)
                assert answer.status_code == 200, answer.text
                return list(answer.json()["choices"])

            alone = await choices()
            for _ in range(2):  # the second time the cache has the prompts
                together = await choices(n=3)
                assert [together[0], together[3]["logprobs"]] == [alone[0], alone[1]["logprobs"]]
                for index, choice in enumerate(together):
                    num_prompt, expected = len(prompts[6 + index // 3]), alone[index // 3]["logprobs"]
                    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                        assert choice["logprobs"][name][:num_prompt] == expected[name][:num_prompt]
                        assert len(choice["logprobs"][name]) == num_prompt + 6
            one_letter = next(token for token in together[1]["logprobs"]["tokens"][-4:] if token.isascii())
            stopped = await choices(n=3, stop=[one_letter])
            assert len(stopped) == 6 and all(choice["finish_reason"] in ("stop", "length") for choice in stopped)

    asyncio.run(scenario())

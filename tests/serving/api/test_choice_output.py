"""Each choice of a prompt has the prompt's log-probabilities."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.settings.serve import EngineConfig, ServeConfig
from tests.serving.endpoint_parts import loopback_server, replica_app


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

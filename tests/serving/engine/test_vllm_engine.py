"""vLLM behind the API in the engine's place, in the environment that `make bench-serve` installs for it."""

import asyncio
from pathlib import Path

import httpx
import openai
import pytest
import torch

from cluster.settings.serve import EngineConfig, ServeConfig
from model.errors import UserError
from model.generate import generate
from model.gpt import GPT
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from serving.engine.messages import FinishReason, SequenceRequest, TokenEvent
from serving.engine_process.client import EngineClient
from tests.repository import REPOSITORY
from tests.serving.endpoint_parts import loopback_server, replica_app
from tests.serving.tiny_models import lively_model, write_model
from tests.time_limits import limit_s

VLLM_PYTHON = REPOSITORY / ".venv-vllm" / "bin" / "python"
GREEDY = SamplingParams(temperature=0.0)
installed = pytest.mark.skipif(not VLLM_PYTHON.exists(), reason="no vLLM in .venv-vllm; `make bench-serve` installs it")


def config(**settings: object) -> EngineConfig:
    return EngineConfig.model_validate(
        {"backend": "vllm", "vllm_python": str(VLLM_PYTHON), "max_num_seqs": 4, "kv_cache_tokens": 1024} | settings
    )


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    """With heads of 64, as narrower ones are not vLLM's."""
    return lively_model(tokenizer, n_embd=128, spread=0.2, seed=5)


@pytest.fixture(scope="module")
def folder(model: GPT, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("vllm") / "step-1", model, tokenizer)


def test_without_vllm_its_environment_is_asked_for(folder: Path) -> None:
    for python, message in [(None, "engine.backend=vllm"), ("/nowhere/python", "cannot run /nowhere/python")]:
        with pytest.raises(UserError, match=message):
            asyncio.run(EngineClient.start(folder, config=config(vllm_python=python), eos_id=None, threads=1))


@installed
@pytest.mark.slow
def test_its_tokens_and_log_probabilities_are_the_models(folder: Path, model: GPT) -> None:
    prompts = [[(7 * i + 11 * k) % model.config.vocab_size for k in range(1 + 9 * i)] for i in range(6)]

    async def answers() -> list[list[TokenEvent]]:
        client = await EngineClient.start(folder, config=config(), eos_id=None, threads=1)
        try:
            left = client.submit([SequenceRequest(client.next_seq_id(), [1, 2, 3], 100, GREEDY)])
            generations = [
                client.submit(
                    [SequenceRequest(client.next_seq_id(), p, 20, GREEDY, num_logprobs=3, prompt_logprobs=True)]
                )
                for p in prompts
            ]
            left.close()
            whole = [[event async for event in generation] for generation in generations]
            empty = SequenceRequest(client.next_seq_id(), prompts[3], 0, GREEDY, num_logprobs=0, prompt_logprobs=True)
            whole.append([event async for event in client.submit([empty])])
        finally:
            await client.close()
        return whole

    *generated, scored = asyncio.run(answers())
    for prompt, events in zip(prompts, generated, strict=True):
        ids = [event.token_id for event in events if event.token_id is not None]
        assert ids == generate(model, prompt, max_tokens=20, params=GREEDY)
        assert [event.finish_reason for event in events] == [None] * 19 + [FinishReason.LENGTH]
        expected = logprobs(model, prompt + ids)
        for place, event in enumerate(events, start=len(prompt) - 1):
            assert event.logprobs is not None
            assert event.logprobs.logprob == pytest.approx(
                expected[place, ids[place - len(prompt) + 1]].item(), abs=1e-4
            )
            assert [i for i, _ in event.logprobs.top] == expected[place].topk(3).indices.tolist()
        assert_scores(events[0], expected, prompt)
    assert [(event.token_id, event.finish_reason) for event in scored] == [(None, FinishReason.LENGTH)]
    assert_scores(scored[0], logprobs(model, prompts[3]), prompts[3])


def assert_scores(event: TokenEvent, expected: torch.Tensor, prompt: list[int]) -> None:
    assert event.prompt_logprobs is not None and event.prompt_logprobs[0] is None
    found = [candidates.logprob for candidates in event.prompt_logprobs[1:] if candidates is not None]
    wanted = [expected[place, token_id].item() for place, token_id in enumerate(prompt[1:])]
    assert found == pytest.approx(wanted, abs=1e-4)


@torch.inference_mode()
def logprobs(model: GPT, token_ids: list[int]) -> torch.Tensor:
    """(T, V)"""
    return model.logits(model(torch.tensor([token_ids]))[0]).log_softmax(dim=-1)


@installed
@pytest.mark.slow
def test_the_api_before_it_is_the_same(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    async def check() -> None:
        settings = ServeConfig(engine=config())
        async with replica_app(folder, name="tiny", config=settings) as (app, versions), loopback_server(app) as url:
            client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            prompt = tokenizer.encode("the quick")
            text = tokenizer.decode(generate(model, prompt, max_tokens=12, params=GREEDY, eos_id=tokenizer.eot_id))
            whole = await client.completions.create(model="tiny", prompt="the quick", max_tokens=12, temperature=0)
            assert whole.choices[0].text == text
            stream = await client.completions.create(
                model="tiny", prompt="the quick", max_tokens=12, temperature=0, stream=True
            )
            assert "".join([part.choices[0].text async for part in stream]) == text
            sampled = [
                await client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=1, seed=4)
                for _ in range(2)
            ]
            assert sampled[0].choices[0].text == sampled[1].choices[0].text
            async with httpx.AsyncClient(base_url=url, timeout=limit_s(30)) as http:
                refused = await http.post("/v1/completions", json={"model": "tiny", "prompt": prompt * 99})
            assert refused.status_code == 400
            assert versions.num_running == 0

    asyncio.run(check())

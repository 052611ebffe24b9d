"""vLLM behind the API in the engine's place, in the environment that `make bench-serve` installs
for it."""

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.settings.serve import ServeConfig
from model.architecture import ArchitectureName
from model.generation.generate import generate
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from raymill.errors import UserError
from serving.api.admin_routes import PromoteRequest, rows_of_gate
from serving.engine.messages import FinishReason, SequenceRequest, StepReport, TokenEvent
from serving.engine_process.client import EngineClient, EngineDiedError
from serving.engine_process.health import HealthCheck
from tests.serving.endpoint_parts import loopback_server, replica_app, replica_client
from tests.serving.tiny_models import FRAGILE_POSITION, as_transformers_folder, write_model
from tests.serving.vllm_parts import installed, vllm_config, vllm_model
from tests.time_limits import limit_s

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    return vllm_model(tokenizer, seed=5)


@pytest.fixture(scope="module")
def folder(model: GPT, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("vllm") / "step-1", model, tokenizer)


def test_without_vllm_its_environment_is_asked_for(folder: Path) -> None:
    for python, message in [
        (None, "name the Python of its environment"),
        ("/nowhere/python", "cannot run /nowhere/p"),
    ]:
        with pytest.raises(UserError, match=message):
            asyncio.run(
                EngineClient.start(
                    folder, config=vllm_config(vllm_python=python), eos_id=None, threads=1
                )
            )


@installed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda"}, "device=cuda, but vLLM 0.32.0 computes on cpu here"),
        ({"dtype": "int8"}, "dtype=int8 is not vLLM's"),
        ({"vllm_args": {"gpu_memory_utilisation": 0.5}}, "did you mean gpu_memory_utilization?"),
        (
            {"vllm_args": {"gpu_memory_utilization": 1.5}},
            "vLLM refuses its settings: .*gpu_memory_utilization",
        ),
        ({"tensor_parallel_size": 3}, "vLLM refuses its settings: .*heads"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_vllm_does_not_have_is_refused_with_a_word(
    folder: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        asyncio.run(
            EngineClient.start(folder, config=vllm_config(**settings), eos_id=None, threads=1)
        )


@installed
@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_its_tokens_and_log_probabilities_are_the_models(
    architecture: ArchitectureName, tensor_parallel_size: int, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = vllm_model(tokenizer, seed=5, architecture=architecture)
    folder = write_model(tmp_path / "step-1", model, tokenizer)
    prompts = [
        [(7 * i + 11 * k) % model.config.vocab_size for k in range(1 + 9 * i)] for i in range(6)
    ]

    async def answers() -> list[list[TokenEvent]]:
        settings = vllm_config(tensor_parallel_size=tensor_parallel_size)
        client = await EngineClient.start(folder, config=settings, eos_id=None, threads=1)
        family = [psutil.Process(client.pid), *psutil.Process(client.pid).children(recursive=True)]
        try:
            left = client.submit([SequenceRequest(client.next_seq_id(), [1, 2, 3], 100, GREEDY)])
            generations = [
                client.submit(
                    [
                        SequenceRequest(
                            client.next_seq_id(),
                            p,
                            20,
                            GREEDY,
                            num_logprobs=3,
                            num_prompt_logprobs=3,
                        )
                    ]
                )
                for p in prompts
            ]
            left.close()
            whole = [[event async for event in generation] for generation in generations]
            empty = SequenceRequest(
                client.next_seq_id(), prompts[3], 0, GREEDY, num_logprobs=0, num_prompt_logprobs=0
            )
            whole.append([event async for event in client.submit([empty])])
        finally:
            await client.close()
        assert psutil.wait_procs(family, timeout=limit_s(10))[1] == []
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
    assert [(event.token_id, event.finish_reason) for event in scored] == [
        (None, FinishReason.LENGTH)
    ]
    assert_scores(scored[0], logprobs(model, prompts[3]), prompts[3])


def assert_scores(event: TokenEvent, expected: torch.Tensor, prompt: list[int]) -> None:
    assert event.prompt_logprobs is not None and event.prompt_logprobs[0] is None
    found = [
        candidates.logprob for candidates in event.prompt_logprobs[1:] if candidates is not None
    ]
    wanted = [expected[place, token_id].item() for place, token_id in enumerate(prompt[1:])]
    assert found == pytest.approx(wanted, abs=1e-4)


@torch.inference_mode()
def logprobs(model: GPT, token_ids: list[int]) -> torch.Tensor:
    """(T, V)"""
    return model.logits(model(torch.tensor([token_ids]))[0]).log_softmax(dim=-1)


class Seen:
    """Keeps what an engine reports of its steps."""

    def __init__(self) -> None:
        self.waits_s: list[float] = []
        self.reports: list[StepReport] = []

    def admitted(self, waited_s: float) -> None:
        self.waits_s.append(waited_s)

    def stepped(self, report: StepReport) -> None:
        self.reports.append(report)


@installed
@pytest.mark.slow
def test_it_reports_its_steps_its_queue_and_its_cache_as_our_engine_does(folder: Path) -> None:
    seen = Seen()

    async def scenario() -> None:
        settings = vllm_config(
            max_num_seqs=1, prefill_tokens_per_step=128, vllm_args={"block_size": 32}
        )
        client = await EngineClient.start(folder, config=settings, eos_id=None, threads=1)
        try:
            prompt = list(range(1, 101))
            requests = [
                SequenceRequest(client.next_seq_id(), prompt, 4, GREEDY, ignore_eos=True)
                for _ in range(2)
            ]
            async for _event in client.submit(requests, observer=seen):
                pass
        finally:
            await client.close()

    asyncio.run(scenario())
    # The second prompt of 100 tokens is in the cache up to its last whole block of 32.
    steps = [
        (report.num_tokens, report.num_looked_up, report.num_found)
        for report in seen.reports
        for _ in report.steps_s
        if report.num_tokens
    ]
    assert steps == [
        (100, 100, 0),
        (1, 0, 0),
        (1, 0, 0),
        (1, 0, 0),
        (4, 100, 96),
        (1, 0, 0),
        (1, 0, 0),
        (1, 0, 0),
    ]
    first, second = seen.waits_s
    took_s = [step_s for report in seen.reports for step_s in report.steps_s]
    assert first < second and second > sum(took_s[1:4]) > 0


@installed
@pytest.mark.slow
def test_the_api_before_it_is_the_same(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    async def check() -> None:
        settings = ServeConfig(
            model_name="tiny", engine=vllm_config(vllm_args={"gpu_memory_utilization": 0.31})
        )
        async with (
            replica_app(folder, name="tiny", config=settings) as (app, versions),
            loopback_server(app) as url,
        ):
            client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            prompt = tokenizer.encode("the quick")
            text = tokenizer.decode(
                generate(model, prompt, max_tokens=12, params=GREEDY, eos_id=tokenizer.eot_id)
            )
            whole = await client.completions.create(
                model="tiny", prompt="the quick", max_tokens=12, temperature=0
            )
            assert whole.choices[0].text == text
            stream = await client.completions.create(
                model="tiny", prompt="the quick", max_tokens=12, temperature=0, stream=True
            )
            assert "".join([part.choices[0].text async for part in stream]) == text
            sampled = [
                await client.completions.create(
                    model="tiny", prompt=prompt, max_tokens=12, temperature=1, seed=4
                )
                for _ in range(2)
            ]
            assert sampled[0].choices[0].text == sampled[1].choices[0].text
            async with httpx.AsyncClient(base_url=url, timeout=limit_s(30)) as http:
                refused = await http.post(
                    "/v1/completions", json={"model": "tiny", "prompt": prompt * 99}
                )
                await http.get("/metrics")  # which asks vLLM for its own
                await asyncio.sleep(limit_s(0.2))
                shown = (await http.get("/metrics")).text
            assert refused.status_code == 400
            assert versions.num_running == 0
            names = re.findall(r"^# TYPE (\S+)", shown, re.MULTILINE)
            assert len(names) == len(set(names))
            ended = re.findall(r"vllm:request_success_total\{.*\} (.*)", shown)
            # Counted by the replica, and not by vLLM a second time
            assert sum(map(float, ended)) == 4
            [queries] = re.findall(
                r'vllm:prefix_cache_queries_total\{.*model_name="tiny".*\} (.*)', shown
            )
            assert float(queries) >= 4 * len(prompt)
            assert 'gpu_memory_utilization="0.31"' in shown  # vLLM was given this argument

    asyncio.run(check())


def damaged(folder: Path, copy: Path, name: str, first: int) -> Path:
    """Copies a checkpoint, with no numbers in the rows of a tensor from `first` on."""
    as_transformers_folder(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    [tensor] = [tensor for key, tensor in tensors.items() if key.endswith(name)]
    tensor[first:] = float("nan")
    save_file(tensors, copy / "model.safetensors")
    return copy


@installed
@pytest.mark.slow
def test_logits_that_are_no_numbers_end_their_own_sequence(
    folder: Path, model: GPT, tmp_path: Path
) -> None:
    fragile = damaged(folder, tmp_path / "fragile", "wpe.weight", FRAGILE_POSITION)
    good = [
        [(7 * i + 11 * k) % model.config.vocab_size for k in range(3 + 20 * i)] for i in range(4)
    ]
    bad = [k % model.config.vocab_size for k in range(FRAGILE_POSITION - 3)]
    expected = [generate(model, prompt, max_tokens=20, params=GREEDY) for prompt in good]

    async def check() -> None:
        client = await EngineClient.start(fragile, config=vllm_config(), eos_id=None, threads=1)

        async def answer(prompt: list[int], max_tokens: int = 20) -> list[TokenEvent]:
            request = SequenceRequest(
                client.next_seq_id(), prompt, max_tokens, GREEDY, num_logprobs=1
            )
            return [event async for event in client.submit([request])]

        try:
            for turn in range(3):
                *answers, failed = await asyncio.gather(*map(answer, good), answer(bad))
                assert [[event.token_id for event in events] for events in answers] == expected
                # Blocks of the cache come back after those that failed, whose NaN vLLM's kernels
                # may read at once.
                num_tokens = 4 if turn == 0 else len(failed) - 1
                assert [event.finish_reason for event in failed] == [None] * num_tokens + [
                    FinishReason.ERROR
                ]
            assert client.num_failed_sequences == 3
            [scored] = await answer(bad + [1] * 8, max_tokens=0)
            assert (scored.token_id, scored.finish_reason) == (None, FinishReason.ERROR)
            await HealthCheck(client, prompt_ids=[0]).self_test()
            with pytest.raises(EngineDiedError, match="self-test"):
                await HealthCheck(client, prompt_ids=bad + [1] * 8).self_test()
            client.metrics()
            await answer(good[0])
            counted = {family.name: family.samples[0][2] for family in client.metrics()}
            assert counted["vllm:corrupted_requests"] > 0
        finally:
            await client.close()

    asyncio.run(check())


@installed
@pytest.mark.slow
def test_weights_that_are_no_numbers_are_never_served(folder: Path, tmp_path: Path) -> None:
    broken = damaged(folder, tmp_path / "broken", "ln_f.weight", 0)

    async def check() -> None:
        client = await EngineClient.start(broken, config=vllm_config(), eos_id=None, threads=1)
        try:
            await HealthCheck(client, prompt_ids=[0]).self_test()
        finally:
            await client.close()

    with pytest.raises(EngineDiedError, match="self-test"):
        asyncio.run(check())


@installed
@pytest.mark.slow
def test_fields_of_vllm_mean_the_same_on_both_engines(
    folder: Path, model: GPT, tokenizer: Tokenizer
) -> None:
    prompt_ids = tokenizer.encode("the quick fox")
    free = generate(model, prompt_ids, max_tokens=12, params=GREEDY)
    asked = {
        "model": "tiny",
        "prompt": [prompt_ids, [1, 2, 3]],
        "temperature": 0,
        "max_tokens": 12,
        "ignore_eos": True,
    }
    cases: list[dict[str, Any]] = [
        {"return_token_ids": True, "stop_token_ids": [free[3], free[3]]},
        {"return_token_ids": True, "stop_token_ids": free[3:6], "min_tokens": 8},
        {"return_token_ids": True, "ignore_eos": False, "min_tokens": 12, "logprobs": 20},
        {"prompt_logprobs": 5, "max_tokens": 1, "echo": True, "logprobs": 2},
        {"prompt_logprobs": 0, "max_tokens": 0},
    ]

    async def check() -> None:
        async with (
            replica_client(folder, config=ServeConfig(engine=vllm_config())) as (theirs, _),
            replica_client(folder) as (ours, _),
        ):
            for fields in cases:
                answers = [
                    await http.post("/v1/completions", json=asked | fields)
                    for http in (theirs, ours)
                ]
                assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
                for found, expected in zip(
                    *(answer.json()["choices"] for answer in answers), strict=True
                ):
                    assert_alike(found, expected)
            refused = await theirs.post("/v1/embeddings", json={"model": "tiny", "input": "x"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (
                400,
                "unsupported_by_backend",
            )

    asyncio.run(check())


def assert_alike(found: Any, expected: Any) -> None:
    """Numbers may differ by rounding, and nothing else."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-4)
    elif isinstance(expected, dict):
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert_alike(found[name], value)
    elif isinstance(expected, list):
        for each, other in zip(found, expected, strict=True):
            assert_alike(each, other)
    else:
        assert found == expected


@installed
@pytest.mark.slow
def test_a_prompt_that_fills_the_context_ends_no_engine(
    folder: Path, model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM draws a token even where none is asked for."""
    full = [7 * k % model.config.vocab_size for k in range(model.config.n_positions)]
    asked = {"model": "tiny", "max_tokens": 0, "prompt_logprobs": 0}

    async def check() -> None:
        async with replica_client(folder, config=ServeConfig(engine=vllm_config())) as (
            http,
            versions,
        ):
            refused = await http.post("/v1/completions", json=asked | {"prompt": full})
            assert refused.json()["error"]["code"] == "context_length_exceeded"
            assert (
                await http.post("/v1/completions", json=asked | {"prompt": full[:-1]})
            ).status_code == 200

            live = versions.live
            [row] = await rows_of_gate(PromoteRequest(checkpoint="latest", gate_rows=[full]), live)
            expected = logprobs(model, full)[range(len(row) - 1), list(row[1:])]
            assert await live.loss([row], at_once=True) == pytest.approx(
                -expected.mean().item(), abs=1e-4
            )

            # vLLM sees it
            monkeypatch.setattr(live.engine, "facts", live.engine.facts._replace(least_tokens=0))
            failed = await http.post("/v1/completions", json=asked | {"prompt": full})
            assert failed.status_code == 500, failed.text
            assert (
                await http.post("/v1/completions", json=asked | {"prompt": full[:-1]})
            ).status_code == 200
            assert live.engine.alive and not live.engine.num_open_sequences

    asyncio.run(check())

"""The endpoint on a real Ray Serve, asked by the real `openai` client."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from ray import serve
from transformers import GPT2Config, GPT2LMHeadModel

from cluster.settings.serve import EngineConfig, ReplicaConfig, ServeConfig
from model.files.checkpoint_folder import read_metadata
from model.generation.generate import generate
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from raymill.errors import UserError
from serving.app import run
from tests.serving.endpoint_parts import Endpoints, children_with, metric
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.front]

KEY = "sk-test"
MODEL = "tiny"
NUM_SLOTS, MAX_WAITING = 8, 24
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"sk-other\n{KEY}\n")
    return path


def config(checkpoint: Path, **settings: Any) -> ServeConfig:
    return ServeConfig(
        checkpoint=str(checkpoint),
        replicas=ReplicaConfig(max_ongoing_requests=50),
        engine=EngineConfig(max_num_seqs=NUM_SLOTS, max_waiting=MAX_WAITING),
        **settings,
    )


def test_a_port_in_use_is_an_error_that_says_so(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever another file has left
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(proxies={}))
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as other:
        taken = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {taken} on 127\.0\.0\.1 is in use.*--port"):
            run(config(checkpoint, port=taken))


def test_an_address_that_others_reach_needs_a_key(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="api_key_file"):
        run(config(checkpoint, host="0.0.0.0"))


@pytest.fixture(scope="module")
def url(endpoints: Endpoints, checkpoint: Path, key_file: Path) -> str:
    result = endpoints.deployed(config(checkpoint, model_name=MODEL, api_key_file=str(key_file)))
    assert result["model"] == MODEL
    return str(result["url"])


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=limit_s(30)
    ) as http:
        yield http


def test_greedy_text_is_that_of_generate(
    client: openai.OpenAI, model: GPT, tokenizer: Tokenizer
) -> None:
    prompt = "the quick naïve fox"
    prompt_ids = tokenizer.encode(prompt)
    expected = generate(model, prompt_ids, max_tokens=30, params=GREEDY, eos_id=tokenizer.eot_id)
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=30, temperature=0)
    assert answer.choices[0].text == tokenizer.decode(expected)
    assert answer.choices[0].finish_reason == ("length" if len(expected) == 30 else "stop")
    assert answer.usage is not None and answer.usage.prompt_tokens == len(prompt_ids)
    assert answer.usage.completion_tokens == len(expected) + (
        answer.choices[0].finish_reason == "stop"
    )
    assert (
        answer.id.startswith("cmpl-")
        and answer.object == "text_completion"
        and answer.model == MODEL
    )


def test_a_stream_is_the_answer_in_parts(client: openai.OpenAI, http: httpx.Client) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "prompt": "tea",
        "max_tokens": 40,
        "seed": 3,
        "n": 2,
        "logprobs": 2,
        "echo": True,
    }
    whole = client.completions.create(**asked)
    parts = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert parts[-1].choices == [] and parts[-1].usage == whole.usage
    assert len(parts) > 20 and all(part.usage is None for part in parts[:-1])
    for choice in whole.choices:
        mine = [c for part in parts for c in part.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        assert choice.logprobs is not None
        for field in ("tokens", "text_offset"):
            assert [x for c in mine for x in getattr(c.logprobs, field)] == getattr(
                choice.logprobs, field
            )
        logprobs = [x for c in mine for x in c.logprobs.token_logprobs]
        assert logprobs[0] is None and choice.logprobs.token_logprobs is not None
        assert logprobs[1:] == pytest.approx(choice.logprobs.token_logprobs[1:], abs=1e-5)
    raw = http.post("/v1/completions", json={"model": MODEL, "prompt": "tea", "stream": True})
    assert raw.headers["content-type"].startswith("text/event-stream")
    events = raw.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(
        json.loads(event.removeprefix("data: "))["object"] == "text_completion"
        for event in events[:-2]
    )


def test_streams_go_around_ray_serve(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"model": MODEL, "prompt": "tea", "stream": True})
    assert answer.status_code == 200 and not [name for name in answer.headers if "relay" in name]
    [proxy] = children_with("ray::ProxyActor")
    sockets = [
        connection
        for connection in proxy.net_connections("unix")
        if "raymill-relay" in str(connection.laddr)
    ]
    assert len(sockets) == 2  # that which listens, and the replica's


def test_concurrent_requests_of_different_lengths_equal_generate(
    url: str, model: GPT, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    sampled = SamplingParams(temperature=0.9, top_p=0.8, seed=11)

    async def ask_all() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
            answers = []
            for i, prompt in enumerate(prompts):
                rest: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": 10 + 7 * i}
                answers.append(client.completions.create(**rest, temperature=0))
                answers.append(
                    client.completions.create(**rest, temperature=0.9, top_p=0.8, seed=11)
                )
            return await asyncio.gather(*answers)

    answers = asyncio.run(ask_all())
    for i, answer in enumerate(answers):
        prompt, params = prompts[i // 2], sampled if i % 2 else GREEDY
        output = generate(
            model, prompt, max_tokens=10 + 7 * (i // 2), params=params, eos_id=tokenizer.eot_id
        )
        assert answer.choices[0].text == tokenizer.decode(output)


def test_several_prompts_and_choices_keep_their_order_and_seeds(client: openai.OpenAI) -> None:
    together = client.completions.create(
        model=MODEL, prompt=["fox", "dog"], n=3, seed=5, max_tokens=12
    )
    assert [c.index for c in together.choices] == list(range(6))
    texts = [c.text for c in together.choices]
    assert len(set(texts)) == 6
    for i, prompt in enumerate(["fox", "dog"]):
        alone = client.completions.create(model=MODEL, prompt=prompt, seed=5, max_tokens=12)
        assert alone.choices[0].text == texts[3 * i]


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    free = (
        client.completions.create(model=MODEL, prompt="fox", seed=1, max_tokens=40).choices[0].text
    )
    stop = free[12:15]
    for stream in (False, True):
        answer = client.completions.create(
            model=MODEL,
            prompt="fox",
            seed=1,
            max_tokens=40,
            stop=[stop, "\x00never"],
            logprobs=0,
            stream=stream,
        )
        choices = [c for part in answer for c in part.choices] if stream else answer.choices
        assert "".join(c.text for c in choices) == free[: free.index(stop)]
        assert choices[-1].finish_reason == "stop"
        offsets = [offset for c in choices for offset in c.logprobs.text_offset]
        # equal: half a character there
        assert len(offsets) > 8 and max(offsets) <= free.index(stop)


def test_echo_with_logprobs_scores_a_prompt(
    client: openai.OpenAI, model: GPT, tokenizer: Tokenizer
) -> None:
    """What lm-eval asks: the log-probability of each token of a given text."""
    prompt = "the lazy dog, and naïve cafés"
    ids = tokenizer.encode(prompt)
    with torch.no_grad():
        expected = model.logits(model(torch.tensor([ids]))[0]).log_softmax(-1)
    scored: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": 0,
        "echo": True,
        "logprobs": 3,
        "temperature": 0,
    }
    for asked in (prompt, ids):
        [choice] = client.completions.create(prompt=asked, **scored).choices
        logprobs = choice.logprobs
        assert choice.text == prompt and logprobs is not None
        assert logprobs.token_logprobs is not None and logprobs.text_offset is not None
        assert logprobs.token_logprobs[0] is None
        for position, token_id in enumerate(ids[1:]):
            got = logprobs.token_logprobs[position + 1]
            assert got == pytest.approx(expected[position, token_id].item(), abs=1e-4)
        starts = [
            b"".join(map(tokenizer.token_bytes, ids[:i])).decode(errors="ignore")
            for i in range(len(ids))
        ]
        assert logprobs.text_offset == [len(start) for start in starts]


def test_models_tokenize_health_ready(
    client: openai.OpenAI, http: httpx.Client, checkpoint: Path, tokenizer: Tokenizer
) -> None:
    metadata = read_metadata(checkpoint)
    assert [m.id for m in client.models.list()] == [MODEL]
    card = http.get(f"/v1/models/{MODEL}").json()
    assert card["lineage"]["run_id"] == metadata.run_id and card["lineage"]["step"] == 7
    assert card["lineage"]["parameter_hash"] == metadata.parameter_hash
    assert card["lineage"]["data_manifest_hash"] == "d" * 64
    text = "naïve <|endoftext|> €5"
    counted = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert counted["tokens"] == tokenizer.encode(text) and counted["count"] == len(
        counted["tokens"]
    )
    assert (counted["max_model_len"], len(counted["token_strs"])) == (128, counted["count"])
    assert http.post("/detokenize", json={"tokens": counted["tokens"]}).json() == {"prompt": text}
    for path in ("/health", "/ready"):
        assert httpx.get(f"{http.base_url}{path}", timeout=limit_s(30)).status_code == 200
    answer = http.get("/version")
    assert answer.json()["version"]
    assert answer.headers["x-model-version"] == str(metadata.parameter_hash)[:16]
    assert len(answer.headers.get_list("x-request-id")) == 1


def test_metrics_count_tokens_under_the_names_of_vllm(
    client: openai.OpenAI, http: httpx.Client
) -> None:
    names = (
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_count",
    )
    names += ("vllm:inter_token_latency_seconds_count", "vllm:e2e_request_latency_seconds_count")
    before = [metric(http, name) for name in names]
    client.completions.create(
        model=MODEL, prompt=[1, 2, 3], max_tokens=10, extra_body={"ignore_eos": True}, n=2
    )
    after = [metric(http, name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 20, 2, 18, 2]
    assert (
        metric(http, "vllm:num_requests_running") == metric(http, "vllm:kv_cache_usage_perc") == 0
    )


@pytest.mark.parametrize(
    "key", [None, "", "Bearer", "Bearer sk-wrong", f"Basic {KEY}", f"Bearer {KEY}x"]
)
def test_no_answer_without_a_key(url: str, key: str | None) -> None:
    for path in ("/v1/models", "/metrics", "/nowhere"):
        answer = httpx.get(
            f"{url}{path}",
            headers={} if key is None else {"Authorization": key},
            timeout=limit_s(30),
        )
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"


def test_errors_of_the_client_library(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=[1] * 100, max_tokens=29)
    assert caught.value.code == "context_length_exceeded"
    assert "128" in caught.value.message and "129" in caught.value.message
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="../../etc", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="sk-wrong", max_retries=0).models.list()
    assert client.completions.create(model=MODEL, prompt=[1] * 100, max_tokens=28).usage


@pytest.mark.parametrize(
    ("status", "route", "content", "headers"),
    [
        (400, "POST /v1/completions", b"{", {}),
        (400, "POST /v1/completions", b'{"model":"tiny","prompt":[999999]}', {}),
        (400, "POST /v1/completions", b'{"model":"tiny","prompt":"x","logit_bias":{"99999":1}}', {}),
        (400, "POST /v1/completions", b'{"model":"tiny","prompt":"x","best_of":2}', {}),
        (400, "POST /v1/completions", b'{"model":"tiny","prompt":[' + b'"a",' * 256 + b'"a"]}', {}),
        (400, "POST /detokenize", b'{"tokens":[-1]}', {}),
        (404, "POST /tokenize", b'{"model":"other","prompt":""}', {}),
        (404, "GET /docs", b"", {}),
        (404, "GET /openapi.json", b"", {}),
        (404, "GET /v1/models/other", b"", {}),
        (405, "GET /v1/completions", b"", {}),
        (413, "POST /v1/completions", b'{"prompt":"' + b"x" * (2 << 20), {}),
        (415, "POST /v1/completions", b"{}", {"Content-Type": "text/plain"}),
        (415, "POST /v1/completions", b"{}", {"Content-Encoding": "gzip"}),
    ],
)  # fmt: skip
def test_wrong_requests_get_the_right_status_in_the_shape_of_openai(
    http: httpx.Client, status: int, route: str, content: bytes, headers: dict[str, str]
) -> None:
    answer = http.request(
        *route.split(), content=content, headers={"Content-Type": "application/json"} | headers
    )
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    # No replica sees a body that is too large
    assert status == 413 or answer.headers["x-model-version"]
    if status == 405:
        assert answer.headers["allow"] == "POST"


def flood() -> dict[str, Any]:
    """A request that takes the replica seconds: many sequences, each to the end of its context."""
    return {
        "model": MODEL,
        "stream": True,
        "prompt": [[1]] * 27,
        "n": 4,
        "max_tokens": 127,
        "ignore_eos": True,
    }


def test_a_full_replica_answers_429_and_a_client_that_leaves_frees_its_slots(
    client: openai.OpenAI, http: httpx.Client
) -> None:
    aborted = metric(http, "vllm:request_success_total", finished_reason="abort")
    with (
        http.stream("POST", "/v1/completions", json=flood()) as answer,
        http.stream("POST", "/v1/completions", json=flood()) as other,
    ):
        assert (answer.status_code, other.status_code) == (200, 200)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model=MODEL, prompt=[[1]] * 27, n=4)
        assert caught.value.code == "overloaded"
        assert caught.value.response.headers["retry-after"] == "1"
        assert metric(http, "vllm:num_requests_running") == NUM_SLOTS
        assert metric(http, "vllm:num_requests_waiting") > 0
    wait_until(
        lambda: (
            metric(http, "vllm:num_requests_running") + metric(http, "vllm:num_requests_waiting")
            == 0
        ),
        timeout_s=1,
    )
    assert (
        metric(http, "vllm:request_success_total", finished_reason="abort") - aborted
        > NUM_SLOTS + 1
    )
    generated = metric(http, "vllm:generation_tokens_total")
    completion = client.completions.create(model=MODEL, prompt="x", max_tokens=5)
    assert completion.usage is not None
    # Nobody goes on with what was left
    assert (
        metric(http, "vllm:generation_tokens_total") - generated
        == completion.usage.completion_tokens
    )


MESSAGES: list[Any] = [
    {"role": "system", "content": "be brief"},
    {
        "role": "user",
        "content": [{"type": "text", "text": "tea "}, {"type": "text", "text": "or €5?"}],
    },
]
RENDERED = "System:\nbe brief\nUser:\ntea or €5?\nAssistant:\n"


def test_chat_goes_on_with_the_rendered_dialogue(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 20, "seed": 4, "n": 2, "stop": ["qu"]}
    text = client.completions.create(prompt=RENDERED, **asked, logprobs=2)
    raw = client.chat.completions.with_raw_response.create(
        messages=MESSAGES, **asked, logprobs=True, top_logprobs=2
    )
    chat = raw.parse()
    assert "not chat-tuned" in raw.headers["x-model-note"]
    assert (
        chat.id.startswith("chatcmpl-")
        and chat.object == "chat.completion"
        and chat.usage == text.usage
    )
    for ours, expected in zip(chat.choices, text.choices, strict=True):
        assert (ours.message.role, ours.message.content) == ("assistant", expected.text)
        assert (ours.index, ours.finish_reason) == (expected.index, expected.finish_reason)
        assert (
            ours.logprobs is not None
            and ours.logprobs.content is not None
            and expected.logprobs is not None
        )
        assert [token.token for token in ours.logprobs.content] == expected.logprobs.tokens
        assert [token.logprob for token in ours.logprobs.content] == pytest.approx(
            expected.logprobs.token_logprobs, abs=1e-5
        )
        assert all(len(token.top_logprobs) == 2 for token in ours.logprobs.content)
        whole = b"".join(bytes(token.bytes or []) for token in ours.logprobs.content).decode(
            errors="replace"
        )
        assert whole.startswith(expected.text)


def test_a_chat_stream_is_the_answer_in_parts(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": MESSAGES,
        "max_completion_tokens": 15,
        "seed": 4,
        "n": 2,
    }
    whole = client.chat.completions.create(**asked)
    parts = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert parts[-1].choices == [] and parts[-1].usage == whole.usage
    assert {part.object for part in parts} == {"chat.completion.chunk"} and len(
        {part.id for part in parts}
    ) == 1
    for choice in whole.choices:
        mine = [c for part in parts for c in part.choices if c.index == choice.index]
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.delta.role for c in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]


def test_a_chat_without_a_limit_fills_the_context_and_no_more(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, extra_body={"ignore_eos": True}, logit_bias={"10": -100}
    )
    assert answer.usage is not None and answer.usage.total_tokens == 128
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "word " * 200}]
        )
    assert caught.value.code == "context_length_exceeded"


def test_the_lineage_of_a_model(
    client: openai.OpenAI, checkpoint: Path, tokenizer: Tokenizer
) -> None:
    metadata = read_metadata(checkpoint)
    model: Any = client.models.retrieve(MODEL)
    assert model.id == MODEL and [m.id for m in client.models.list()] == [MODEL]
    assert model.lineage["run_id"] == metadata.run_id and model.lineage["step"] == metadata.step
    assert model.lineage["data_manifest_hash"] == metadata.data_manifest_hash
    assert model.lineage["code_version"] == metadata.code_version
    assert model.lineage["tokenizer_hash"] == tokenizer.hash
    assert model.chat_tuned is False


def engine_pid(checkpoint: Path) -> int:
    [engine] = children_with(str(checkpoint))
    return engine.pid


def test_a_killed_engine_ends_streams_with_an_error_and_is_replaced(
    http: httpx.Client, client: openai.OpenAI, checkpoint: Path
) -> None:
    killed = engine_pid(checkpoint)
    with http.stream("POST", "/v1/completions", json=flood()) as answer:
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        os.kill(killed, signal.SIGKILL)
        *_, last = lines
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "interrupted"
    wait_until(lambda: http.get("/ready").status_code == 200, timeout_s=30)
    assert engine_pid(checkpoint) != killed
    assert client.completions.create(model=MODEL, prompt="x", max_tokens=5).choices[0].finish_reason


def test_a_killed_replica_fails_no_request_before_its_first_byte_and_ends_streams_with_an_error(
    http: httpx.Client, checkpoint: Path
) -> None:
    asked = {"model": MODEL, "prompt": [1], "max_tokens": 120, "seed": 1, "ignore_eos": True}
    expected = http.post("/v1/completions", json=asked).json()["choices"]
    admitted = metric(http, "vllm:prompt_tokens_total") + 20 + 1
    streamed = flood() | {"prompt": [[1]] * 20}
    with (
        ThreadPoolExecutor() as pool,
        http.stream("POST", "/v1/completions", json=streamed) as answer,
    ):
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        whole = pool.submit(
            httpx.post,
            f"{http.base_url}/v1/completions",
            json=asked,
            headers=http.headers,
            timeout=limit_s(60),
        )
        wait_until(lambda: metric(http, "vllm:prompt_tokens_total") == admitted, timeout_s=5)
        os.kill(psutil.Process(engine_pid(checkpoint)).ppid(), signal.SIGKILL)
        *_, last = lines
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "interrupted"
        assert whole.result().status_code == 200, whole.result().text
    assert whole.result().json()["choices"] == expected


@pytest.mark.more
def test_a_folder_saved_by_transformers_is_served_with_its_logits(
    url: str, endpoints: Endpoints, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 211,
        "n_positions": 64,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 3,
        "initializer_range": 0.3,
    }
    theirs = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
    theirs.save_pretrained(tmp_path / "gpt2")
    assert endpoints.replaced(config(tmp_path / "gpt2")) == {"url": url, "model": "gpt2"}
    ids = [5, 200, 17, 42, 3]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none needed", max_retries=0) as client:
        answer = client.completions.create(
            model="gpt2", prompt=ids, max_tokens=20, temperature=0, echo=True, logprobs=5
        )
        with pytest.raises(openai.BadRequestError, match=r"no tokenizer\.json"):
            client.completions.create(model="gpt2", prompt="text")
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None
    assert logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    assert answer.choices[0].text == ""
    sequence = [int(name.removeprefix("token_id:")) for name in logprobs.tokens]
    assert sequence[:5] == ids and len(sequence) == 25
    with torch.no_grad():
        expected = theirs(torch.tensor([sequence])).logits[0].log_softmax(-1)
    assert sequence[5:] == expected[4:-1].argmax(-1).tolist()
    for position, token_id in enumerate(sequence[1:]):
        assert logprobs.token_logprobs[position + 1] == pytest.approx(
            expected[position, token_id].item(), abs=1e-4
        )
        for name, logprob in logprobs.top_logprobs[position + 1].items():
            top_id = int(name.removeprefix("token_id:"))
            assert logprob == pytest.approx(expected[position, top_id].item(), abs=1e-4)

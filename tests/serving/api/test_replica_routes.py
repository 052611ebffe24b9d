"""A replica's own routes, without Ray: large bodies and who waits for them, requests that change
nothing, usage."""

import asyncio
import json
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.settings.serve import EngineConfig, ReplicaConfig, ServeConfig
from model.text.tokenizer import Tokenizer
from serving.api.access import AccessRules
from serving.api.keys import ApiKey
from serving.delivery.versions import Versions
from serving.engine.messages import SequenceRequest
from serving.engine_process.client import EngineClient
from serving.engine_process.generation import Generation
from serving.output.answers import server_sent
from serving.protocol import harmless_fields
from serving.protocol.protocol import CompletionRequest, choice_seed
from tests.serving.endpoint_parts import (
    Run,
    loopback_server,
    replica_app,
    replica_client,
    shared_replica,
)
from tests.serving.harmless_values import values
from tests.serving.tiny_models import lively_model, write_model
from tests.waiting import wait_in_loop_until

MODEL, KEYS = "tiny", ("sk-one", "sk-two", "sk-three")
PER_KEY, OF_ALL = 2, 4  # requests at once
NUM_TRIES = 3
MEGABYTE = 1_000_000
TEXT = "the quick naïve fox, " * (MEGABYTE // 22)
LARGE: dict[str, tuple[str, dict[str, Any], int]] = {
    "a text": ("/tokenize", {"prompt": TEXT}, 200),
    "names": ("/tokenize", {"prompt": TEXT[: MEGABYTE // 4], "return_token_strs": True}, 200),
    "ids": ("/detokenize", {"tokens": [100] * (MEGABYTE // 5)}, 200),
    "ids of a prompt": ("/v1/completions", {"model": MODEL, "prompt": [1] * (MEGABYTE // 3)}, 400),
    "a long chat": (
        "/v1/chat/completions",
        {"model": MODEL, "messages": [{"role": "user", "content": TEXT}]},
        400,
    ),
    "a long response": ("/v1/responses", {"model": MODEL, "input": TEXT}, 400),
    "biases": (
        "/v1/completions",
        {"model": MODEL, "prompt": "x", "logit_bias": dict.fromkeys(range(80_000), 0)},
        400,
    ),
}
ASKED = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 6, "ignore_eos": True, "seed": 3}
CHAT = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "the quick"}],
    "max_tokens": 6,
    "seed": 3,
}


@pytest.fixture(scope="module")
def run(checkpoint: Path) -> Iterator[Run]:
    config = ServeConfig(
        replicas=ReplicaConfig(max_ongoing_requests=OF_ALL, max_requests_per_key=PER_KEY)
    )
    access = AccessRules(tuple(map(ApiKey.read, KEYS)))
    with shared_replica(checkpoint, config=config, access=access, key=KEYS[0]) as run:
        yield run


async def longest_stretch_s(work: Coroutine[Any, Any, None]) -> float:
    """Processor time that the event loop spends in one go, which other streams' tokens would wait
    for."""
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        before = time.thread_time()
        while True:
            await asyncio.sleep(0.001)
            now = time.thread_time()
            longest, before = max(longest, now - before), now

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0.01)
    await work
    await asyncio.sleep(0.01)
    watching.cancel()
    return longest


def test_only_a_clients_seed_goes_to_the_engine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a seed vLLM draws row by row. The engine of raymill adds one where there is none."""
    seeds: list[list[int | None]] = []
    submit = EngineClient.submit

    def seen(self: EngineClient, requests: list[SequenceRequest], **how: int) -> Generation:
        seeds.append([request.sampling.seed for request in requests])
        return submit(self, requests, **how)

    monkeypatch.setattr(EngineClient, "submit", seen)

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        for seed in (None, 3):
            asked = ASKED | {"seed": seed, "n": 2, "max_tokens": 30}
            choices = (await http.post("/v1/completions", json=asked)).json()["choices"]
            assert choices[0]["text"] != choices[1]["text"]

    run(check)
    assert seeds == [[None, None], [3, choice_seed(3, 1)]]


@pytest.mark.more
@pytest.mark.parametrize("name", LARGE)
def test_no_large_body_holds_up_the_event_loop(run: Run, name: str) -> None:
    """On the loop most of them would take 0.08 to 0.4 s. A stretch also holds what has nothing to do
    with a body, such as a collection of garbage, so the least of a few counts."""
    path, fields, status = LARGE[name]
    body = json.dumps(fields, ensure_ascii=False).encode()

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        async def ask() -> None:
            async with http.stream(
                "POST", path, content=body, headers={"Content-Type": "application/json"}
            ) as answer:
                assert answer.status_code == status

        assert min([await longest_stretch_s(ask()) for _ in range(NUM_TRIES)]) < 0.03

    run(check)


def test_a_monitor_may_ask_with_head(checkpoint: Path) -> None:
    async def scenario() -> None:
        async with (
            replica_app(checkpoint, name=MODEL) as (app, _),
            loopback_server(app) as url,
            httpx.AsyncClient(base_url=url) as http,
        ):
            for path in ("/health", "/ready", "/v1/models"):
                whole, head = await http.get(path), await http.head(path)
                assert whole.content and (head.status_code, head.content) == (200, b"")
                same = ("content-type", "content-length", "x-model-version")
                assert [head.headers[name] for name in same] == [
                    whole.headers[name] for name in same
                ]
            assert (await http.head("/v1/completions")).status_code == 405

    asyncio.run(scenario())


def test_what_is_not_there__is_said_in_the_shape_of_all_errors(run: Run) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        for path in ("/v1/moderations", "/v1/completions/", "/v1", "/nothing%1b"):
            answer = await http.post(path, json={})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (404, "not_found")
            assert error["message"].startswith("There is nothing at '/")
            assert error["message"].isprintable()
        wrong = await http.delete("/v1/models")
        error, allowed = wrong.json()["error"], wrong.headers["allow"]
        assert (wrong.status_code, error["code"]) == (405, "method_not_allowed")
        assert error["message"] == f"'/v1/models' does not take 'DELETE', but {allowed}."

    run(check)


def test_tokens_and_back(run: Run, tokenizer: Tokenizer) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        answer = (
            await http.post("/tokenize", json={"prompt": "naïve fox", "return_token_strs": True})
        ).json()
        assert answer["tokens"] == tokenizer.encode("naïve fox") and answer["count"] == len(
            answer["tokens"]
        )
        assert len(answer["token_strs"]) == answer["count"] and answer["max_model_len"] == 128
        back = (await http.post("/detokenize", json={"tokens": answer["tokens"]})).json()
        assert back == {"prompt": "naïve fox"}
        wrong = await http.post("/detokenize", json={"tokens": [10**6]})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "tokens")

    run(check)


@pytest.mark.parametrize(
    ("keys", "num_answers", "code"),
    [(KEYS[:1] * 6, PER_KEY, "rate_limit_exceeded"), (KEYS * PER_KEY, OF_ALL, "overloaded")],
    ids=["of one key", "of all"],
)
@pytest.mark.parametrize(
    ("path", "fields"), [("/tokenize", {"prompt": TEXT[:9000]}), ("/detokenize", {"tokens": [9]})]
)
def test_tools_count_for_their_key_and_for_the_replica(
    run: Run, keys: tuple[str, ...], num_answers: int, code: str, path: str, fields: dict[str, Any]
) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        asked = (
            http.post(path, json=fields, headers={"Authorization": f"Bearer {key}"}) for key in keys
        )
        answers = await asyncio.gather(*asked)
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) == len(keys) - num_answers
        assert {answer.json()["error"]["code"] for answer in refused} == {code}
        assert (await http.post(path, json=fields)).status_code == 200

    run(check)


def test_a_drained_replica_refuses_tools_too(run: Run) -> None:
    async def check(http: httpx.AsyncClient, versions: Versions) -> None:
        serving = versions.delivery
        versions.delivery = serving.model_copy(update={"draining": True})
        answer = await http.post("/tokenize", json={"prompt": "x"})
        versions.delivery = serving
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")

    run(check)


def test_fields_that_change_nothing_change_no_token(run: Run) -> None:
    others = harmless_fields.FIELDS.keys() - CompletionRequest.model_fields.keys()
    harmless = {name: values(harmless_fields.FIELDS, name)[-1] for name in others}

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        for path, asked in (("/v1/completions", ASKED), ("/v1/chat/completions", CHAT)):
            plain, with_all = [
                (await http.post(path, json=fields)).json() for fields in (asked, asked | harmless)
            ]
            assert plain["choices"] == with_all["choices"] and plain["usage"] == with_all["usage"]

    run(check)


def test_a_chat_goes_on_with_its_own_answer(run: Run) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        message = (await http.post("/v1/chat/completions", json=CHAT)).json()["choices"][0][
            "message"
        ]
        # By openai-python
        written = {"annotations": None, "audio": None, "function_call": None, "tool_calls": None}
        plain = {"role": "assistant", "content": message["content"]}
        answers = [
            (
                await http.post(
                    "/v1/chat/completions",
                    json=CHAT | {"messages": [*CHAT["messages"], sent, *CHAT["messages"]]},
                )
            )
            for sent in (plain, message, message | written)
        ]
        assert [answer.status_code for answer in answers] == [200] * 3
        assert (
            answers[0].json()["choices"]
            == answers[1].json()["choices"]
            == answers[2].json()["choices"]
        )

    run(check)


def test_the_newer_name_of_the_limit_counts(run: Run) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        for path, asked in (("/v1/completions", ASKED), ("/v1/chat/completions", CHAT)):
            answer = (
                await http.post(path, json=asked | {"ignore_eos": True, "max_completion_tokens": 3})
            ).json()
            assert answer["usage"]["completion_tokens"] == 3

    run(check)


@pytest.mark.parametrize(
    ("path", "asked"), [("/v1/completions", ASKED | {"n": 2}), ("/v1/chat/completions", CHAT)]
)
@pytest.mark.parametrize("is_continuous", [True, False])
def test_usage_so_far_in_every_part(
    run: Run, path: str, asked: dict[str, Any], is_continuous: bool
) -> None:
    options = {
        "include_usage": True,
        "continuous_usage_stats": is_continuous,
        "include_obfuscation": False,
    }

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        answer = await http.post(
            path, json=asked | {"stream": True, "stream_options": options, "ignore_eos": True}
        )
        *events, done = answer.text.strip().split("\n\n")
        usages = [json.loads(event.removeprefix("data: "))["usage"] for event in events]
        assert done == "data: [DONE]" and usages[-1] is not None
        counts = [usage["completion_tokens"] for usage in usages if usage is not None]
        assert counts == (
            [*range(1, counts[-1] + 1), counts[-1]] if is_continuous else [counts[-1]]
        )
        assert all(
            u is None or u["total_tokens"] == u["prompt_tokens"] + u["completion_tokens"]
            for u in usages
        )

    run(check)


@pytest.mark.more
@pytest.mark.parametrize("scope", ["endpoint", "key"])
def test_usage_says_what_the_cache_had_but_not_of_other_keys(checkpoint: Path, scope: str) -> None:
    """Of a request without a key too, and a prompt counts once."""
    engine = EngineConfig.model_validate({"prefix_cache_scope": scope})
    asked = ASKED | {"prompt": list(range(40, 90)), "max_tokens": 2}

    async def cached(keys: tuple[str, ...], fields: list[dict[str, int]]) -> list[int | None]:
        access = AccessRules(tuple(map(ApiKey.read, keys)))
        seen: list[int | None] = []
        async with replica_client(checkpoint, config=ServeConfig(engine=engine), access=access) as (
            http,
            _,
        ):
            for key in keys or ("none",):
                for more in fields:
                    headers = {"Authorization": f"Bearer {key}"}
                    answer = await http.post("/v1/completions", json=asked | more, headers=headers)
                    usage = answer.json()["usage"]
                    assert usage["prompt_tokens"] == 50
                    details = usage.get("prompt_tokens_details")
                    seen.append(None if details is None else details["cached_tokens"])
        return seen

    assert asyncio.run(cached((), [{}, {}, {"n": 3}])) == [0, 48, 48]
    of_keys = asyncio.run(cached(KEYS[:2], [{}, {}]))
    assert of_keys == ([0, 48, 0, 48] if scope == "key" else [None] * 4)


@pytest.mark.more
@pytest.mark.parametrize("clips", [False, True])
def test_a_limit_that_does_not_fit_is_clipped_where_the_endpoint_says_so(
    checkpoint: Path, *, clips: bool
) -> None:
    config = ServeConfig(engine=EngineConfig(clip_max_tokens=clips))
    prompts = [[5] * 120, [6] * 100]

    async def scenario() -> None:
        async with replica_client(checkpoint, config=config) as (http, _):
            asked = ASKED | {"max_tokens": 4096}
            whole = await http.post("/v1/completions", json=asked | {"prompt": prompts})
            chat = await http.post(
                "/v1/chat/completions", json=CHAT | {"max_tokens": 4096, "ignore_eos": True}
            )
            assert [whole.status_code, chat.status_code] == ([200, 200] if clips else [400, 400])
            if clips:
                assert whole.json()["usage"]["completion_tokens"] == 8 + 28
                assert chat.json()["usage"]["total_tokens"] == 128
                assert chat.json()["choices"][0]["finish_reason"] == "length"
            full = await http.post("/v1/completions", json=asked | {"prompt": [7] * 128})
            assert (
                full.status_code == 400
                and full.json()["error"]["code"] == "context_length_exceeded"
            )

    asyncio.run(scenario())


def test_an_event_is_one_line_for_every_client() -> None:
    """httpx and Python's splitlines end lines at more than the newline."""
    text = "one\u2028two\u2029three\x85four \\u2028"
    line, empty = server_sent({"text": text}).decode().splitlines()
    assert json.loads(line.removeprefix("data: ")) == {"text": text} and not empty


def test_a_body_that_is_not_declared_as_json_is_told_the_header(run: Run) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        answer = await http.post("/v1/completions", content=json.dumps(ASKED))
        assert answer.status_code == 415
        assert "-H 'Content-Type: application/json'" in answer.json()["error"]["message"]

    run(check)


@pytest.mark.more
def test_a_key_that_fills_the_queue_fills_it_for_itself(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Neither its sequences nor its requests are in the way of another key, up to the same
    number."""
    # The answers are long, so that all eight are there before the first has ended
    model = lively_model(tokenizer, n_positions=1024)
    checkpoint = write_model(tmp_path / "long", model, tokenizer)
    # Nobody waits too long, on a busy machine either
    engine = EngineConfig(max_num_seqs=2, max_waiting=6, kernels="torch", max_queue_s=600.0)
    config = ServeConfig(engine=engine, replicas=ReplicaConfig(max_ongoing_requests=8))
    long = ASKED | {"max_tokens": 1000}

    async def scenario() -> None:
        access = AccessRules(tuple(map(ApiKey.read, KEYS)))
        async with replica_client(checkpoint, config=config, access=access) as (http, versions):

            def ask(key: str, fields: dict[str, Any]) -> asyncio.Task[httpx.Response]:
                post = http.post(
                    "/v1/completions", json=fields, headers={"Authorization": f"Bearer {key}"}
                )
                return asyncio.create_task(post)

            first = [ask(KEYS[0], long) for _ in range(8)]
            await wait_in_loop_until(lambda: versions.num_running + versions.num_waiting == 8)
            assert (await ask(KEYS[0], ASKED)).json()["error"]["code"] == "overloaded"
            others = [ask(KEYS[1], ASKED), ask(KEYS[2], ASKED | {"n": 3})]
            refused = await ask(KEYS[2], ASKED | {"n": 6})
            assert "limit of 8 running and waiting sequences" in refused.json()["error"]["message"]
            answers = await asyncio.gather(*others)
            assert [answer.status_code for answer in answers] == [200, 200]
            assert sum(task.done() for task in first) <= 5, (
                "others' turn came before its own last ones"
            )
            assert {answer.status_code for answer in await asyncio.gather(*first)} == {200}
            assert answers[0].json()["choices"] == (await ask(KEYS[0], ASKED)).json()["choices"]

    asyncio.run(scenario())

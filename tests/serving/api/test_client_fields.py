"""What clients of vLLM and of OpenAI ask for besides text, on a replica without Ray: against the
model's own numbers."""

import asyncio
import base64
import copy
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cluster.settings.serve import EngineConfig, ServeConfig
from model.generation.generate import generate
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from serving.delivery.versions import Versions
from tests.serving.endpoint_parts import Run, replica_client, shared_replica
from tests.serving.tiny_models import lively_model, write_model

GREEDY = SamplingParams(temperature=0.0)
TEXT = "the quick naïve fox"
ASKED: dict[str, Any] = {"model": "tiny", "prompt": TEXT, "temperature": 0, "max_tokens": 12}
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": TEXT}],
    "temperature": 0,
}


@pytest.fixture(scope="module")
def run(checkpoint: Path) -> Iterator[Run]:
    """With default settings."""
    with shared_replica(checkpoint) as run:
        yield run


async def post(
    http: httpx.AsyncClient, path: str, asked: dict[str, Any], **fields: Any
) -> dict[str, Any]:
    answer = await http.post(path, json=asked | fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def choices(http: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    return list((await post(http, "/v1/completions", ASKED, **fields))["choices"])


async def events(
    http: httpx.AsyncClient, path: str, asked: dict[str, Any], **fields: Any
) -> list[dict[str, Any]]:
    answer = await http.post(path, json=asked | fields | {"stream": True})
    *parts, done = answer.text.strip().split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def test_256_prompts_are_answered_in_order_by_default_while_others_are_too(
    run: Run, model: GPT
) -> None:
    prompts = [[1 + i % 250, 7, 1 + i // 250] for i in range(256)]

    async def ttft(http: httpx.AsyncClient) -> tuple[float, float]:
        text = (await http.get("/metrics")).text
        of = dict.fromkeys(("sum", "count"), 0.0)
        for name, value in re.findall(
            r"^vllm:time_to_first_token_seconds_(sum|count){.*} (\S+)$", text, re.MULTILINE
        ):
            of[name] += float(value)
        return of["sum"], of["count"]

    async def check(http: httpx.AsyncClient, versions: Versions) -> None:
        before, start_s = await ttft(http), time.monotonic()
        many = asyncio.create_task(
            choices(http, prompt=prompts, n=2, max_tokens=6, ignore_eos=True)
        )
        most = 0
        while not many.done():
            most = max(most, versions.live.engine.num_open_sequences)
            if most:
                assert (await choices(http, prompt=[3], max_tokens=1))[0][
                    "finish_reason"
                ] == "length"
            await asyncio.sleep(0)
        assert most <= 2 * versions.live.engine.facts.max_num_seqs + 1  # room is left
        found = await many
        took_s, after = time.monotonic() - start_s, await ttft(http)
        # Half of it on average, if those that were not in line yet counted as waiting for a slow
        # engine.
        assert (after[0] - before[0]) / (after[1] - before[1]) < took_s / 4
        assert [choice["index"] for choice in found] == list(range(512))
        alone = [
            (await choices(http, prompt=prompts[i], max_tokens=6, ignore_eos=True))[0]
            for i in (0, 100, 255)
        ]
        assert [found[2 * i]["text"] for i in (0, 100, 255)] == [choice["text"] for choice in alone]
        assert versions.live.engine.num_open_sequences == 0

    run(check)


@pytest.mark.more
@pytest.mark.parametrize(("max_num_seqs", "max_waiting"), [(3, 0), (2, 1)])
def test_a_replica_that_holds_little_answers_many_prompts_too(
    checkpoint: Path, max_num_seqs: int, max_waiting: int
) -> None:
    async def check() -> None:
        config = ServeConfig(
            engine=EngineConfig(max_num_seqs=max_num_seqs, max_waiting=max_waiting)
        )
        async with replica_client(checkpoint, config=config) as (http, _):
            assert (
                len(await choices(http, prompt=[[i] for i in range(1, 41)], stop=["e", "o"])) == 40
            )

    asyncio.run(check())


def test_token_ids_are_those_that_were_read_and_drawn(
    run: Run, model: GPT, tokenizer: Tokenizer
) -> None:
    prompt_ids = tokenizer.encode(TEXT)
    expected = generate(model, prompt_ids, max_tokens=12, params=GREEDY, eos_id=None)

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        [plain], [choice] = (
            await choices(http, ignore_eos=True),
            await choices(http, ignore_eos=True, return_token_ids=True),
        )
        assert choice == plain | {"token_ids": expected, "prompt_token_ids": prompt_ids}
        parts = await events(
            http, "/v1/completions", ASKED, ignore_eos=True, return_token_ids=True, stop=["\x00"]
        )
        assert [part["choices"][0]["token_ids"] for part in parts] == [
            [token_id] for token_id in expected
        ]
        first, *others = [part["choices"][0] for part in parts]
        assert first["prompt_token_ids"] == prompt_ids and not any(
            "prompt_token_ids" in part for part in others
        )
        chat = await post(http, "/v1/chat/completions", CHAT, return_token_ids=True, max_tokens=9)
        rendered = tokenizer.encode(f"User:\n{TEXT}\nAssistant:\n")
        assert chat["prompt_token_ids"] == rendered
        text = b"".join(map(tokenizer.token_bytes, chat["choices"][0]["token_ids"])).decode(
            errors="replace"
        )
        assert text.startswith(chat["choices"][0]["message"]["content"])
        parts = await events(
            http, "/v1/chat/completions", CHAT, return_token_ids=True, max_tokens=9
        )
        assert parts[0]["prompt_token_ids"] == rendered
        assert [i for part in parts for c in part["choices"] for i in c["token_ids"]] == chat[
            "choices"
        ][0]["token_ids"]

    run(check)


@torch.inference_mode()
def log_probabilities(model: GPT, token_ids: list[int]) -> torch.Tensor:
    return model.logits(model(torch.tensor([token_ids]))[0]).log_softmax(-1)  # (T, V)


@pytest.mark.parametrize("num_top", [0, 3, 20])
def test_a_prompts_log_probabilities_have_the_shape_of_vllm(
    run: Run, model: GPT, tokenizer: Tokenizer, num_top: int
) -> None:
    prompt_ids = tokenizer.encode(TEXT)
    expected = log_probabilities(model, prompt_ids)

    def assert_scores(found: list[dict[str, Any] | None]) -> None:
        assert len(found) == len(prompt_ids) and found[0] is None
        for place, entries in enumerate(found[1:]):
            row, own = expected[place], prompt_ids[place + 1]
            assert entries is not None and next(iter(entries)) == str(own)
            assert set(entries) == {str(own), *map(str, row.topk(num_top).indices.tolist())}
            for token_id, entry in entries.items():
                assert entry["logprob"] == pytest.approx(row[int(token_id)].item(), abs=1e-4)
                assert entry["rank"] == 1 + (row > row[int(token_id)]).sum().item()
                assert entry["decoded_token"] == tokenizer.token_bytes(int(token_id)).decode(
                    errors="replace"
                )

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        for fields in ({"max_tokens": 0}, {"max_tokens": 2, "n": 2}):
            for choice in await choices(http, prompt_logprobs=num_top, **fields):
                assert_scores(choice["prompt_logprobs"])
        [both] = await choices(http, prompt_logprobs=num_top, max_tokens=1, echo=True, logprobs=1)
        assert_scores(both["prompt_logprobs"])
        [echoed] = await choices(http, max_tokens=1, echo=True, logprobs=1)
        assert both["logprobs"] == echoed["logprobs"]
        chat = await post(http, "/v1/chat/completions", CHAT, prompt_logprobs=num_top, max_tokens=1)
        assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]

    run(check)


def test_a_token_to_stop_at_is_no_text_and_none_comes_too_early(
    run: Run, model: GPT, tokenizer: Tokenizer
) -> None:
    prompt_ids = tokenizer.encode(TEXT)
    free = generate(model, prompt_ids, max_tokens=12, params=GREEDY, eos_id=tokenizer.eot_id)
    stop_id = free[5]
    end = free.index(stop_id)

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        for fields in ({}, {"ignore_eos": True}):
            [choice] = await choices(
                http, stop_token_ids=[stop_id, stop_id], return_token_ids=True, logprobs=0, **fields
            )
            assert (choice["text"], choice["finish_reason"]) == (
                tokenizer.decode(free[:end]),
                "stop",
            )
            assert (
                choice["token_ids"] == free[: end + 1]
                and len(choice["logprobs"]["tokens"]) == end + 1
            )
        asked: dict[str, Any] = {
            "stop_token_ids": [stop_id],
            "min_tokens": 9,
            "return_token_ids": True,
        }
        [late] = await choices(http, **asked)
        assert len(late["token_ids"]) >= 9 and stop_id not in late["token_ids"][:9]
        [whole] = await choices(http, ignore_eos=True)
        [held] = await choices(http, ignore_eos=True, min_tokens=12, stop=[whole["text"][0]])
        assert held["text"] == whole["text"] and held["finish_reason"] == "length"
        chat = await post(
            http, "/v1/chat/completions", CHAT, max_tokens=9, min_tokens=9, return_token_ids=True
        )
        assert len(chat["choices"][0]["token_ids"]) == 9

    run(check)


def test_an_answer_has_a_bounded_number_of_log_probabilities(run: Run) -> None:
    """2,048 sequences with 20 candidates for each token would fill the replica's memory."""
    many: dict[str, Any] = {"prompt": [[1] * 20] * 256, "n": 8, "max_tokens": 100}

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        for fields, param in (
            ({"logprobs": 20}, "logprobs"),
            ({"prompt_logprobs": 20}, "prompt_logprobs"),
        ):
            answer = await http.post("/v1/completions", json=ASKED | many | fields)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        found = await choices(http, prompt=[[1] * 20] * 256, max_tokens=2, echo=True, logprobs=20)
        assert (
            all(len(choice["logprobs"]["tokens"]) >= 21 for choice in found) and len(found) == 256
        )

    run(check)


def test_fewest_tokens_that_cannot_be_are_refused(run: Run) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        for path, asked in (
            ("/v1/completions", ASKED),
            ("/v1/chat/completions", CHAT | {"max_tokens": 12}),
        ):
            answer = await http.post(path, json=asked | {"min_tokens": 13})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "min_tokens")

    run(check)


def test_tokens_to_stop_at_leave_at_least_one_to_draw(tmp_path: Path) -> None:
    """On a vocabulary that they could cover, which would leave the engine nothing to draw."""
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=5, n_positions=32, n_embd=8, n_layer=1, n_head=1)
    )
    theirs.save_pretrained(tmp_path / "five")

    async def check() -> None:
        async with replica_client(tmp_path / "five") as (http, versions):
            asked = {
                "model": "tiny",
                "prompt": [1],
                "max_tokens": 4,
                "min_tokens": 4,
                "temperature": 1,
            }
            answer = await http.post(
                "/v1/completions", json=asked | {"stop_token_ids": [0, 1, 2, 3, 4, 0]}
            )
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stop_token_ids")
            fields = {"stop_token_ids": [0, 1, 2, 4], "return_token_ids": True}
            answer = await http.post("/v1/completions", json=asked | fields)
            assert answer.json()["choices"][0]["token_ids"] == [3] * 4
            assert versions.live.engine.alive

    asyncio.run(check())


def test_an_embedding_is_the_mean_of_the_last_hidden_states(
    run: Run, model: GPT, tokenizer: Tokenizer
) -> None:
    inputs = [TEXT, "", "the lazy dog, and naïve cafés"]

    async def check(http: httpx.AsyncClient, versions: Versions) -> None:
        before = copy.deepcopy(versions.live.stats.steps)
        asked = {"model": "tiny", "input": inputs}
        answer = await post(http, "/v1/embeddings", asked)
        assert (answer["object"], answer["model"]) == ("list", versions.live.model.name)
        ids = [tokenizer.encode(text) or [tokenizer.eot_id] for text in inputs]
        num_tokens = sum(map(len, ids))
        assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        for index, (found, token_ids) in enumerate(zip(answer["data"], ids, strict=True)):
            assert (found["object"], found["index"]) == ("embedding", index)
            with torch.inference_mode():
                expected = model(torch.tensor([token_ids]))[0].mean(dim=0)
            torch.testing.assert_close(
                torch.tensor(found["embedding"]), expected, atol=1e-4, rtol=1e-4
            )
        packed = await post(http, "/v1/embeddings", asked, encoding_format="base64", user="u")
        for found, plain in zip(packed["data"], answer["data"], strict=True):
            numbers = torch.frombuffer(
                bytearray(base64.b64decode(found["embedding"])), dtype=torch.float32
            )
            assert numbers.tolist() == plain["embedding"]
        one = await post(http, "/v1/embeddings", asked, input=ids[2])
        assert one["data"][0]["embedding"] == answer["data"][2]["embedding"]
        many = await post(http, "/v1/embeddings", asked, input=[TEXT] * 256)
        assert {tuple(found["embedding"]) for found in many["data"]} == {
            tuple(answer["data"][0]["embedding"])
        }
        assert versions.live.engine.num_open_sequences == 0
        assert versions.live.stats.steps == before  # or a new version would look slow

    run(check)


def test_embeddings_are_refused_like_completions(run: Run) -> None:
    async def check(http: httpx.AsyncClient, versions: Versions) -> None:
        long = await http.post("/v1/embeddings", json={"model": "tiny", "input": [1] * 129})
        assert (long.status_code, long.json()["error"]["param"]) == (400, "input")
        serving = versions.delivery
        versions.delivery = serving.model_copy(update={"draining": True})
        drained = await http.post("/v1/embeddings", json={"model": "tiny", "input": "x"})
        versions.delivery = serving
        assert (drained.status_code, drained.json()["error"]["code"]) == (503, "draining")
        engine = versions.live.engine
        engine.facts = engine.facts._replace(embeds=False)  # as vLLM reports
        other = await http.post("/v1/embeddings", json={"model": "tiny", "input": "x"})
        engine.facts = engine.facts._replace(embeds=True)
        assert (other.status_code, other.json()["error"]["code"]) == (400, "unsupported_by_backend")

    run(check)


def test_a_text_without_numbers_for_logits_has_no_embedding(fragile_checkpoint: Path) -> None:
    async def check() -> None:
        async with replica_client(fragile_checkpoint) as (http, _):
            answer = await http.post("/v1/embeddings", json={"model": "tiny", "input": [1] * 125})
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")

    asyncio.run(check())


@pytest.mark.more
def test_a_text_may_go_without_the_token_before_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json().decode())
    backend.add_special_tokens(["<s>"])
    bos = "<s>", backend.token_to_id("<s>")
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[bos]
    )
    with_bos = Tokenizer(json.loads(backend.to_str()))
    folder = write_model(tmp_path / "step-1", lively_model(with_bos), with_bos)

    async def scenario() -> None:
        async with replica_client(folder) as (http, _):
            for fields, expected in (
                ({}, with_bos.encode_whole(TEXT)),
                ({"add_special_tokens": None}, with_bos.encode_whole(TEXT)),
                ({"add_special_tokens": False}, with_bos.encode(TEXT)),
            ):
                [choice] = await choices(http, return_token_ids=True, **fields)
                assert choice["prompt_token_ids"] == expected
                embedded = await post(
                    http, "/v1/embeddings", {"model": "tiny", "input": TEXT}, **fields
                )
                assert embedded["usage"]["prompt_tokens"] == len(expected)

    asyncio.run(scenario())

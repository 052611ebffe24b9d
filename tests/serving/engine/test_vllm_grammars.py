"""Answers that follow a schema on vLLM, by the same requests as on our engine: each that ends
validates, whatever shares its steps, and what no answer can follow is refused."""

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from cluster.settings.serve import ServeConfig
from model.generation.generate import generate
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from model.text.chat_format import ChatFormat
from model.text.tokenizer import Tokenizer
from serving.delivery.versions import Versions
from tests.serving.endpoint_parts import Run, shared_replica
from tests.serving.responses.response_types import checked, said, streamed
from tests.serving.structured.schema_cases import ENFORCED, REFUSED, closed
from tests.serving.tiny_models import lively_model, write_model
from tests.serving.tools.templates import HERMES_TEMPLATE
from tests.serving.vllm_parts import installed, vllm_config

pytestmark = [installed, pytest.mark.slow]

SCHEMA = closed(
    {"size": {"enum": ["small", "large"]}, "count": {"type": "integer", "minimum": 1, "maximum": 9}}
)
BY_SCHEMA = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "time"}},
]
GREEDY = SamplingParams(temperature=0.0)
NUM_SEQS = 12  # whose answers, of two blocks and more, the cache has no room for at once


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    return lively_model(tokenizer, n_embd=128, n_positions=1024, spread=0.2, seed=5)


@pytest.fixture(scope="module")
def run(
    model: GPT, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Run]:
    chat = ChatFormat(HERMES_TEMPLATE, "", tokenizer.end_of_text)
    with_chat = Tokenizer.from_json(tokenizer.to_json(), chat)
    folder = write_model(tmp_path_factory.mktemp("vllm") / "step-1", model, with_chat)
    engine = vllm_config(max_num_seqs=NUM_SEQS)
    with shared_replica(folder, config=ServeConfig(engine=engine)) as run:
        yield run


@pytest.fixture(scope="module")
def closing(tokenizer: Tokenizer) -> dict[str, float]:
    """Biases by which a random model comes to an end."""
    ids = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) in b'"}]']
    return {str(token_id): 8.0 for token_id in (*ids, tokenizer.eot_id)}


async def post(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    asked = {"model": "tiny", "prompt": "the fox", "max_tokens": 300, "seed": 3} | fields
    return await http.post("/v1/completions", json=asked)


async def chat(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "the fox"}]
    asked = {"model": "tiny", "messages": messages, "max_tokens": 300, "seed": 3} | fields
    return await http.post("/v1/chat/completions", json=asked)


async def texts(http: httpx.AsyncClient, **fields: Any) -> list[tuple[str, str]]:
    answer = await post(http, **fields)
    assert answer.status_code == 200, answer.text
    return [(choice["text"], choice["finish_reason"]) for choice in answer.json()["choices"]]


def validate(text: str, reason: str) -> None:
    assert reason == "stop", text
    jsonschema.validate(json.loads(text), SCHEMA)


def test_choices_streams_and_greedy_answers_follow_their_schema(run: Run) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        whole = await texts(http, **BY_SCHEMA, n=3)
        for text, reason in whole:
            validate(text, reason)
        assert len({text for text, _ in whole}) > 1
        [alone] = await texts(http, **BY_SCHEMA)
        assert [alone] == await texts(http, **BY_SCHEMA)  # by its seed
        streamed = await post(http, **BY_SCHEMA, stream=True)
        parts = [json.loads(p.removeprefix("data: ")) for p in streamed.text.split("\n\n")[:-2]]
        assert "".join(part["choices"][0]["text"] for part in parts) == alone[0]
        for fields in ({"temperature": 0}, {"frequency_penalty": 2, "min_p": 0.2, "top_k": 5}):
            [(text, reason)] = await texts(http, **BY_SCHEMA, **fields)
            validate(text, reason)
        answer = await chat(http, **BY_SCHEMA)
        [choice] = answer.json()["choices"]
        validate(choice["message"]["content"], choice["finish_reason"])

    run(check)


def test_every_finished_answer_validates(run: Run, closing: dict[str, float]) -> None:
    def asked(schema: dict[str, Any]) -> dict[str, Any]:
        return {"structured_outputs": {"json": schema}, "logit_bias": closing}

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        schemas = [*ENFORCED.values()]
        asking = [texts(http, **asked(schema), seed=n) for n, schema in enumerate(schemas)]
        num_ended = 0
        for schema, [(text, reason)] in zip(schemas, await asyncio.gather(*asking), strict=True):
            if reason == "stop":
                num_ended += 1
                jsonschema.Draft202012Validator(schema).validate(json.loads(text))
        assert num_ended >= len(ENFORCED) * 3 // 4

    run(check)


def test_those_without_a_grammar_are_the_models_beside_those_with_one(
    run: Run, model: GPT, tokenizer: Tokenizer
) -> None:
    prompt = tokenizer.encode("the quick")
    text = tokenizer.decode(
        generate(model, prompt, max_tokens=40, params=GREEDY, eos_id=tokenizer.eot_id)
    )

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        free = {"prompt": "the quick", "max_tokens": 40, "temperature": 0}
        asked = [
            texts(http, **(free if number % 2 else {**BY_SCHEMA, "seed": number}))
            for number in range(2 * NUM_SEQS)
        ]
        for number, [(found, reason)] in enumerate(await asyncio.gather(*asked)):
            if number % 2:
                assert found == text
            else:
                validate(found, reason)

    run(check)


def test_an_answer_that_was_put_back_goes_on_where_it_was(run: Run) -> None:
    """The cache has no room for all, so that vLLM computes some of them a second time."""

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        before = await num_preemptions(http)
        pattern = "(ab|cd){150}[0-9]"
        asked = {"structured_outputs": {"regex": pattern}, "max_tokens": 400}
        answers = await asyncio.gather(
            *(texts(http, **asked, seed=seed) for seed in range(NUM_SEQS))
        )
        for [(text, reason)] in answers:
            assert reason == "stop" and re.fullmatch(pattern, text), text
        assert await num_preemptions(http) > before

    async def num_preemptions(http: httpx.AsyncClient) -> float:
        await http.get("/metrics")  # which asks vLLM for its own
        await asyncio.sleep(1)
        shown = (await http.get("/metrics")).text
        [number] = re.findall(r"vllm:num_preemptions_total\{.*\} (.*)", shown)
        return float(number)

    run(check)


def test_a_seed_draws_the_same_after_a_prompt_in_several_steps_as_in_one(
    run: Run, model: GPT
) -> None:
    prompt = [7 * k % model.config.vocab_size for k in range(500)]

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        read_in_steps = await texts(http, prompt=prompt, max_tokens=30)
        # Now but for its last block in the cache
        assert await texts(http, prompt=prompt, max_tokens=30) == read_in_steps

    run(check)


def test_choices_expressions_and_grammars_are_followed(run: Run) -> None:
    cases = [
        ({"choice": ["left", "right"]}, "left|right"),
        ({"regex": "[ab]{4}é"}, "[ab]{4}é"),
        ({"grammar": 'root ::= "x" [0-9]'}, "x[0-9]"),
        (
            {"json": closed({"a": {"type": "null"}})},
            r'\{"a"(\n {0,32}| )?:(\n {0,32}| )?null\}',
        ),
    ]

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        for structured, expected in cases:
            asked = [texts(http, structured_outputs=structured, seed=n) for n in range(NUM_SEQS)]
            for [(text, reason)] in await asyncio.gather(*asked):
                assert reason == "stop" and re.fullmatch(expected, text), text
        answer = await post(http, structured_outputs={"choice": ["yes", "no"]}, logprobs=5)
        logprobs = answer.json()["choices"][0]["logprobs"]
        assert set(logprobs["top_logprobs"][0]) == {"y", "n"}
        assert all(value <= 0 for value in logprobs["token_logprobs"])

    run(check)


def test_tools_are_called_by_their_schemas(run: Run) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        named = {"type": "function", "function": {"name": "weather"}}
        alone = {"tools": TOOLS, "parallel_tool_calls": False, "n": 3}
        for choice in ("required", named):
            answer = await chat(http, **alone, tool_choice=choice)
            assert answer.status_code == 200, answer.text
            for called in answer.json()["choices"]:
                [call] = called["message"]["tool_calls"]
                assert called["finish_reason"] == "tool_calls"
                arguments = json.loads(call["function"]["arguments"])
                if call["function"]["name"] == "weather":
                    jsonschema.validate(arguments, SCHEMA)
                else:
                    assert choice == "required" and arguments == {}
        free = await chat(http, tools=TOOLS, tool_choice="auto", max_tokens=20)
        [answered] = free.json()["choices"]
        assert answered["finish_reason"] in ("stop", "length") and answered["message"]["content"]

    run(check)


def test_with_tools_and_a_schema_an_answer_is_a_call_or_follows_it(
    run: Run, closing: dict[str, float], tokenizer: Tokenizer
) -> None:
    [opens_call], [opens_text] = tokenizer.encode("<"), tokenizer.encode("{")

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        asked = {"tools": TOOLS, "parallel_tool_calls": False, "n": 3, **BY_SCHEMA}
        for token_id in (opens_call, opens_text):
            biases = closing | {str(token_id): 20.0}
            answer = await chat(http, **asked, logit_bias=biases)
            assert answer.status_code == 200, answer.text
            for choice in answer.json()["choices"]:
                message = choice["message"]
                if token_id == opens_text:
                    validate(message["content"], choice["finish_reason"])
                    continue
                [call] = message["tool_calls"]
                assert choice["finish_reason"] == "tool_calls" and message["content"] is None
                is_weather = call["function"]["name"] == "weather"
                arguments = json.loads(call["function"]["arguments"])
                jsonschema.validate(arguments, SCHEMA if is_weather else {"maxProperties": 0})

    run(check)


def test_responses_are_answered_streamed_and_call_tools(run: Run) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        schema = {"type": "json_schema", "name": "a", "schema": SCHEMA}
        tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
        for fields in (
            {"temperature": 0, "max_output_tokens": 20},
            {"text": {"format": schema}},
            {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False},
        ):
            asked = {"model": "tiny", "input": "the fox", "seed": 3, "max_output_tokens": 300}
            whole = await http.post("/v1/responses", json=asked | fields)
            assert whole.status_code == 200, whole.text
            stream = await http.post("/v1/responses", json=asked | fields | {"stream": True})
            assert said(streamed(stream.text)) == said(checked(whole.json()))

    run(check)


def test_what_no_answer_can_follow_is_refused_by_the_engines_library(run: Run) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        for schema in REFUSED.values():
            refused = await post(http, structured_outputs={"json": closed({"a": schema})})
            error = refused.json()["error"]
            assert (refused.status_code, error["code"]) == (400, "invalid_schema")
            assert " at #/properties/a" in error["message"]

    run(check)


def test_a_grammar_that_becomes_too_costly_ends_its_own_answer(
    run: Run, tokenizer: Tokenizer
) -> None:
    grammar = "start: a\na: a a | a a a | a a a a | /[a-z]/ | /[a-m]/ | /[k-z]/"
    costly = {
        "structured_outputs": {"grammar": grammar},
        "logit_bias": {str(tokenizer.eot_id): -100},
    }

    async def check(http: httpx.AsyncClient, versions: Versions) -> None:
        ended, [(text, reason)] = await asyncio.gather(
            post(http, **costly), texts(http, **BY_SCHEMA)
        )
        assert (ended.status_code, ended.json()["error"]["code"]) == (400, "grammar_exceeded")
        validate(text, reason)
        streamed = await post(http, **costly, stream=True)
        *_, last = streamed.text.strip().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "grammar_exceeded"
        assert versions.live.engine.num_failed_sequences == 0

    run(check)

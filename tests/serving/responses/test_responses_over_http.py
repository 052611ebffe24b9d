"""OpenAI's client asks a replica without Ray for responses: the same text as a chat, streamed or not,
with tools, schemas and errors."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage
from pydantic import BaseModel, ConfigDict, Field

from cluster.settings.serve import EngineConfig, ServeConfig
from model.text.chat_format import ChatFormat
from model.text.tokenizer import Tokenizer
from serving.api.access import AccessRules
from serving.api.keys import ApiKey
from serving.delivery.versions import Versions
from tests.serving.endpoint_parts import loopback_server, replica_app
from tests.serving.responses.response_types import checked, said, streamed
from tests.serving.tiny_models import lively_model, write_model
from tests.serving.tools.templates import HERMES_TEMPLATE
from tests.time_limits import limit_s
from tests.waiting import wait_in_loop_until

KEYS = (ApiKey.read("sk-test"), ApiKey.read("sk-small tokens_per_minute=1000"))
ASKED: dict[str, Any] = {"model": "tiny", "input": "the quick", "temperature": 0}
LIMITED = ASKED | {"max_output_tokens": 12}


class Weather(BaseModel):
    """The weather of a city."""

    model_config = ConfigDict(extra="forbid")
    city: Literal["Wien", "Graz"]
    days: int = Field(ge=1, le=7)


TOOL = {"type": "function", "name": "Weather", "parameters": Weather.model_json_schema()}
CALLING = ASKED | {"tools": [TOOL], "tool_choice": "required", "max_output_tokens": 300}


class Client:
    """OpenAI's client, and a plain one, of one replica."""

    def __init__(self, url: str, versions: Versions) -> None:
        self.openai = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="sk-test", max_retries=0)
        headers = {"Authorization": "Bearer sk-test"}
        self.http = httpx.AsyncClient(base_url=url, headers=headers, timeout=limit_s(60))
        self.versions = versions

    async def whole(self, **fields: Any) -> dict[str, Any]:
        answer = await self.http.post("/v1/responses", json=fields)
        assert answer.status_code == 200, answer.text
        return checked(answer.json())

    async def stream(self, **fields: Any) -> str:
        answer = await self.http.post("/v1/responses", json=fields | {"stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        return answer.text

    async def chat(self, **fields: Any) -> dict[str, Any]:
        answer = await self.http.post("/v1/chat/completions", json=fields)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())


@asynccontextmanager
async def client_of(folder: Path) -> AsyncIterator[Client]:
    config = ServeConfig(engine=EngineConfig(prefix_cache_scope="key"))
    access = AccessRules(KEYS)
    async with (
        replica_app(folder, name="tiny", config=config, access=access) as (app, versions),
        loopback_server(app) as url,
    ):
        client = Client(url, versions)
        async with client.openai, client.http:
            yield client


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    chat = ChatFormat(HERMES_TEMPLATE, "", tokenizer.end_of_text)
    talking = Tokenizer.from_json(tokenizer.to_json(), chat)
    model = lively_model(tokenizer, n_positions=1024)
    return write_model(tmp_path_factory.mktemp("talking") / "step-1", model, talking)


Run = Callable[[Callable[[Client], Coroutine[Any, Any, None]]], None]


@pytest.fixture(scope="module")
def run(folder: Path) -> Iterator[Run]:
    with asyncio.Runner() as runner:
        context = client_of(folder)
        client = runner.run(context.__aenter__())
        yield lambda check: runner.run(check(client))
        runner.run(context.__aexit__(None, None, None))


def test_an_answer_is_that_of_the_chat(run: Run) -> None:
    async def check(client: Client) -> None:
        response = await client.openai.responses.create(
            **LIMITED, instructions="Be brief.", metadata={"a": "b"}, user="u"
        )
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "the quick"},
        ]
        chat = await client.chat(model="tiny", messages=messages, temperature=0, max_tokens=12)
        assert response.output_text == chat["choices"][0]["message"]["content"]
        assert response.usage is not None
        usage = (response.usage.input_tokens, response.usage.output_tokens)
        assert usage == (chat["usage"]["prompt_tokens"], chat["usage"]["completion_tokens"])
        assert response.status == "incomplete" and response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
        assert (response.instructions, response.metadata) == ("Be brief.", {"a": "b"})
        again = await client.openai.responses.create(**LIMITED, instructions="Be brief.")
        assert again.usage is not None and again.usage.input_tokens_details.cached_tokens > 0

        asked = LIMITED | {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
        scored = await client.openai.responses.create(**asked, extra_body={"ignore_eos": True})
        [message] = scored.output
        assert isinstance(message, ResponseOutputMessage) and message.content[0].logprobs
        assert len(message.content[0].logprobs) == 12
        assert all(len(entry.top_logprobs) == 2 for entry in message.content[0].logprobs)

    run(check)


def test_any_request_streams_what_its_whole_answer_has(run: Run) -> None:
    draw = random.Random(11)
    forms = ({"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "name": "w", "schema": TOOL["parameters"]})  # fmt: skip
    choices = ("auto", "none", "required", {"type": "function", "name": "Weather"})

    def fields() -> dict[str, Any]:
        optional = {
            "instructions": "the fox",
            "max_output_tokens": draw.choice([1, 7, 60]),
            "temperature": draw.choice([0, 1.5]),
            "stop": ["e", "fox"],
            "logit_bias": {str(draw.randrange(300)): 5},
            "top_logprobs": draw.randrange(4),
            "text": {"format": draw.choice(forms)},
            "parallel_tool_calls": draw.random() < 0.5,
            "reasoning": {"effort": "low"},
        }
        kept = {name: value for name, value in optional.items() if draw.random() < 0.4}
        if draw.random() < 0.4:
            kept |= {"tools": [TOOL], "tool_choice": draw.choice(choices)}
        asked = {"model": "tiny", "input": "naïve cafés", "seed": draw.randrange(99)}
        return asked | {"max_output_tokens": 80} | kept

    async def check(client: Client) -> None:
        async def same(asked: dict[str, Any]) -> str:
            whole, stream = await asyncio.gather(client.whole(**asked), client.stream(**asked))
            found = streamed(stream)
            assert said(found) == said(whole), asked
            assert found["status"] == whole["status"], asked
            assert found["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
            return str(whole["output"][0]["type"])

        kinds = await asyncio.gather(*(same(fields()) for _ in range(16)))
        assert {"message", "function_call"} == set(kinds)

    run(check)


def test_an_answer_is_parsed_into_a_pydantic_model(run: Run) -> None:
    async def check(client: Client) -> None:
        asked = ASKED | {"max_output_tokens": 200}
        parsed = await client.openai.responses.parse(**asked, text_format=Weather)
        assert isinstance(parsed.output_parsed, Weather) and parsed.status == "completed"
        async with client.openai.responses.stream(**asked, text_format=Weather) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert final.output_parsed == parsed.output_parsed
        assert kinds.count("response.output_text.delta") > 5
        assert kinds[-1] == "response.completed"

    run(check)


def test_a_call_goes_back_with_what_it_came_to(run: Run) -> None:
    async def check(client: Client) -> None:
        response = await client.openai.responses.parse(**CALLING, parallel_tool_calls=False)
        [call] = response.output
        assert isinstance(call, ResponseFunctionToolCall) and call.status == "completed"
        given = Weather.model_validate_json(call.arguments)
        stream = client.openai.responses.stream(**CALLING, parallel_tool_calls=False)
        async with stream as events:
            pieces = [
                event.delta
                async for event in events
                if event.type == "response.function_call_arguments.delta"
            ]
            final = await events.get_final_response()
        assert len(pieces) > 1 and json.loads("".join(pieces)) == given.model_dump()
        assert isinstance(final.output[0], ResponseFunctionToolCall)

        result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        history: list[Any] = [{"role": "user", "content": "the quick"}, *response.output, result]
        after = await client.openai.responses.create(**LIMITED | {"input": history})
        function = {"name": "Weather", "arguments": call.arguments}
        called = {"id": call.call_id, "type": "function", "function": function}
        chat = await client.chat(
            model="tiny",
            temperature=0,
            max_tokens=12,
            messages=[
                {"role": "user", "content": "the quick"},
                {"role": "assistant", "content": None, "tool_calls": [called]},
                {"role": "tool", "tool_call_id": call.call_id, "content": "rain"},
            ],
        )
        assert after.output_text == chat["choices"][0]["message"]["content"]
        assert after.usage is not None
        assert after.usage.input_tokens == chat["usage"]["prompt_tokens"]

    run(check)


def test_what_cannot_be_done_is_refused_in_the_clients_own_errors(run: Run) -> None:
    async def check(client: Client) -> None:
        async def refused(status: int, **fields: Any) -> dict[str, Any]:
            answer = await client.http.post("/v1/responses", json=ASKED | fields)
            assert answer.status_code == status, answer.text
            return dict(answer.json()["error"])

        with pytest.raises(openai.BadRequestError, match="send the earlier items") as error:
            await client.openai.responses.create(**ASKED, previous_response_id="resp_1")
        assert error.value.param == "previous_response_id"
        with pytest.raises(openai.BadRequestError, match="no tool web_search"):
            await client.openai.responses.create(**ASKED, tools=[{"type": "web_search"}])
        with pytest.raises(openai.NotFoundError, match="stores no responses"):
            await client.openai.responses.retrieve("resp_1")
        with pytest.raises(openai.NotFoundError, match="stores no responses"):
            await client.openai.responses.cancel("resp_1")
        with pytest.raises(openai.NotFoundError, match="stores no responses"):
            await client.openai.responses.delete("resp_1")
        with pytest.raises(openai.NotFoundError, match="model 'other' does not exist"):
            await client.openai.responses.create(model="other", input="x", stream=True)
        long = await refused(400, input="the quick " * 2000)
        assert long["code"] == "context_length_exceeded" and long["param"] == "input"
        assert " in input, " in long["message"] and " in max_output_tokens)" in long["message"]
        schema = {"type": "json_schema", "name": "x", "schema": {"not": {}}}
        wrong = await refused(400, text={"format": schema})
        assert (
            wrong["param"] == "text.format" and "text.format cannot be enforced" in wrong["message"]
        )
        tool = TOOL | {"parameters": {"not": {}}, "strict": True}
        wrong = await refused(400, tools=[TOOL | {"name": "a"}, tool], tool_choice="required")
        assert wrong["param"] == "tools.1.parameters"

    run(check)


def test_a_failure_within_a_stream_is_raised_by_the_client(run: Run, tokenizer: Tokenizer) -> None:
    """A grammar that becomes too costly while the answer follows it."""

    async def check(client: Client) -> None:
        grammar = "start: a\na: a a | a a a | a a a a | /[a-z]/ | /[a-m]/ | /[k-z]/"
        more = {
            "structured_outputs": {"grammar": grammar},
            "logit_bias": {str(tokenizer.eot_id): -100},
        }
        asked = ASKED | {"extra_body": more}
        kinds = list[str]()
        with pytest.raises(openai.APIError) as error:
            async for event in await client.openai.responses.create(**asked, stream=True):
                kinds.append(event.type)
        assert error.value.code == "grammar_exceeded" and kinds[-1] == "response.failed"

    run(check)


def test_a_client_that_leaves_ends_its_answer(run: Run) -> None:
    async def check(client: Client) -> None:
        engine = client.versions.live.engine
        endless = ASKED | {"ignore_eos": True, "max_output_tokens": 900}
        async with client.http.stream(
            "POST", "/v1/responses", json=endless | {"stream": True}
        ) as answer:
            async for line in answer.aiter_lines():
                if "output_text.delta" in line:
                    break
            assert engine.num_open_sequences == 1
        await wait_in_loop_until(lambda: engine.num_open_sequences == 0)

    run(check)


def test_a_keys_limits_hold_for_responses_too(run: Run) -> None:
    async def check(client: Client) -> None:
        async def ask(key: str, **fields: Any) -> tuple[int, dict[str, Any]]:
            headers = {"Authorization": f"Bearer {key}"}
            answer = await client.http.post("/v1/responses", json=ASKED | fields, headers=headers)
            return answer.status_code, answer.json()

        status, _ = await ask("sk-small", max_output_tokens=900, ignore_eos=True)
        assert status == 200
        status, refusal = await ask("sk-small", max_output_tokens=900)
        assert (status, refusal["error"]["code"]) == (429, "rate_limit_exceeded")
        assert "max_output_tokens" in refusal["error"]["message"]
        status, refusal = await ask("sk-stranger")
        assert (status, refusal["error"]["code"]) == (401, "invalid_api_key")
        serving = client.versions.delivery
        client.versions.delivery = serving.model_copy(update={"draining": True})
        status, refusal = await ask("sk-test")
        client.versions.delivery = serving
        assert (status, refusal["error"]["code"]) == (503, "draining")

    run(check)

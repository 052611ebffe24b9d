"""Schemas and tools on a real endpoint with two replicas, asked by OpenAI's client; a replica dies
meanwhile."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import psutil
import pytest

from cluster.settings.serve import EngineConfig, ReplicaConfig, ServeConfig
from model.config import GPTConfig
from model.gpt import GPT
from model.text.chat_format import ChatFormat
from model.text.tokenizer import Tokenizer
from tests.serving.endpoint_parts import Endpoints, children_with
from tests.serving.structured.schema_cases import closed
from tests.serving.tiny_models import write_model
from tests.serving.tools.templates import HERMES_TEMPLATE
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

MODEL = "tiny"
NUM_ASKED = 16
SCHEMA = closed(
    {
        "city": {"enum": ["Wien", "Graz", "Linz"]},
        "codes": {
            "type": "array",
            "items": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
            "minItems": 12,
            "maxItems": 12,
        },
    }
)
FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
}
TOOLS = [{"type": "function", "function": {"name": "note", "parameters": SCHEMA}}]
MESSAGES = [{"role": "user", "content": "fox"}]


@pytest.fixture(scope="module")
def chat_checkpoint(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that takes tools, slow enough that a replica can die while it answers."""
    shape = {"n_positions": 2048, "n_layer": 6, "n_head": 8, "n_embd": 512}
    gpt = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, initializer_range=0.3, **shape))
    gpt.init_weights(3)
    chat = ChatFormat(HERMES_TEMPLATE, "", tokenizer.end_of_text)
    folder = tmp_path_factory.mktemp("checkpoints") / "hermes"
    return write_model(folder, gpt.eval(), Tokenizer.from_json(tokenizer.to_json(), chat))


@pytest.fixture(scope="module")
def url(endpoints: Endpoints, chat_checkpoint: Path) -> str:
    config = ServeConfig(
        checkpoint=str(chat_checkpoint),
        model_name=MODEL,
        replicas=ReplicaConfig(min_replicas=2, max_replicas=2),
        engine=EngineConfig(max_num_seqs=8),
    )
    return str(endpoints.deployed(config)["url"])


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", timeout=limit_s(120), max_retries=0
    ) as client:
        yield client


def validated(text: str | None) -> Any:
    answer = json.loads(text or "")
    jsonschema.Draft202012Validator(SCHEMA).validate(answer)
    return answer


def test_streamed_choices_validate_and_are_those_of_a_whole_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "n": 2, "seed": 5}
    asked |= {"response_format": FORMAT, "max_tokens": 900}
    whole = client.chat.completions.create(**asked)
    texts = ["", ""]
    reasons = ["", ""]
    for part in client.chat.completions.create(**asked, stream=True):
        [choice] = part.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert reasons == ["stop", "stop"]
    assert texts == [choice.message.content for choice in whole.choices]
    first, second = map(validated, texts)
    assert first != second


def test_a_required_tool_is_called_by_its_schema_in_a_stream(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "seed": 2, "tools": TOOLS}
    asked |= {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 900}
    [choice] = client.chat.completions.create(**asked).choices
    [call] = choice.message.tool_calls or []
    assert choice.finish_reason == "tool_calls" and call.function.name == "note"
    validated(call.function.arguments)
    name, arguments, num_pieces = "", "", 0
    for part in client.chat.completions.create(**asked, stream=True):
        for piece in part.choices[0].delta.tool_calls or []:
            assert piece.function is not None
            name += piece.function.name or ""
            arguments += piece.function.arguments or ""
            num_pieces += 1
    assert (name, arguments) == ("note", call.function.arguments) and num_pieces > 10
    result = {"role": "tool", "tool_call_id": call.id, "content": "noted"}
    history = [*MESSAGES, choice.message.model_dump(exclude_none=True), result]
    later = client.chat.completions.create(**asked | {"messages": history, "tool_choice": "auto"})
    assert later.choices[0].finish_reason in ("stop", "length")


def test_what_a_killed_replica_was_answering_is_the_same_from_the_other(
    url: str, client: openai.OpenAI, chat_checkpoint: Path
) -> None:
    def asked(seed: int) -> dict[str, Any]:
        return {
            "model": MODEL,
            "messages": MESSAGES,
            "seed": seed,
            "response_format": FORMAT,
            "max_tokens": 900,
        }

    undisturbed = [
        client.chat.completions.create(**asked(seed)).choices[0].message.content
        for seed in range(NUM_ASKED)
    ]

    async def with_a_kill() -> list[str | None]:
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", timeout=limit_s(120), max_retries=0
        ) as several:
            waiting = [
                asyncio.create_task(several.chat.completions.create(**asked(seed)))
                for seed in range(NUM_ASKED)
            ]
            await asyncio.sleep(0.5)
            assert not all(task.done() for task in waiting)
            replicas_of(chat_checkpoint)[0].kill()
            answers = await asyncio.gather(*waiting)
        return [answer.choices[0].message.content for answer in answers]

    wait_until(lambda: len(replicas_of(chat_checkpoint)) == 2, timeout_s=60)
    answers = asyncio.run(with_a_kill())
    assert answers == undisturbed
    assert len({str(validated(answer)) for answer in answers}) == NUM_ASKED


def replicas_of(checkpoint: Path) -> list[psutil.Process]:
    """Each is the parent of its engine process."""
    parents = [
        engine.parent()
        for engine in children_with("serving.engine_process.run_engine")
        if json.dumps(str(checkpoint)) in " ".join(engine.cmdline())
    ]
    return [parent for parent in parents if parent is not None]

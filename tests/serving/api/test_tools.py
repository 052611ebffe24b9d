"""Tools over HTTP, on a replica without Ray: offered by the chat template, called in its format,
and refused where the template takes none."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import tokenizers

from model.config import GPTConfig
from model.gpt import GPT
from model.text.chat_format import ChatFormat
from model.text.tokenizer import Tokenizer
from serving.api.chat import ChatAnswer
from serving.delivery.versions import Versions
from serving.engine.messages import FinishReason
from serving.output.choice_output import ChoicePart
from serving.protocol.served_model import read_served_model
from serving.protocol.tool_fields import Tool
from tests.serving.endpoint_parts import Run, shared_replica
from tests.serving.structured.schema_cases import closed
from tests.serving.tiny_models import write_model
from tests.serving.tools.templates import (
    HERMES_TEMPLATE,
    LLAMA_TEMPLATE,
    MISTRAL_TEMPLATE,
    QWEN_CODER_TEMPLATE,
    UNKNOWN_FORMAT,
)

WEATHER = closed(
    {"city": {"enum": ["Wien", "Graz"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}}
)
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Looks.", "parameters": WEATHER},
    },
    {"type": "function", "function": {"name": "time"}},
]
USER = {"role": "user", "content": "the fox <|endoftext|>"}
HISTORY = [
    USER,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {
                    "name": "weather",
                    "arguments": '{"city": "Wien", "days": 2}',
                    "parsed_arguments": {"city": "Wien", "days": 2},
                },
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
]


def folder_of(tokenizer: Tokenizer, template: str | None, folder: Path) -> Path:
    """A random model with a chat template, and room for long conversations."""
    shape = {"n_positions": 1024, "n_layer": 1, "n_head": 2, "n_embd": 32}
    gpt = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, initializer_range=0.3, **shape))
    gpt.init_weights(3)
    chat = None if template is None else ChatFormat(template, "", tokenizer.end_of_text)
    return write_model(folder, gpt.eval(), Tokenizer.from_json(tokenizer.to_json(), chat))


def allowed(mode: str, *names: str) -> dict[str, Any]:
    """A choice among these tools."""
    named = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}


@pytest.fixture(scope="module")
def hermes(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("checkpoints") / "hermes"
    return folder_of(tokenizer, HERMES_TEMPLATE, place)


@pytest.fixture(scope="module")
def run(hermes: Path) -> Iterator[Run]:
    with shared_replica(hermes) as run:
        yield run


async def ask(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    asked = {"model": "tiny", "messages": [USER], "seed": 1, "max_tokens": 300, "tools": TOOLS}
    return await http.post("/v1/chat/completions", json=asked | fields)


async def choices(http: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    answer = await ask(http, **fields)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"])


def called(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    """The names and arguments of a choice's calls, which are right."""
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls" and message["content"] is None
    calls = message["tool_calls"]
    assert len({call["id"] for call in calls}) == len(calls)
    assert all(call["type"] == "function" and call["id"].startswith("call_") for call in calls)
    read = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]
    for name, arguments in read:
        assert name in ("weather", "time")
        jsonschema.validate(arguments, WEATHER if name == "weather" else {"maxProperties": 0})
    return read


@pytest.fixture(scope="module")
def ending(tokenizer: Tokenizer) -> dict[str, float]:
    """A bias by which a random model ends its answer where it may."""
    return {str(tokenizer.eot_id): 8.0}


def test_required_and_named_tools_are_called_by_their_schemas(
    run: Run, ending: dict[str, float]
) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        alone = {"tool_choice": "required", "parallel_tool_calls": False}
        for choice in await choices(http, **alone, n=4):
            assert len(called(choice)) == 1
        for choice in await choices(http, tool_choice="required", n=4, logit_bias=ending):
            assert called(choice)
        for name in ("weather", "time"):
            named = {"type": "function", "function": {"name": name}}
            for choice in await choices(http, tool_choice=named, n=2):
                assert [called_name for called_name, _ in called(choice)] == [name]

    run(check)


def test_streamed_calls_are_the_same_as_whole_ones(run: Run, ending: dict[str, float]) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        asked = {"tool_choice": "required", "n": 2, "logit_bias": ending, "tools": TOOLS[:1]}
        whole = await choices(http, **asked)
        streamed = await ask(http, **asked, stream=True)
        calls: list[dict[int, list[str]]] = [{}, {}]
        reasons = ["", ""]
        for line in streamed.text.split("\n\n")[:-2]:
            [part] = json.loads(line.removeprefix("data: "))["choices"]
            assert not part["delta"].get("content")
            for piece in part["delta"].get("tool_calls", []):
                call = calls[part["index"]].setdefault(piece["index"], [])
                assert ("id" in piece) == (not call), "the first piece has the id and the name"
                call.append(piece["function"].get("name", "") + piece["function"]["arguments"])
            reasons[part["index"]] = part["finish_reason"] or reasons[part["index"]]
        assert reasons == ["tool_calls", "tool_calls"]
        assert max(len(call) for some in calls for call in some.values()) > 3, "in pieces"
        for choice, pieces in zip(whole, calls, strict=True):
            expected = [
                c["function"]["name"] + c["function"]["arguments"]
                for c in choice["message"]["tool_calls"]
            ]
            assert ["".join(call) for call in pieces.values()] == expected

    run(check)


def test_a_free_choice_may_be_text_and_none_offers_nothing(run: Run) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        [choice] = await choices(http, max_tokens=5)
        assert choice["message"]["content"] and "tool_calls" not in choice["message"]
        assert choice["finish_reason"] in ("stop", "length")
        seen = {}
        for fields in ({}, {"tool_choice": "none"}, {"tools": []}):
            answer = (await ask(http, **fields, max_tokens=1, return_token_ids=True)).json()
            seen[json.dumps(fields)] = answer["prompt_token_ids"]
        offered, none, without = seen.values()
        assert none == without and len(offered) > len(none)

    run(check)


def test_of_allowed_tools_only_these_are_called_and_the_prompt_has_all(run: Run) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        for name in ("time", "weather"):
            alone = {"tool_choice": allowed("required", name), "parallel_tool_calls": False}
            for choice in await choices(http, **alone, n=4):
                assert [called_name for called_name, _ in called(choice)] == [name]
        asked = {"max_tokens": 1, "return_token_ids": True}
        prompts = [
            (await ask(http, **asked, **fields)).json()["prompt_token_ids"]
            for fields in ({}, {"tool_choice": allowed("auto", "time")})
        ]
        assert prompts[0] == prompts[1]

    run(check)


def test_earlier_calls_and_what_came_of_them_are_written_by_the_template(
    run: Run, tokenizer: Tokenizer
) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        asked = {"messages": HISTORY, "max_tokens": 1, "return_token_ids": True}
        ids = (await ask(http, **asked)).json()["prompt_token_ids"]
        text = tokenizer.decode(ids)
        assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Wien", "days": 2}}' in text
        assert text.endswith("<|tool|>rain<|assistant|>")
        assert '{"type": "function", "function": {"parameters": ' in text
        assert tokenizer.eot_id not in ids, "a special token's text in a message stays text"

    run(check)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "there are no tools"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "other"}}},
            "tool_choice",
            "not among the tools",
        ),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "several of the name weather"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "JSON by a schema only"),
        (
            {"response_format": {"type": "json_object"}, "min_tokens": 3},
            "min_tokens",
            "by which the answer ends",
        ),
        *(
            ({"tool_choice": choice}, "tool_choice", 'expected "auto", "none", "required"')
            for choice in (
                "any",
                7,
                [],
                {"type": "custom", "custom": {"name": "weather"}},
                {"type": "function", "function": {"name": "a b"}},
                {"type": "allowed_tools", "allowed_tools": {"mode": "none", "tools": []}},
                {"type": ["function"]},
            )
        ),
        ({"tool_choice": allowed("auto", "time", "other")}, "tool_choice", "names other"),
        ({"tool_choice": allowed("required", "time"), "ignore_eos": True}, "ignore_eos", "ends"),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos", "tool_choice"),
        ({"tool_choice": "required", "min_tokens": 3}, "min_tokens", "tool_choice"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0", "tool_call_id"),
        (
            {"messages": [USER | {"tool_calls": HISTORY[1]["tool_calls"]}]},
            "messages.0",
            "assistant's message only",
        ),
        (
            {
                "tool_choice": "required",
                "tools": [
                    TOOLS[1],
                    {
                        "type": "function",
                        "function": {
                            "name": "f",
                            "strict": True,
                            "parameters": closed({"a": {"not": {}}}),
                        },
                    },
                ],
            },
            "tools.1.function.parameters",
            "at #/properties/a cannot be enforced",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(
    run: Run, fields: dict[str, Any], param: str, words: str
) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        answer = await ask(http, **fields)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == param and words in error["message"]

    run(check)


@pytest.mark.parametrize(
    ("template", "words"),
    [(None, "no chat template that takes any"), (UNKNOWN_FORMAT, "in a format that is not read")],
)
def test_a_model_whose_template_takes_no_tools_refuses_them_in_one_sentence(
    template: str | None, words: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        for fields in ({}, {"tool_choice": "required"}):
            error = (await ask(http, **fields)).json()["error"]
            assert error["code"] == "tools_unsupported" and words in error["message"]
        kept = {"tools": [], "max_tokens": 2}
        history = await ask(http, messages=HISTORY, **kept)
        assert history.status_code == (400 if template is None else 200), history.text
        assert (await ask(http, **kept)).status_code == 200

    with shared_replica(folder_of(tokenizer, template, tmp_path / "m")) as run:
        run(check)


def test_a_model_that_chooses_to_call_is_read_in_its_format(
    hermes: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """By the answer's shape alone, since no random model writes a call by itself."""

    def part(text: str, reason: FinishReason | None) -> ChoicePart:
        return ChoicePart(0, text, None, reason, None, None, None, None)

    call = '{"name": "time", "KEY": {"zone": "7"}}'
    tagged = "<function=time>\n<parameter=zone>\n7\n</parameter>\n</function>"
    llama = folder_of(tokenizer, LLAMA_TEMPLATE, tmp_path / "llama")
    coder = folder_of(tokenizer, QWEN_CODER_TEMPLATE, tmp_path / "coder")
    zone = {"properties": {"zone": {"type": "string"}}}
    time = Tool.model_validate(
        {"type": "function", "function": {"name": "time", "parameters": zone}}
    )
    for folder, text in (
        (hermes, f"Let me see. <tool_call>\n{call.replace('KEY', 'arguments')}\n</tool_call>"),
        (llama, call.replace("KEY", "parameters")),
        (coder, f"<tool_call>\n{tagged}\n</tool_call>"),
    ):
        model = read_served_model(folder, name="m")
        answer = ChatAnswer(model, tools=[time])
        whole = answer.whole([part(text, FinishReason.STOP)], {})["choices"][0]
        [tool_call] = whole["message"]["tool_calls"]
        assert tool_call["function"] == {"name": "time", "arguments": '{"zone": "7"}'}
        assert whole["message"]["content"] == ("Let me see." if folder == hermes else None)
        assert whole["finish_reason"] == "tool_calls"
        plain = ChatAnswer(model).whole([part(text, FinishReason.STOP)], {})["choices"][0]
        assert plain["message"]["content"] == text and plain["finish_reason"] == "stop"
        other = Tool.model_validate({"type": "function", "function": {"name": "other"}})
        not_allowed = ChatAnswer(model, tools=[other], only_these=True)
        [left] = not_allowed.whole([part(text, FinishReason.STOP)], {})["choices"]
        assert left["message"]["content"].endswith(text[-40:]) and left["finish_reason"] == "stop"
        cut = ChatAnswer(model, tools=[time]).whole([part(text, FinishReason.LENGTH)], {})
        assert cut["choices"][0]["finish_reason"] == "length"


@pytest.mark.more
def test_a_mark_that_is_a_special_token_opens_calls_and_is_no_text(
    tokenizer: Tokenizer, ending: dict[str, float], tmp_path: Path
) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json().decode())
    backend.add_special_tokens(["[TOOL_CALLS]"])
    marked = Tokenizer.from_json(backend.to_str().encode())
    mark = marked.special_ids["[TOOL_CALLS]"]

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        asked = {"tool_choice": "required", "return_token_ids": True, "logit_bias": ending}
        for choice in await choices(http, **asked, n=3):
            message = choice["message"]
            assert choice["finish_reason"] == "tool_calls" and message["content"] is None
            assert choice["token_ids"][0] == mark
            for call in message["tool_calls"]:
                assert len(call["id"]) == 9 and call["function"]["name"] in ("weather", "time")
                json.loads(call["function"]["arguments"])

    with shared_replica(folder_of(marked, MISTRAL_TEMPLATE, tmp_path / "mistral")) as run:
        run(check)

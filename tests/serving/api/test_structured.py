"""Answers that follow a schema, on a replica without Ray: each that ends validates, and what no
answer can follow is refused with its place."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from model.text.tokenizer import Tokenizer
from serving.delivery.versions import Versions
from tests.serving.endpoint_parts import Run, shared_replica
from tests.serving.structured.schema_cases import ENFORCED, closed

SCHEMA = closed(
    {"size": {"enum": ["small", "large"]}, "count": {"type": "integer", "minimum": 1, "maximum": 9}}
)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


@pytest.fixture(scope="module")
def run(wide_checkpoint: Path) -> Iterator[Run]:
    with shared_replica(wide_checkpoint) as run:
        yield run


def by_schema(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema} | more,
        }
    }


async def post(
    http: httpx.AsyncClient, *, path: str = "/v1/completions", **fields: Any
) -> httpx.Response:
    prompt = (
        {"messages": [{"role": "user", "content": "the fox"}]}
        if path.endswith("chat/completions")
        else {"prompt": "the fox"}
    )
    asked = {"model": "tiny", "max_tokens": 120, "seed": 3} | prompt | fields
    return await http.post(path, json=asked)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["message"].isprintable() and len(error["message"]) < 500
    return error


async def texts(http: httpx.AsyncClient, **fields: Any) -> list[tuple[str, str]]:
    answer = await post(http, **fields)
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    return [
        (c["text"] if "text" in c else c["message"]["content"], c["finish_reason"]) for c in choices
    ]


def test_every_finished_answer_validates(run: Run, closing: dict[str, float]) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        asked = [
            texts(http, **by_schema(schema), logit_bias=closing, max_tokens=300, seed=number)
            for number, schema in enumerate(ENFORCED.values())
        ]
        answers = await asyncio.gather(*asked)
        num_ended = 0
        for schema, [(text, reason)] in zip(ENFORCED.values(), answers, strict=True):
            if reason == "stop":
                num_ended += 1
                jsonschema.Draft202012Validator(schema).validate(json.loads(text))
        assert num_ended >= len(ENFORCED) * 3 // 4

    run(check)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_choices_streams_and_seeds_give_the_same_answers(run: Run, path: str) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        asked = {"path": path, "n": 3, **by_schema(SCHEMA, strict=True)}
        whole = await texts(http, **asked)
        for text, reason in whole:
            assert reason == "stop"
            VALIDATOR.validate(json.loads(text))
        assert len({text for text, _ in whole}) > 1
        alone = {**asked, "n": 1}
        assert await texts(http, **alone) == whole[:1]
        streamed = await post(http, **asked, stream=True)
        pieces = ["", "", ""]
        for line in streamed.text.split("\n\n")[:-2]:
            [choice] = json.loads(line.removeprefix("data: "))["choices"]
            pieces[choice["index"]] += choice.get("text") or choice.get("delta", {}).get(
                "content", ""
            )
        assert pieces == [text for text, _ in whole]
        [(greedy, _)] = await texts(http, **alone | {"temperature": 0, "max_tokens": 400})
        VALIDATOR.validate(json.loads(greedy))

    run(check)


def test_whole_numbers_that_no_double_holds_arrive_as_they_are_written(run: Run) -> None:
    ids = [1234567890123456789, 1234567890123456790, -9007199254740993]
    schema = closed({"id": {"enum": ids}, "other": {"const": 9007199254740993}})

    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        for seed in range(4):
            [(text, reason)] = await texts(http, **by_schema(schema), seed=seed)
            answer = json.loads(text)
            assert reason == "stop" and answer["id"] in ids and answer["other"] == 9007199254740993
        grammar = f"start: %json {json.dumps({'enum': ids})}\n"
        [(text, _)] = await texts(http, structured_outputs={"grammar": grammar})
        assert json.loads(text) in ids

    run(check)


def test_vllms_fields_do_the_same(run: Run) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        schema = json.dumps(SCHEMA)
        by_text = await texts(http, structured_outputs={"json": schema})
        assert by_text == await texts(http, structured_outputs={"json": SCHEMA})
        assert by_text == await texts(http, **by_schema(SCHEMA))
        for structured, expected in (
            ({"regex": "[ab]{4}"}, lambda text: len(text) == 4 and set(text) <= {"a", "b"}),
            ({"choice": ["left", "right"]}, lambda text: text in ("left", "right")),
            ({"grammar": 'root ::= "x" [0-9]'}, lambda text: text[0] == "x" and text[1:].isdigit()),
        ):
            for seed in range(3):
                [(text, reason)] = await texts(http, structured_outputs=structured, seed=seed)
                assert reason == "stop" and expected(text), text

    run(check)


def test_logprobs_stops_and_limits_work_as_without(run: Run) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        answer = await post(http, structured_outputs={"choice": ["yes", "no"]}, logprobs=5)
        [choice] = answer.json()["choices"]
        assert set(choice["logprobs"]["top_logprobs"][0]) == {"y", "n"}
        assert all(value <= 0 for value in choice["logprobs"]["token_logprobs"])
        [(cut, reason)] = await texts(http, **by_schema(SCHEMA), max_tokens=5)
        assert reason == "length" and cut.startswith("{")
        [(stopped, reason)] = await texts(http, **by_schema(SCHEMA), stop='"count"')
        assert reason == "stop" and '"count"' not in stopped and '"size"' in stopped

    run(check)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        (by_schema(closed({"a": {"not": {}}})), "response_format", "at #/properties/a cannot be"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs", "look-around"),
        (
            by_schema(closed({"a": {"type": "integer", "minimum": (1 << 53) + 1}})),
            "response_format",
            "at #/properties/a/minimum cannot be enforced: minimum is 9007199254740993",
        ),
        (
            by_schema(closed({"a": {"type": "integer", "multipleOf": 999983}})),
            "response_format",
            "at #/properties/a cannot be enforced: multiples of 999983 take too long",
        ),
        (
            {"structured_outputs": {"json": '{"items":' * 33 + "{}" + "}" * 33}},
            "structured_outputs.json",
            "at most 32 levels",
        ),
        (
            by_schema(SCHEMA) | {"structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "response_format and structured_outputs",
        ),
        (by_schema(SCHEMA) | {"ignore_eos": True}, "ignore_eos", "with response_format"),
        (by_schema(SCHEMA) | {"min_tokens": 3}, "min_tokens", "with response_format"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            "structured_outputs",
            "exactly one of",
        ),
        ({"structured_outputs": {"json": "[1]"}}, "structured_outputs.json", "a JSON Schema"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", ""),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", ""),
        ({"response_format": {"type": "grammar"}}, "response_format.type", "json_object"),
        (
            {"structured_outputs": {"regex": "a" * (129 << 10)}},
            "structured_outputs",
            "at most 131072",
        ),
    ],
)
def test_what_contradicts_itself_or_cannot_be_enforced_is_refused_by_name(
    run: Run, fields: dict[str, Any], param: str, words: str
) -> None:
    async def check(http: httpx.AsyncClient, _: Versions) -> None:
        for path in ("/v1/completions", "/v1/chat/completions"):
            error = error_of(await post(http, path=path, **fields))
            assert error["param"] == param and words in error["message"], error

    run(check)


def test_an_answer_whose_grammar_becomes_too_costly_ends_with_an_error_and_no_self_test(
    run: Run, tokenizer: Tokenizer
) -> None:
    grammar = "start: a\na: a a | a a a | a a a a | /[a-z]/ | /[a-m]/ | /[k-z]/"
    asked = {
        "structured_outputs": {"grammar": grammar},
        "logit_bias": {str(tokenizer.eot_id): -100},
        "max_tokens": 300,
    }

    async def check(http: httpx.AsyncClient, versions: Versions) -> None:
        error = error_of(await post(http, **asked))
        assert error["code"] == "grammar_exceeded" and error["param"] == "structured_outputs"
        streamed = await post(http, **asked, stream=True)
        *_, last = streamed.text.strip().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "grammar_exceeded"
        assert versions.live.engine.num_failed_sequences == 0
        assert [reason for _, reason in await texts(http, max_tokens=3)] == ["length"]

    run(check)

"""What is wrong with a body is said in plain sentences, which name the field as the client wrote it."""

import json
import re
from typing import Any

import pytest

from serving.api.admin_routes import PromoteRequest
from serving.api.chat import ChatRequest
from serving.protocol.errors import ApiError
from serving.protocol.protocol import (
    CompletionRequest,
    EmbeddingRequest,
    TokenizeRequest,
    parse_request,
)
from serving.protocol.request import Request

MESSAGE = {"role": "user", "content": "x"}
WHOLE: dict[type[Request], dict[str, Any]] = {
    CompletionRequest: {"model": "m", "prompt": "x"},
    ChatRequest: {"model": "m", "messages": [MESSAGE]},
    EmbeddingRequest: {"model": "m", "input": "x"},
    TokenizeRequest: {"prompt": "x"},
    PromoteRequest: {"checkpoint": "x"},
}
TOOL = {"type": "function", "function": {"name": "f"}}
ODD_VALUES = [
    True, 0, -1, 2.5, 2**70, 1e308, "", "x", "x" * 5000, [], [[]], [1], ["x"], [{}], [MESSAGE] * 3000, {}, {"a": {}},
    {"type": "x"}, {"type": "json_schema"}, {"name": "a b"}, {"choice": [""]}, {"regex": ""}, {"1": "x"}, [TOOL] * 300,
    [{"role": "user"}], [{"role": "tool", "content": "x"}], [MESSAGE | {"name": "n" * 99}], [TOOL | {"type": 3}],
    [MESSAGE | {"tool_calls": [3]}], [{"type": "function", "function": {"name": "f", "parameters": 3}}],
]  # fmt: skip
FOREIGN_WORDS = re.compile(
    "Input|validation|valid (dict|int|list|str|bool)|instance|literal|dictionary|model_|pydantic|this value is not"
)


def refusal(kind: type[Request], **fields: Any) -> ApiError | None:
    try:
        parse_request(json.dumps(WHOLE[kind] | fields).encode(), kind)
    except ApiError as error:
        return error
    return None


@pytest.mark.parametrize("kind", WHOLE)
def test_no_odd_value_of_any_field__is_answered_with_words_of_the_parser(
    kind: type[Request],
) -> None:
    refusals = [refusal(kind, **{name: odd}) for name in kind.model_fields for odd in ODD_VALUES]
    messages = [error.message for error in refusals if error is not None]
    assert len(messages) > len(kind.model_fields) * len(ODD_VALUES) / 2
    assert [message for message in messages if FOREIGN_WORDS.search(message)] == []


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (ChatRequest, {"messages": [MESSAGE] * 2049}, "messages: expected a length of at most 2048, got 2049"),
        (ChatRequest, {"messages": [3]}, "messages.0: expected an object, got 3"),
        (ChatRequest, {"messages": [{"role": "user"}]}, "messages.0.content is missing"),
        (ChatRequest, {"tools": [TOOL | {"type": "x"}]}, 'tools.0.type: expected "function", got "x"'),
        (CompletionRequest, {"n": True}, "n: expected a whole number, got true"),
        (CompletionRequest, {"n": 0}, "n: expected at least 1, got 0"),
        (CompletionRequest, {"temperature": "warm"}, 'temperature: expected a number, got "warm"'),
        (CompletionRequest, {"user": "x" * 257}, "user: expected a length of at most 256 characters, got 257"),
        (CompletionRequest, {"stream_options": {"x": 1}}, "stream_options.x is not supported; leave it out"),
        (CompletionRequest, {"structured_outputs": {"json": 3}}, "structured_outputs.json: expected an object or a text, got 3"),
        (CompletionRequest, {"structured_outputs": {"json_object": False}}, "structured_outputs.json_object: expected true, got false"),
        (CompletionRequest, {"prompt": 3}, "prompt: expected a string, a list of strings, a list of token ids, or a list of such lists; none empty"),
    ],
)  # fmt: skip
def test_a_problem__is_a_sentence_with_the_field_and_the_value(
    kind: type[Request], fields: dict[str, Any], message: str
) -> None:
    error = refusal(kind, **fields)
    assert error is not None and error.status == 400
    assert (error.message, error.param) == (message, re.split("[: ]", message)[0])

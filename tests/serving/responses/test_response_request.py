"""Requests for responses as chats: the same conversation either way, or a refusal that says what to
do."""

import json
from typing import Any

import pytest

from serving.api.chat import MAX_MESSAGES, ChatRequest
from serving.protocol import harmless_fields
from serving.protocol.errors import ApiError, error_of
from serving.protocol.protocol import parse_request
from serving.responses.request import ResponseRequest, as_chat
from serving.responses.words import in_words_of_responses
from tests.serving.harmless_values import values

SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "default": None}}}
FUNCTION = {"name": "weather", "description": "Looks.", "parameters": SCHEMA, "strict": True}
CALL = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "W"}'}
ASSISTANT = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "status": "completed",
    "phase": None,
    "content": [
        {"type": "output_text", "text": "Let me ", "annotations": [], "logprobs": [], "parsed": 7},
        {"type": "output_text", "text": "see.", "annotations": [{"type": "url_citation"}]},
    ],
}


def read(**fields: Any) -> ResponseRequest:
    body = {"model": "tiny", "input": "hi"} | fields
    return parse_request(json.dumps(body).encode(), ResponseRequest)


def chat(**fields: Any) -> ChatRequest:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]} | fields
    return parse_request(json.dumps(body).encode(), ChatRequest)


def called(call_id: str) -> dict[str, Any]:
    function = {"name": "weather", "arguments": '{"city": "W"}'}
    return {"id": call_id, "type": "function", "function": function}


def test_items_are_the_messages_of_a_chat() -> None:
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "be "}, {"type": "input_text", "text": "brief"}]},
        {"type": "message", "role": "user", "content": "the weather?", "id": "x"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "abc"},
        ASSISTANT,
        CALL | {"id": "fc_1", "status": "completed", "parsed_arguments": {"city": "W"}},
        {"type": "reasoning", "id": "rs_2", "summary": []},
        CALL | {"call_id": "c2", "namespace": None, "caller": None, "async": False},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": " Wait."}]},
        {"type": "function_call_output", "call_id": "c1", "output": "rain", "id": None},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "sun"}]},
        {"role": "assistant", "content": "Rain, then sun."},
        {"role": "assistant", "content": "Really."},
        CALL | {"call_id": "c3"},
    ]  # fmt: skip
    messages = [
        {"role": "system", "content": "Speak."},
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "the weather?"},
        {
            "role": "assistant",
            "content": "Let me see. Wait.",
            "tool_calls": [called("c1"), called("c2")],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "tool", "tool_call_id": "c2", "content": "sun"},
        {"role": "assistant", "content": "Rain, then sun."},
        {"role": "assistant", "content": "Really.", "tool_calls": [called("c3")]},
    ]
    found = as_chat(read(input=items, instructions="Speak."))
    assert found.messages == chat(messages=messages).messages
    assert as_chat(read(input="hi", instructions="")).messages == chat().messages
    alone = as_chat(read(input=[CALL]))
    assert alone.messages == chat(messages=[{"role": "assistant", "tool_calls": [called("c1")]}]).messages  # fmt: skip


NAMED = {"type": "function", "name": "weather"}
NAMED_IN_CHAT = {"type": "function", "function": {"name": "weather"}}
TOOLS = {"tools": [{"type": "function", **FUNCTION, "defer_loading": None, "output_schema": {}}]}
TOOLS_IN_CHAT = {"tools": [{"type": "function", "function": FUNCTION}]}
SAME_IN_BOTH = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.1,
    "seed": 7,
    "stop": ["x"],
    "logit_bias": {"5": 1},
    "presence_penalty": 1,
    "frequency_penalty": 1,
    "repetition_penalty": 1.1,
    "stop_token_ids": [3],
    "user": "u",
    "structured_outputs": {"choice": ["a"]},
    "chat_template_kwargs": {"enable_thinking": False},
    "parallel_tool_calls": False,
    "raymill": {"receipt": True},
}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
FORMAT = {"name": "trip", "schema": SCHEMA, "strict": False, "description": "A trip."}
SAME = [
    (SAME_IN_BOTH, SAME_IN_BOTH),
    ({"ignore_eos": True, "min_tokens": 2}, {"ignore_eos": True, "min_tokens": 2}),
    ({"stream": True, "stream_options": {"include_obfuscation": False}}, STREAM),
    ({"max_output_tokens": 9}, {"max_completion_tokens": 9}),
    ({"max_output_tokens": None, "text": None, "store": None}, {}),
    ({"text": {"format": {"type": "text"}, "verbosity": "low"}}, {"response_format": {"type": "text"}}),
    ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
    (
        {"text": {"format": {"type": "json_schema", **FORMAT}}},
        {"response_format": {"type": "json_schema", "json_schema": FORMAT}},
    ),
    ({"reasoning": {"effort": "low", "summary": "auto"}}, {"reasoning_effort": "low"}),
    ({"reasoning": {"effort": None, "generate_summary": None}}, {}),
    (TOOLS, TOOLS_IN_CHAT),
    (TOOLS | {"tool_choice": "required"}, TOOLS_IN_CHAT | {"tool_choice": "required"}),
    (TOOLS | {"tool_choice": NAMED}, TOOLS_IN_CHAT | {"tool_choice": NAMED_IN_CHAT}),
    (
        TOOLS | {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [NAMED]}},
        TOOLS_IN_CHAT | {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED_IN_CHAT]}}},
    ),
    ({"include": ["message.output_text.logprobs"]}, {"logprobs": True}),
    ({"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
    ({"include": ["reasoning.encrypted_content"]}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "in_chat"), SAME)
def test_fields_are_those_of_a_chat(asked: dict[str, Any], in_chat: dict[str, Any]) -> None:
    expected = {"tool_choice": "auto"} | in_chat
    assert as_chat(read(**asked)) == chat(**expected)


@pytest.mark.parametrize("name", sorted(harmless_fields.RESPONSE_FIELDS))
def test_fields_that_change_nothing_are_accepted(name: str) -> None:
    for value in values(harmless_fields.RESPONSE_FIELDS, name):
        assert as_chat(read(**{name: value})) == as_chat(read())


MANY = [{"role": "user", "content": "x"}] * (MAX_MESSAGES + 1)
IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,xxxx"}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id", "send the earlier items again"),
    ({"conversation": {"id": "conv_1"}}, "conversation", "send the earlier items again"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt", "send instructions and input"),
    ({"background": True}, "background", "leave it out and wait, or stream"),
    ({"truncation": "auto"}, "truncation", "nothing is cut out of input"),
    ({"messages": []}, "messages", "Unknown field: messages"),
    ({"input": []}, "input", "at least one item"),
    ({"input": [{"type": "reasoning", "id": "r", "summary": []}]}, "input", "no reasoning"),
    ({"input": 7}, "input", "a text or a list of items"),
    ({"input": ["x"]}, "input.0", "expected an object"),
    ({"input": MANY}, "input", "at most 2048"),
    ({"input": [{"id": "msg_1"}]}, "input.0", "send the item itself"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "send the item itself"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input.0", "web_search_call are not supported"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role", "expected"),
    ({"input": [{"role": "user"}]}, "input.0.content", "is missing"),
    ({"input": [{"role": "user", "content": [IMAGE]}]}, "input.0.content", "text only.*input_image"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input.0.content", "under text"),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "x", "size": 3}]}]}, "input.0.content", "has no size"),
    ({"input": [{"role": "user", "content": "x", "weight": 3}]}, "input.0.weight", "leave it out"),
    ({"input": [CALL | {"call_id": None}]}, "input.0.call_id", "is missing"),
    ({"input": [CALL | {"name": "a b"}]}, "input.0.name", "of the form"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": [IMAGE]}]}, "input.0.output", "input_image"),
    ({"tools": [{"type": "web_search"}]}, "tools.0", "no tool web_search"),
    ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools.0", "no tool mcp"),
    ({"tools": [{"type": "custom", "name": "x"}]}, "tools.0", "no tool custom"),
    ({"tools": [{"type": "function", "function": FUNCTION}]}, "tools.0.name", "is missing"),
    ({"tools": TOOLS["tools"] * 2}, "tools", "several of the name weather"),
    (TOOLS | {"tool_choice": {"type": "file_search"}}, "tool_choice", "expected .auto."),
    (TOOLS | {"tool_choice": NAMED | {"name": "other"}}, "tool_choice", "not among the tools"),
    ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type", "json_schema"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "is missing"),
    ({"text": {"format": {"type": "json_object"}}, "min_tokens": 2}, "min_tokens", "with text.format, by which"),
    ({"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}}, "structured_outputs", "text.format and"),
    ({"include": ["thoughts"]}, "include.0", "reasoning.encrypted_content"),
    ({"metadata": {"a": 1}}, "metadata.a", "expected a text"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "at most 16"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "xhigh"),
    ({"reasoning": {"mode": "pro"}}, "reasoning.mode", "standard"),
    ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "is set by the endpoint"),
    ({"top_logprobs": 21}, "top_logprobs", "at most 20"),
    ({"n": 2}, "n", "Unknown field"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED)
def test_a_refusal_names_the_field_and_says_what_to_do(
    fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(ApiError, match=words) as refusal:
        request = read(**fields)
        try:
            as_chat(request)
        except ApiError as error:
            raise in_words_of_responses(error) from None
    assert refusal.value.status == 400 and refusal.value.param == param
    assert refusal.value.message.isprintable() and len(refusal.value.message) < 400


def test_errors_of_a_chat_name_the_fields_of_a_response() -> None:
    numbers = {"context_tokens": 8, "requested_tokens": 9, "prompt_tokens": 5, "max_tokens": 4}
    error = in_words_of_responses(
        error_of("context_length_exceeded", param="messages", prompt_field="messages", **numbers)
    )
    assert error.param == "input" and "(5 in input, 4 in max_output_tokens)" in error.message
    schema = "tools.1.function.parameters"
    refused = error_of("grammar_refused", param=schema, field=schema, place="", problem="x")
    found = in_words_of_responses(refused)
    assert (found.param, found.message) == ("tools.1.parameters", "tools.1.parameters cannot be enforced: x")  # fmt: skip

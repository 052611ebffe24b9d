"""Requests that are right are understood, and each kind of wrong one gets a 400 that names the
field."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.text.chat import plain_text
from serving.api.chat import ChatMessage, ChatRequest
from serving.protocol import harmless_fields
from serving.protocol.errors import ApiError
from serving.protocol.protocol import CompletionRequest, EmbeddingRequest, parse_request
from serving.protocol.strict_json import parse_json_object
from tests.serving.harmless_values import values


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "hi"} | fields).encode()


def parse_completion(raw: bytes) -> CompletionRequest:
    return parse_request(raw, CompletionRequest)


def parse_chat(raw: bytes) -> ChatRequest:
    return parse_request(raw, ChatRequest)


def refusal(raw: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_completion(raw)
    error = caught.value.body()["error"]
    assert caught.value.status == 400
    assert error["type"] == "invalid_request_error"
    assert error["message"].isprintable() and len(error["message"]) < 400
    return caught.value


def test_defaults_are_those_of_openai() -> None:
    request = parse_completion(body(stop=None, seed=None, max_tokens=None))
    assert (request.max_tokens, request.temperature, request.top_p, request.n) == (16, 1.0, 1.0, 1)
    assert (request.stream, request.echo, request.logprobs, request.seed, request.stop) == (
        False,
        False,
        None,
        None,
        (),
    )


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [
        ("hi", ["hi"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ("NUL \x00 and \x1b[31m", ["NUL \x00 and \x1b[31m"]),
    ],
)
def test_a_prompt_is_always_a_list_of_prompts(prompt: Any, parsed: Any) -> None:
    assert parse_completion(body(prompt=prompt)).prompt == parsed


def test_every_field_is_taken() -> None:
    request = parse_completion(
        body(
            max_tokens=3, temperature=0, top_p=0.5, top_k=-1, min_p=0.1, n=2, stream=True,
            stream_options={"include_usage": True}, stop=["a", "bc"], seed=-1, user="u", logprobs=5, echo=True,
            logit_bias={"17": -100}, presence_penalty=-2, frequency_penalty=2, repetition_penalty=1.1, ignore_eos=True,
            stop_token_ids=[3, 3], min_tokens=2, return_token_ids=True,
        )
    )  # fmt: skip
    assert request == CompletionRequest(
        model="m", prompt="hi", max_tokens=3, temperature=0.0, top_p=0.5, top_k=-1, min_p=0.1, n=2, stream=True,
        stream_options={"include_usage": True}, stop=("a", "bc"), seed=-1, user="u", logprobs=5, echo=True,
        logit_bias={"17": -100.0}, presence_penalty=-2.0, frequency_penalty=2.0, repetition_penalty=1.1,
        ignore_eos=True, stop_token_ids=[3, 3], min_tokens=2, return_token_ids=True,
    )  # fmt: skip
    assert request.logit_bias == {17: -100.0}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "nan"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"n": 10**9}, "n"),
        ({"n": 10**300}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.0}, "n"),
        ({"n": "1"}, "n"),
        ({"n": 0}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**12}, "max_tokens"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": ["x"] * 257}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [1.0]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": "x" * 10**5}, "stop"),
        ({"logit_bias": {"AI": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 1e9}}, "logit_bias.1"),
        ({"logit_bias": {str(i): 0 for i in range(301)}}, "logit_bias"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 10**6}, "logprobs"),
        ({"presence_penalty": 1e9}, "presence_penalty"),
        ({"seed": 2**100}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 1e300}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"response_format": {}}, "response_format.type"),
        ({"model": None}, "model"),
        ({"model": 7}, "model"),
        ({"user": "x" * 257}, "user"),
        *(({"stop_token_ids": value}, "stop_token_ids") for value in (5, "5", {"5": 1}, [1] * 129)),
        *(({"stop_token_ids": [value]}, "stop_token_ids.0") for value in (True, 1.5, "1", None, [1])),
        *(({"min_tokens": value}, "min_tokens") for value in (-1, 1.0, True, "1", 10**12)),
        *(({"prompt_logprobs": value}, "prompt_logprobs") for value in (-1, 21, True, 1.0)),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        *(({"return_token_ids": value}, "return_token_ids") for value in (1, "true", [])),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    assert refusal(body(**fields)).param == param


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "empty document"),
        (b"{", "unexpected end of data: line 1 column 2"),
        (b"[1]", "must be a JSON object"),
        (b"3", "must be a JSON object"),
        (b"\xff\xfe", "not valid UTF-8"),
        ('{"model":"m","prompt":"hi"}'.encode("utf-16"), "not valid UTF-8"),
        (
            b'{"model":"m","prompt":"hi","temperature":NaN}',
            "expected a JSON value: line 1 column 42",
        ),
        (b'{"model":"m","prompt":"hi","temperature":-Infinity}', "line 1 column 4"),
        (b'{"model":"m","prompt":"hi","temperature":1e999}', "number is infinity"),
        (b'{"model":"m","prompt":"hi","n":' + b"9" * 5000 + b"}", "number is infinity"),
        (b'{"model":"m","model":"m","prompt":"hi"}', "the key model occurs twice"),
        (b'{"prompt":' + b"[" * 500 + b"]" * 500 + b"}", "at most 32 levels"),
        (b'{"prompt":' + b"[" * 15_000 + b"]" * 15_000 + b"}", "depth limit exceeded"),
        (
            b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            "more than 20000 lists and objects",
        ),
        (b'{"model":"m","prompt":"\\ud800"}', "no low surrogate in string: line 1 column 24"),
        (b'{"model":"m","prompt":"\\udc00\\ud800"}', "surrogate in string: line 1 column 24"),
    ],
)
def test_what_is_no_strict_json_object_is_refused(raw: bytes, problem: str) -> None:
    error = refusal(raw)
    assert error.code == "invalid_json" and problem in error.message


def test_a_surrogate_pair_is_a_character() -> None:
    assert parse_completion(b'{"model":"m","prompt":"\\ud83d\\ude00"}').prompt == [
        "\N{GRINNING FACE}"
    ]


def test_an_unknown_field_is_refused_with_a_suggestion() -> None:
    error = refusal(body(temprature=1))
    assert error.code == "unknown_parameter"
    assert "temperature" in error.message
    assert "\x1b" not in refusal(body(**{"\x1b[31m" + "x" * 1000: 1})).message


def test_bounds_and_value_are_in_the_message() -> None:
    message = refusal(body(temperature=2.5)).message
    assert message == "temperature: expected at most 2, got 2.5"


OTHER_FIELDS = harmless_fields.FIELDS.keys() - CompletionRequest.model_fields.keys()
LACKED_BY_CHATS = OTHER_FIELDS - ChatRequest.model_fields.keys()  # tools are a chat's own


@pytest.mark.parametrize("name", sorted(OTHER_FIELDS))
def test_a_field_that_changes_nothing_is_accepted_and_any_other_value_refused(name: str) -> None:
    harmless = values(harmless_fields.FIELDS, name)
    for value in harmless:
        assert parse_completion(body(**{name: value})) == parse_completion(body())
        if name in LACKED_BY_CHATS:
            assert parse_chat(chat_body(**{name: value})) == parse_chat(chat_body())
    for value in [0, 1, 2.5, True, False, "x", "", [], ["x"], {}, {"type": "json_object"}]:
        if (
            not any(type(value) is type(known) and value == known for known in harmless)
            and type(value) not in (harmless_fields.FIELDS[name])
        ):
            assert refusal(body(**{name: value})).code == "unsupported_parameter", value
            if name in LACKED_BY_CHATS:
                with pytest.raises(ApiError, match="is not supported"):
                    parse_chat(chat_body(**{name: value}))


@given(st.dictionaries(st.sampled_from(sorted(OTHER_FIELDS)), st.integers(0, 3)))
def test_any_of_them_together_change_nothing(chosen: dict[str, int]) -> None:
    fields = {}
    for name, index in chosen.items():
        known = values(harmless_fields.FIELDS, name)
        fields[name] = known[index % len(known)]
    assert parse_completion(body(**fields)) == parse_completion(body())
    of_chats = {name: value for name, value in fields.items() if name in LACKED_BY_CHATS}
    assert parse_chat(chat_body(**of_chats)) == parse_chat(chat_body())


@pytest.mark.parametrize("name", sorted(harmless_fields.MESSAGE_FIELDS))
def test_an_answer_can_be_sent_back_with_what_came_beside_its_text(name: str) -> None:
    def chat(**more: Any) -> ChatRequest:
        return parse_chat(chat_body(messages=[{"role": "assistant", "content": "ho"} | more]))

    for value in values(harmless_fields.MESSAGE_FIELDS, name):
        assert chat(**{name: value}) == chat()


@pytest.mark.parametrize(
    "name",
    [
        "moderation",
        "prompt_cache_options",
        "session_id",
        "request_id",
        "kv_transfer_params",
        "ec_transfer_params",
        "vllm_xargs",
        "logprob_token_ids",
        "stream_interval",
        "return_token_offsets",
        "repetition_detection",
        "thinking_token_budget",
        "truncation_side",
        "watermarking",
        "return_mm_kwargs",
        "mm_payload",
        "routed_experts_prompt_start",
        "include_reasoning",
        "media_io_kwargs",
        "return_prompt_text",
    ],
)
def test_the_newest_fields_of_openai_and_vllm_are_known(name: str) -> None:
    assert parse_completion(body(**{name: None})) == parse_completion(body())
    with pytest.raises(ApiError) as caught:
        parse_completion(body(**{name: 2}))
    assert caught.value.code == "unsupported_parameter"


def test_a_part_of_a_text_may_say_where_a_cache_ends() -> None:
    def chat(**more: Any) -> ChatRequest:
        part = {"type": "text", "text": "ho"}
        return parse_chat(chat_body(messages=[{"role": "user", "content": [part | more, part]}]))

    assert chat(prompt_cache_breakpoint={"mode": "explicit"}) == chat()
    with pytest.raises(ApiError, match="reads text only"):
        chat(cache_control={})


def test_what_other_libraries_write_is_understood() -> None:
    silent = parse_chat(
        chat_body(messages=[{"role": "assistant", "content": None, "name": None}])
    ).messages
    assert (
        plain_text([message.model_dump(exclude_none=True) for message in silent])
        == "Assistant:\n\n"
    )
    assert parse_completion(body(seed=3.0)).seed == 3
    assert parse_chat(chat_body(max_tokens=-1)).max_tokens is None
    assert parse_completion(body(max_tokens=5, max_completion_tokens=7)).token_limit == 7
    both = parse_chat(chat_body(max_tokens=5, max_completion_tokens=7))
    # The second counts, see test_harmless_fields.py
    assert (both.max_tokens, both.max_completion_tokens) == (5, 7)
    options = {"include_usage": None, "continuous_usage_stats": True, "include_obfuscation": False}
    parsed = parse_completion(body(stream=True, stream_options=options)).stream_options
    assert parsed is not None and (parsed.include_usage, parsed.continuous_usage_stats) == (
        False,
        True,
    )
    assert (
        len(
            parse_completion(
                body(prompt=["x"] * 256, stop=list("abcdefghijklmnop"), logprobs=20)
            ).prompt
        )
        == 256
    )


def embedding_body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "input": "hi"} | fields).encode()


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": None}, "input", "missing_required_parameter"),
        *(
            ({"input": value}, "input", "invalid_value")
            for value in ([], [""] * 257, {}, 3, [1, "a"], [[]])
        ),
        *(
            ({"encoding_format": value}, "encoding_format", "invalid_value")
            for value in ("int8", 1, ["float"])
        ),
        ({"dimensions": 8}, "dimensions", "unsupported_parameter"),
        ({"truncate_prompt_tokens": 8}, "truncate_prompt_tokens", "unsupported_parameter"),
        ({"prompt": "x"}, "prompt", "unknown_parameter"),
    ],
)
def test_a_wrong_field_of_an_embedding_is_named(
    fields: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(embedding_body(**fields), EmbeddingRequest)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)


def test_what_embedding_clients_send_is_understood() -> None:
    sent = embedding_body(
        input=[[1, 2]], encoding_format="base64", user="u", dimensions=None, metadata={}
    )
    parsed = parse_request(sent, EmbeddingRequest)
    assert (parsed.input, parsed.encoding_format) == ([[1, 2]], "base64")


def test_json_may_be_32_levels_deep() -> None:
    def nested(levels: int) -> bytes:
        return b'{"a":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"

    assert parse_json_object(nested(32))
    with pytest.raises(ApiError, match="at most 32 levels"):
        parse_json_object(nested(33))


def chat_body(**fields: Any) -> bytes:
    return json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | fields
    ).encode()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "messages.0.content",
        ),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant"}]}, "messages.0.content"),
        (
            {"messages": [{"role": "assistant", "content": "x", "refusal": "no"}]},
            "messages.0.refusal",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages.0.tool_calls.0.id",
        ),
        ({"messages": [{"role": "user", "content": "x", "contnet": None}]}, "messages.0.contnet"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 2}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {}}, "stream_options"),
        ({"prompt": "x"}, "prompt"),
        ({"temperature": 3}, "temperature"),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat(chat_body(**fields))
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_chat_is_rendered_turn_by_turn() -> None:
    messages = [
        ChatMessage(role="developer", content="be brief"),
        ChatMessage(role="user", content="hi", name="Ann"),
        ChatMessage(role="assistant", content="ho"),
        ChatMessage(role="user", content=""),
    ]
    dumped = [message.model_dump(exclude_none=True) for message in messages]
    assert plain_text(dumped) == "System:\nbe brief\nAnn:\nhi\nAssistant:\nho\nUser:\n\n"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*CompletionRequest.model_fields]), json_values))
def test_any_values_give_a_request_or_a_400(fields: dict[str, Any]) -> None:
    try:
        request = parse_completion(json.dumps(fields).encode())
    except ApiError as error:
        assert error.status == 400
    else:
        assert request.model == fields["model"]


@given(st.dictionaries(st.sampled_from([*ChatRequest.model_fields]), json_values))
def test_any_values_give_a_chat_or_a_400(fields: dict[str, Any]) -> None:
    try:
        request = parse_chat(json.dumps(fields).encode())
    except ApiError as error:
        assert error.status == 400
    else:
        assert request.model == fields["model"]


@given(st.dictionaries(st.text(max_size=5), json_values))
def test_strict_json_reads_what_is_right(fields: dict[str, Any]) -> None:
    assert parse_json_object(json.dumps(fields).encode()) == fields

"""Texts of a model as responses: the stream is of OpenAI's types, and adds up to the whole one."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.text.chat_format import ChatFormat
from model.text.tokenizer import Tokenizer
from serving.engine.messages import Candidates, FinishReason
from serving.output.choice_output import ChoicePart, TokenEntry
from serving.protocol.errors import error_of
from serving.protocol.served_model import ServedModel, read_served_model
from serving.responses.answer import ResponseAnswer
from serving.responses.request import ResponseRequest, as_chat
from tests.serving.responses.response_types import checked, events_of, said, streamed
from tests.serving.tiny_models import lively_model, write_model
from tests.serving.tools.templates import HERMES_TEMPLATE

TOOLS = [{"type": "function", "name": name, "parameters": None} for name in ("weather", "time")]
USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
CALL = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'


@pytest.fixture(scope="module")
def hermes(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    chat = ChatFormat(HERMES_TEMPLATE, "", tokenizer.end_of_text)
    talking = Tokenizer.from_json(tokenizer.to_json(), chat)
    folder: Path = tmp_path_factory.mktemp("hermes") / "step-1"
    return read_served_model(write_model(folder, lively_model(tokenizer), talking), name="tiny")


def answer_of(model: ServedModel, **fields: Any) -> ResponseAnswer:
    request = ResponseRequest(model="tiny", input="hi", **fields)
    return ResponseAnswer(model, request=request, **as_chat(request).reading)


def part(
    text: str, reason: FinishReason | None = None, tokens: list[TokenEntry] | None = None
) -> ChoicePart:
    return ChoicePart(0, text, tokens, reason, None, None, None, None)


def cut(text: str, places: Sequence[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(ends)] or [""]


def stream_of(answer: ResponseAnswer, parts: list[ChoicePart]) -> str:
    sent = [answer.sent([each], None) for each in parts]
    return b"".join([*sent, answer.sent([], USAGE), answer.sent_end()]).decode()


WORDS = st.text(st.sampled_from('ab \n<>{}"_/é€\u2028'), max_size=12)
CALLS = st.builds(
    lambda name, arguments: CALL % (name, arguments),
    st.sampled_from(["weather", "time", "other"]),
    st.sampled_from(["{}", '{"city": "Wien"}', '{"a": {"b": "}"}}']),
)


@settings(deadline=None, max_examples=150)
@given(
    pieces=st.lists(WORDS | CALLS, max_size=5),
    places=st.lists(st.integers(0, 400), max_size=20),
    reason=st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]),
    has_tools=st.booleans(),
    num_cut=st.integers(0, 30),
)
def test_any_text_streams_what_its_whole_answer_has(
    hermes: ServedModel,
    pieces: list[str],
    places: list[int],
    reason: FinishReason,
    has_tools: bool,
    num_cut: int,
) -> None:
    text = "".join(pieces)
    if reason is FinishReason.LENGTH:
        text = text[: max(0, len(text) - num_cut)]
    fields = {"tools": TOOLS} if has_tools else {}
    whole = checked(answer_of(hermes, **fields).whole([part(text, reason)], USAGE))
    texts = cut(text, places)
    parts = [part(piece) for piece in texts[:-1]] + [part(texts[-1], reason)]
    found = streamed(stream_of(answer_of(hermes, **fields), parts))
    assert said(found) == said(whole) and found["status"] == whole["status"]
    statuses = [item["status"] for item in whole["output"]]
    last = "completed" if reason is FinishReason.STOP else "incomplete"
    assert statuses == ["completed"] * (len(statuses) - 1) + [last]
    assert whole["status"] == last
    if not has_tools:
        assert said(whole) == [text]


def test_text_and_calls_are_items_in_their_order(hermes: ServedModel) -> None:
    calls = [("time", "{}"), ("weather", '{"city": "Wien"}')]
    text = "\n".join(["Let me see.", *(CALL % call for call in calls), "Done."])
    whole = checked(answer_of(hermes, tools=TOOLS).whole([part(text, FinishReason.STOP)], USAGE))
    assert said(whole) == ["Let me see.", *calls, "Done."]
    ids = [item["id"] for item in whole["output"]]
    assert [i.split("_")[0] for i in ids] == ["msg", "fc", "fc", "msg"] and len({*ids}) == 4
    assert whole["output"][1]["call_id"] != whole["output"][2]["call_id"]
    assert whole["usage"]["total_tokens"] == 7 and whole["completed_at"] >= whole["created_at"]


def test_an_answer_without_text_is_an_empty_message(hermes: ServedModel) -> None:
    for reason in (FinishReason.STOP, FinishReason.LENGTH):
        whole = checked(answer_of(hermes, tools=TOOLS).whole([part("", reason)], USAGE))
        assert said(whole) == [""]
        assert (whole["incomplete_details"] is None) == (reason is FinishReason.STOP)


def test_log_probabilities_stand_with_the_text_that_they_are_of(hermes: ServedModel) -> None:
    entries = [TokenEntry(i, Candidates(-1.0, [(i, -1.0)], 1), 0) for i in range(40, 46)]
    parts = [
        part("a <", None, entries[:2]),
        part("b", None, entries[2:3]),
        part("<tool_call>\n", None, entries[3:4]),
        part('{"name": "time", "arguments": {}}', None, entries[4:5]),
        part("", FinishReason.STOP, entries[5:]),
    ]
    answer = answer_of(hermes, tools=TOOLS, top_logprobs=1)
    found = streamed(stream_of(answer, parts))
    message, call = found["output"]
    assert call["name"] == "time"
    [content] = message["content"]
    names = [entry["token"] for entry in content["logprobs"]]
    assert names == [hermes.token_name(i) for i in range(40, 43)]
    assert content["logprobs"][0]["top_logprobs"][0]["bytes"] == content["logprobs"][0]["bytes"]


def test_a_failure_ends_a_stream_for_every_client(hermes: ServedModel) -> None:
    answer = answer_of(hermes)
    begun = answer.sent([part("half")], None)
    error = error_of("grammar_exceeded", param="response_format")
    *_, failed, last = events_of((begun + answer.sent_failure(error)).decode())
    response = failed["response"]
    assert failed["type"] == "response.failed" and response["status"] == "failed"
    assert response["error"]["code"] == "invalid_prompt" and said(response) == ["half"]
    assert response["output"][0]["status"] == "incomplete"
    assert last["type"] == "error" and last["param"] == "text.format"
    assert last["error"] == {
        "message": last["message"],
        "type": "invalid_request_error",
        "param": "text.format",
        "code": "grammar_exceeded",
    }

"""The forms of a conversation all give its messages; what is no conversation gives none."""

from typing import Any

import pytest

from jobs.corpus.conversations import messages_of

ASKED, ANSWERED = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]

FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [ASKED, ANSWERED | {"weight": 1}], "prompt": "c", "completion": "d"},
    "ShareGPT": {"conversations": SHAREGPT, "id": "x"},
    "ShareGPT by roles": {
        "conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]
    },
    "conversations of messages": {"conversations": [ASKED, ANSWERED]},
    "prompt and completion": {"prompt": "a", "completion": "b"},
    "prompt and completion of messages": {"prompt": [ASKED], "completion": [ANSWERED]},
    "parts": {"messages": [ASKED | {"content": [{"type": "text", "text": "a"}]}, ANSWERED]},
}


@pytest.mark.parametrize("name", FORMS)
def test_each_form_gives_the_messages(name: str) -> None:
    assert messages_of(FORMS[name]) == [ASKED, ANSWERED]


def test_a_system_text_beside_a_conversation_is_its_first_message() -> None:
    system = {"role": "system", "content": "be kind"}
    assert messages_of({"system": "be kind", "conversations": SHAREGPT}) == [
        system,
        ASKED,
        ANSWERED,
    ]
    assert messages_of({"system": "", "conversations": SHAREGPT}) == [ASKED, ANSWERED]


def test_an_unknown_name_stays_for_the_reader_to_judge() -> None:
    assert (
        messages_of({"conversations": [{"from": "observation", "value": "a"}]})[0]["role"]
        == "observation"
    )


NO_FORMS: dict[str, Any] = {
    "a list": [ASKED],
    "text": {"text": "a"},
    "no list": {"messages": "a"},
    "no messages": {"messages": [], "conversations": SHAREGPT},
    "no content": {"conversations": [{"from": "human"}]},
    "a number": {"conversations": [{"from": "human", "value": 1}]},
    "a bad turn": {"conversations": [*SHAREGPT, None]},
    "a prompt alone": {"prompt": "a"},
    "an unlike pair": {"prompt": "a", "completion": [ANSWERED]},
    "an empty prompt": {"prompt": [], "completion": [ANSWERED]},
}


@pytest.mark.parametrize("name", NO_FORMS)
def test_what_is_no_conversation_has_no_messages(name: str) -> None:
    assert messages_of(NO_FORMS[name]) == []

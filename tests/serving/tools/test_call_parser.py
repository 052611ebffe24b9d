"""Calls are read from a model's text, however it is cut into pieces."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.tools.call_parser import CallParser
from serving.tools.formats import HERMES, LLAMA, MISTRAL, ToolFormat
from tests.serving.tools.reading import Read, read

ARGUMENTS = '{"city": "Wien } \\" ]", "days": [1, {"n": 2}]}'
CALL = f'{{"name": "plan", "arguments": {ARGUMENTS}}}'
OTHER = '{"name": "stop", "arguments": {}}'
HERMES_CALL, HERMES_OTHER = (f"<tool_call>\n{call}\n</tool_call>" for call in (CALL, OTHER))
PLAN, STOP = ("plan", ARGUMENTS), ("stop", "{}")
LLAMA_CALL = CALL.replace("arguments", "parameters")

CASES: dict[str, tuple[ToolFormat, str, Read]] = {
    "one": (HERMES, HERMES_CALL, ("", [PLAN])),
    "after words": (HERMES, f"I look.\n\n{HERMES_CALL}", ("I look.", [PLAN])),
    "two": (HERMES, f"{HERMES_CALL}\n{HERMES_OTHER}", ("", [PLAN, STOP])),
    "words between": (HERMES, f"{HERMES_CALL} and {HERMES_OTHER}", ("and", [PLAN, STOP])),
    "words after": (HERMES, f"{HERMES_CALL}\nDone.", ("Done.", [PLAN])),
    "cut in its arguments": (HERMES, HERMES_CALL[:50], ("", [("plan", ARGUMENTS[:8])])),
    "cut in its name": (HERMES, '<tool_call>\n{"name": "pl', ('<tool_call>\n{"name": "pl', [])),
    "without its end": (HERMES, HERMES_CALL.removesuffix("</tool_call>"), ("", [PLAN])),
    "no call": (HERMES, "a < b, <tool or <tool_", ("a < b, <tool or <tool_", [])),
    "another object": (
        HERMES,
        '<tool_call>{"a": 1}</tool_call>x',
        ('<tool_call>{"a": 1}</tool_call>x', []),
    ),
    "arguments that are no object": (
        HERMES,
        '<tool_call>{"name": "f", "arguments": 3}</tool_call>',
        ('<tool_call>{"name": "f", "arguments": 3}</tool_call>', []),
    ),
    "a list of one": (MISTRAL, f"[TOOL_CALLS] [{CALL}]", ("", [PLAN])),
    "a list of two": (MISTRAL, f"[TOOL_CALLS][{CALL}, {OTHER}]", ("", [PLAN, STOP])),
    "with ids": (
        MISTRAL,
        f'[TOOL_CALLS][{CALL[:-1]}, "id": "abcdef123"}}, {OTHER}]',
        ("", [PLAN, STOP]),
    ),
    "words before a list": (MISTRAL, f"Well. [TOOL_CALLS][{CALL}]", ("Well.", [PLAN])),
    "an object": (LLAMA, LLAMA_CALL, ("", [PLAN])),
    "after a tag": (LLAMA, f"<|python_tag|>{LLAMA_CALL}", ("", [PLAN])),
    "after blanks": (LLAMA, f"\n {LLAMA_CALL}\n", ("", [PLAN])),
    "an object that is no call": (LLAMA, '{"city": "Wien"}', ('{"city": "Wien"}', [])),
    "a text": (LLAMA, f"See {LLAMA_CALL}", (f"See {LLAMA_CALL}", [])),
    "a number": (LLAMA, "7", ("7", [])),
    "nothing": (HERMES, "", ("", [])),
}


@pytest.mark.parametrize("name", CASES)
def test_calls_are_read_whole_and_letter_by_letter(name: str) -> None:
    tool_format, text, expected = CASES[name]
    assert read(tool_format, [text]) == expected
    assert read(tool_format, [*text]) == expected


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(CASES)), st.lists(st.integers(1, 12), min_size=1, max_size=200))
def test_calls_are_the_same_however_the_text_is_cut(name: str, lengths: list[int]) -> None:
    tool_format, text, expected = CASES[name]
    pieces = []
    for length in lengths:
        pieces.append(text[:length])
        text = text[length:]
    assert read(tool_format, [*pieces, text]) == expected


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40), st.text(max_size=60))
def test_no_text_is_lost_or_breaks_it(before: str, inside: str) -> None:
    for tool_format in (HERMES, MISTRAL, LLAMA):
        text = f"{before}{tool_format.opens}{inside}{tool_format.closes}"
        content, calls = read(tool_format, [*text])
        assert calls or "".join(content.split()) == "".join(text.split())


def test_a_calls_arguments_arrive_before_its_end() -> None:
    parser = CallParser(HERMES)
    begun = parser.push(f"<tool_call>\n{CALL[:40]}")
    assert [type(piece).__name__ for piece in begun] == ["CallPiece", "CallPiece"]
    assert json.loads(ARGUMENTS)["city"].startswith("Wien")

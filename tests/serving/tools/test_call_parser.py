"""Calls are read from a model's text, however it is cut into pieces."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.tools.call_parser import CallParser, CallPiece
from serving.tools.formats import HERMES, LLAMA, MISTRAL, MISTRAL_ARGS, QWEN_CODER, ToolFormat
from tests.serving.tools.reading import Read, read

ARGUMENTS = '{"city": "Wien } \\" ]", "days": [1, {"n": 2}]}'
CALL = f'{{"name": "plan", "arguments": {ARGUMENTS}}}'
OTHER = '{"name": "stop", "arguments": {}}'
HERMES_CALL, HERMES_OTHER = (f"<tool_call>\n{call}\n</tool_call>" for call in (CALL, OTHER))
PLAN, STOP = ("plan", ARGUMENTS), ("stop", "{}")
LLAMA_CALL = CALL.replace("arguments", "parameters")
LLAMA_OTHER = OTHER.replace("arguments", "parameters")
ARGS_CALL, ARGS_OTHER = f"[TOOL_CALLS]plan[ARGS]{ARGUMENTS}", "[TOOL_CALLS]stop[ARGS]{}"

PARAMETERS = {
    "write": {
        "properties": {
            "text": {"type": "string"},
            "kind": {"enum": ["new", "7"]},
            "count": {"type": "integer"},
            "flag": {"type": "boolean"},
            "lines": {"type": "array", "items": {"type": "integer"}},
            "note": {"type": ["string", "null"]},
        }
    }
}


def tagged(name: str, **values: str) -> str:
    parts = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parts}</function>\n</tool_call>"


PROGRAM = 'if a < b:\n\tprint("</b> 3\\n")\n\n</param\n'
TAGGED = tagged("write", text=PROGRAM, kind="7", count="7", lines="[1,\n 2]")
WRITTEN = f'{{"text": {json.dumps(PROGRAM)}, "kind": "7", "count": 7, "lines": [1,\n 2]}}'

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
    "another object after one": (LLAMA, f'{LLAMA_CALL}; {{"a": 1}}', ('; {"a": 1}', [PLAN])),
    "an object that is no call": (LLAMA, '{"city": "Wien"}', ('{"city": "Wien"}', [])),
    "a text": (LLAMA, f"See {LLAMA_CALL}", (f"See {LLAMA_CALL}", [])),
    "two objects": (LLAMA, f"{LLAMA_CALL}; {LLAMA_OTHER}", ("", [PLAN, STOP])),
    "two lines of them": (LLAMA, f"{LLAMA_CALL}\n{LLAMA_OTHER}\n", ("", [PLAN, STOP])),
    "words after an object": (LLAMA, f"{LLAMA_CALL} Done.", ("Done.", [PLAN])),
    "named before": (MISTRAL_ARGS, ARGS_CALL, ("", [PLAN])),
    "two named before": (MISTRAL_ARGS, f"So. {ARGS_CALL}{ARGS_OTHER}", ("So.", [PLAN, STOP])),
    "with an id before": (
        MISTRAL_ARGS,
        ARGS_CALL.replace("[ARGS]", "[CALL_ID]a1b2c3d4e[ARGS]"),
        ("", [PLAN]),
    ),
    "a name alone": (MISTRAL_ARGS, "[TOOL_CALLS]plan it", ("[TOOL_CALLS]plan it", [])),
    "between tags": (QWEN_CODER, TAGGED, ("", [("write", WRITTEN)])),
    "two between tags": (
        QWEN_CODER,
        f"I write.\n\n{TAGGED}\n{tagged('stop')}",
        ("I write.", [("write", WRITTEN), STOP]),
    ),
    "as Python prints them": (
        QWEN_CODER,
        tagged("write", flag="True", note="None", count="many", other="x y", number="2.5"),
        (
            "",
            [
                (
                    "write",
                    '{"flag": true, "note": null, "count": "many", "other": "x y", "number": 2.5}',
                )
            ],
        ),
    ),
    "on one line": (
        QWEN_CODER,
        "<tool_call><function=write><parameter=text>a</parameter></function></tool_call>",
        ("", [("write", '{"text": "a"}')]),
    ),
    "words between tags": (
        QWEN_CODER,
        "<tool_call><function=write>so <b><parameter=text>\n\n</parameter>x</function></tool_call>",
        ("", [("write", '{"text": ""}')]),
    ),
    "cut in a text": (QWEN_CODER, TAGGED[:60], ("", [("write", WRITTEN[:26])])),
    "JSON between tags": (QWEN_CODER, HERMES_CALL, (HERMES_CALL, [])),
    "a number": (LLAMA, "7", ("7", [])),
    "nothing": (HERMES, "", ("", [])),
}


@pytest.mark.parametrize("name", CASES)
def test_calls_are_read_whole_and_letter_by_letter(name: str) -> None:
    tool_format, text, expected = CASES[name]
    assert read(tool_format, [text], PARAMETERS) == expected
    assert read(tool_format, [*text], PARAMETERS) == expected


@pytest.mark.parametrize(
    ("tool_format", "text", "calls"),
    [
        (HERMES, f'{{"a": "{HERMES_CALL}"}}', []),
        (HERMES, f" {HERMES_OTHER}", [STOP]),
        (HERMES, f"{HERMES_OTHER}\n{HERMES_OTHER}", [STOP, STOP]),
        (HERMES, HERMES_CALL, []),
        (LLAMA, '{"name": "tea", "parameters": {}}', []),
        (LLAMA, LLAMA_OTHER, [STOP]),
        (MISTRAL, f"[1, {CALL}]", []),
        (QWEN_CODER, tagged("other", text="a"), []),
    ],
)
def test_a_text_that_follows_a_grammar_has_the_calls_that_it_may_have(
    tool_format: ToolFormat, text: str, calls: list[tuple[str, str]]
) -> None:
    for pieces in ([text], [*text]):
        content, found = read(tool_format, pieces, {"stop": {}}, bound=True)
        assert found == calls and content == ("" if calls else text)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(CASES)), st.lists(st.integers(1, 12), min_size=1, max_size=200))
def test_calls_are_the_same_however_the_text_is_cut(name: str, lengths: list[int]) -> None:
    tool_format, text, expected = CASES[name]
    pieces = []
    for length in lengths:
        pieces.append(text[:length])
        text = text[length:]
    assert read(tool_format, [*pieces, text], PARAMETERS) == expected


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40), st.text(max_size=60))
def test_no_text_is_lost_or_breaks_it(before: str, inside: str) -> None:
    for tool_format in (HERMES, MISTRAL, MISTRAL_ARGS, QWEN_CODER, LLAMA):
        text = f"{before}{tool_format.opens}{inside}{tool_format.closes}"
        content, calls = read(tool_format, [*text])
        assert calls or "".join(content.split()) == "".join(text.split())


def test_a_calls_arguments_arrive_before_its_end() -> None:
    parser = CallParser(HERMES, {})
    begun = parser.push(f"<tool_call>\n{CALL[:40]}")
    assert [type(piece).__name__ for piece in begun] == ["CallPiece", "CallPiece"]
    assert json.loads(ARGUMENTS)["city"].startswith("Wien")


def test_a_text_between_tags_arrives_before_its_end() -> None:
    parser = CallParser(QWEN_CODER, PARAMETERS)
    begun = parser.push(TAGGED[:70])
    assert "".join(p.arguments for p in begun if isinstance(p, CallPiece)).startswith(
        '{"text": "if'
    )

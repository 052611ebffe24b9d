"""The format of calls is found from a chat template, and calls that are required are grammatical."""

import json
from typing import Any

import jsonschema
import pytest

from model.text.tokenizer import Tokenizer
from serving.structured.compiling import compiled
from serving.structured.grammar import Grammar, GrammarKind
from serving.structured.vocabulary import Vocabulary
from serving.tools.call_grammar import grammar_of_calls
from serving.tools.formats import (
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_ARGS,
    QWEN_CODER,
    ToolFormat,
    format_of,
    takes_tools,
)
from tests.serving.structured.random_answers import random_answer
from tests.serving.structured.schema_cases import closed
from tests.serving.tools.reading import read
from tests.serving.tools.templates import (
    HERMES_TEMPLATE,
    LLAMA_TEMPLATE,
    MISTRAL_ARGS_TEMPLATE,
    MISTRAL_TEMPLATE,
    QWEN_CODER_TEMPLATE,
    UNKNOWN_FORMAT,
    WITHOUT_TOOLS,
)

PLACE = closed({"city": {"enum": ["Wien", "Graz"]}, "day": {"$ref": "#/$defs/day"}}) | {
    "$defs": {"day": {"type": "integer", "minimum": 1, "maximum": 7}}
}
FUNCTIONS: list[dict[str, Any]] = [
    {"name": "weather", "parameters": PLACE, "strict": True},
    {"name": "time", "parameters": None},
    {"name": "tags", "parameters": {"type": "array", "uniqueItems": True, "maxItems": 0}},
]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (HERMES_TEMPLATE, HERMES),
        (MISTRAL_TEMPLATE, MISTRAL),
        (LLAMA_TEMPLATE, LLAMA),
        (WITHOUT_TOOLS, None),
        (UNKNOWN_FORMAT, None),
        (MISTRAL_ARGS_TEMPLATE, MISTRAL_ARGS),
        (QWEN_CODER_TEMPLATE, QWEN_CODER),
    ],
)
def test_the_format_is_found_from_the_template(template: str, expected: ToolFormat | None) -> None:
    assert format_of(template) is expected
    assert takes_tools(template) is (template != WITHOUT_TOOLS)


@pytest.mark.parametrize(
    "tool_format", [HERMES, QWEN_CODER, MISTRAL, MISTRAL_ARGS, LLAMA], ids=lambda f: f.name
)
def test_required_calls_follow_their_schemas(tool_format: ToolFormat, tokenizer: Tokenizer) -> None:
    functions = FUNCTIONS[:2]
    for several in (False, True):
        text = grammar_of_calls(tool_format, functions, several=several, special_ids={})
        matcher = compiled(Grammar(GrammarKind.LARK, text), Vocabulary(tokenizer))
        numbers = set()
        for seed in range(12):
            answer = random_answer(matcher, tokenizer, seed=seed)
            assert answer is not None
            content, calls = read(tool_format, [*answer], {"weather": PLACE})
            assert content == "" and calls
            numbers.add(len(calls))
            for name, arguments in calls:
                schema = PLACE if name == "weather" else {"type": "object", "maxProperties": 0}
                jsonschema.Draft202012Validator(schema).validate(json.loads(arguments))
        assert (max(numbers) > 1) == (several and tool_format.several)


@pytest.mark.parametrize(
    "tool_format", [HERMES, QWEN_CODER, MISTRAL, MISTRAL_ARGS, LLAMA], ids=lambda f: f.name
)
def test_calls_or_an_answer_follow_their_schemas(
    tool_format: ToolFormat, tokenizer: Tokenizer
) -> None:
    """An answer whose first key is that of a call in Llama's format, too."""
    answer = closed({"name": {"enum": ["weather", "tea"]}, "sure": {"type": "boolean"}})
    text = grammar_of_calls(
        tool_format,
        FUNCTIONS[:2],
        several=True,
        special_ids={},
        answer={"parameters": answer, "strict": True},
    )
    matcher = compiled(Grammar(GrammarKind.LARK, text), Vocabulary(tokenizer))
    num_calls = num_answers = 0
    for seed in range(40):
        written = random_answer(matcher, tokenizer, seed=seed)
        assert written is not None
        content, calls = read(tool_format, [*written], {"weather": PLACE, "time": {}}, bound=True)
        assert bool(content) != bool(calls)
        for name, arguments in calls:
            schema = PLACE if name == "weather" else {"type": "object", "maxProperties": 0}
            jsonschema.Draft202012Validator(schema).validate(json.loads(arguments))
        if content:
            jsonschema.validate(json.loads(content), answer)
        num_calls, num_answers = num_calls + bool(calls), num_answers + bool(content)
    assert num_calls and num_answers


def test_marks_that_are_special_tokens_are_these_tokens(tokenizer: Tokenizer) -> None:
    special = {"[TOOL_CALLS]": tokenizer.eot_id}
    text = grammar_of_calls(MISTRAL, FUNCTIONS, several=True, special_ids=special)
    assert f"<[{tokenizer.eot_id}]>" in text and "TOOL_CALLS" not in text
    compiled(Grammar(GrammarKind.LARK, text), Vocabulary(tokenizer))

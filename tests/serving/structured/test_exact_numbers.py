"""Whole numbers that no double holds are written as their schema has them, or refused with their
place."""

import json
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.text.tokenizer import Tokenizer
from serving.structured.compiling import compiled
from serving.structured.exact_numbers import exact
from serving.structured.grammar import Grammar, GrammarError, GrammarKind
from serving.structured.number_mask import DigitTokens, NearNumbers
from serving.structured.vocabulary import Vocabulary
from serving.tools.call_grammar import grammar_of_calls
from serving.tools.formats import format_of
from tests.serving.structured.random_answers import random_answer
from tests.serving.structured.schema_cases import closed, field
from tests.serving.tools.templates import HERMES_TEMPLATE
from tests.time_limits import slowness

SNOWFLAKE = 1234567890123456789
BEYOND = (1 << 53) + 1
RANGE_END = 1234567890123456768  # which a double holds, as it does each 256th number
SEEDS = 6

WRITTEN: dict[str, dict[str, Any]] = {
    "const": {"const": SNOWFLAKE},
    "the first that no double holds": field({"const": BEYOND}),
    "neighbors in an enum": field({"enum": [SNOWFLAKE, SNOWFLAKE + 1, 5, "x", None]}),
    "negative": field({"enum": [-SNOWFLAKE, -BEYOND]}),
    "beside the ends of ranges": field(
        {"enum": [RANGE_END + number for number in (-1, 100, 256, 999)]}
    ),
    "many of one range": field({"enum": [SNOWFLAKE + number for number in range(60)]}),
    "with a type and bounds": field({"type": "integer", "minimum": 1, "enum": [SNOWFLAKE, 0]}),
    "within a constant": {"const": {"ids": [SNOWFLAKE, {"other": -BEYOND}]}},
    "by reference": field({"$ref": "#/$defs/id"}) | {"$defs": {"id": {"enum": [SNOWFLAKE]}}},
    "beside other numbers and texts": closed(
        {
            "id": {"enum": [SNOWFLAKE]},
            "text": {"const": f"{SNOWFLAKE}"},
            "number": {"type": "integer", "minimum": 12, "maximum": 13},
            "digits": {"type": "string", "pattern": "^[0-9]{18,20}$"},
        }
    ),
    "the largest of 64 bits": field({"const": (1 << 63) - 1}),
    "a double": field({"enum": [1 << 60, 10**19, 10**22]}),
    "the bounds of 64 bits": field(
        {"type": "integer", "minimum": -(1 << 63), "maximum": (1 << 63) - 1}
    ),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "minimum": ({"type": "integer", "minimum": BEYOND}, "/minimum"),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 1 << 53}, "/exclusiveMinimum"),
    "maximum": ({"type": "integer", "maximum": SNOWFLAKE}, "/maximum"),
    "multipleOf": ({"type": "integer", "multipleOf": SNOWFLAKE}, "/multipleOf"),
    "more than 64 bits": ({"const": 12345678901234567890}, "/const"),
    "as many digits as no double has": ({"const": 10**400}, "/const"),
    "beside a round number": ({"const": 10**18 - 1}, "/const"),
    "items of an older draft": ({"items": [{"const": SNOWFLAKE}]}, "/items"),
}


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer)


def of_schema(schema: dict[str, Any]) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))


@pytest.mark.parametrize("name", WRITTEN)
def test_numbers_are_written_as_in_the_schema(
    name: str, vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    schema = WRITTEN[name]
    made = compiled(of_schema(schema), vocabulary)
    answers = [random_answer(made, tokenizer, seed=seed) for seed in range(SEEDS)]
    ended = [json.loads(answer) for answer in answers if answer is not None]
    assert ended, answers
    for answer in ended:
        jsonschema.Draft202012Validator(schema).validate(answer)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_held_is_refused_with_its_place(name: str, vocabulary: Vocabulary) -> None:
    schema, place = REFUSED[name]
    with pytest.raises(GrammarError) as caught:
        compiled(of_schema(closed({"a/b": schema})), vocabulary)
    assert caught.value.place == f"/properties/a~1b{place}", caught.value.message
    assert len(caught.value.message) < 200


def test_numbers_too_near_to_each_other_for_two_places_are_refused(vocabulary: Vocabulary) -> None:
    for other in ({"const": SNOWFLAKE + 1}, {"const": f"no. {SNOWFLAKE + 1}"}):
        schema = closed({"a": {"const": SNOWFLAKE}, "b": other})
        with pytest.raises(GrammarError, match="too near to each other"):
            compiled(of_schema(schema), vocabulary)


def test_arguments_of_calls_have_exact_numbers(
    vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    parameters = closed({"id": {"enum": [SNOWFLAKE, BEYOND]}})
    functions = [{"name": "get", "parameters": parameters, "strict": True}]
    tool_format = format_of(HERMES_TEMPLATE)
    assert tool_format is not None
    text = grammar_of_calls(tool_format, functions, several=False, special_ids={})
    made = compiled(Grammar(GrammarKind.LARK, text), vocabulary)
    for seed in range(SEEDS):
        answer = random_answer(made, tokenizer, seed=seed)
        assert answer is not None
        call = json.loads(answer.partition("<tool_call>")[2].partition("</tool_call>")[0])
        assert call["arguments"]["id"] in (SNOWFLAKE, BEYOND)


@given(st.integers(1 << 53, (1 << 63) - 2048), st.integers(-3000, 3000))
def test_whatever_the_constant_is_no_other_number_is_left(constant: int, distance: int) -> None:
    try:
        _, zones = exact([{"const": constant}])
    except GrammarError:
        first, last = (f"{number}"[:12] for number in (constant - 1024, constant + 1024))
        assert first != last, "only beside round numbers"
        return
    assert len(zones) == (float(constant) != constant)
    near, digits = NearNumbers(zones), f"{constant}"
    assert not any(near.forbids(digits[:length]) for length in range(1, len(digits) + 1))
    for zone in zones:
        other = max(zone.low, min(zone.high, constant + distance))
        begins = (f"{other}"[:length] for length in range(13, len(f"{other}") + 1))
        assert any(map(near.forbids, begins)) == (other != constant)


@pytest.mark.parametrize("nested", [False, True])
def test_a_double_that_begins_like_the_numbers_around_another_constant_can_be_written(
    nested: bool,
) -> None:
    double, other = 2223654093146121216, 2223654093146122000
    schema = {"properties": {"a": {"const": double}, "b": {"const": other}}}
    _, zones = exact([schema if nested else {"enum": [double, other]}])
    near = NearNumbers(zones)
    for number in (double, other):
        assert not any(near.forbids(f"{number}"[:length]) for length in range(1, 20))
    assert near.forbids(f"{other + 1}")


@given(st.integers(1 << 60, (1 << 63) - 20000), st.lists(st.integers(0, 9000), min_size=2))
def test_each_number_of_an_enum_can_be_written_to_its_end(first: int, distances: list[int]) -> None:
    """Also beside the end of another one's range."""
    constants = [first + distance for distance in distances]
    try:
        _, zones = exact([{"enum": constants}])
    except GrammarError:
        assert len({f"{number}"[:12] for number in (first - 2048, first + 12000)}) > 1
        return
    near = NearNumbers(zones)
    for constant in constants:
        digits = f"{constant}"
        assert not any(near.forbids(digits[:length]) for length in range(1, len(digits) + 1))
    for other in range(first, first + 9001, 7):
        is_near = any(zone.low <= other <= zone.high for zone in zones)
        assert near.forbids(f"{other}") == (is_near and other not in constants)


def test_thousands_of_near_numbers_hold_no_engine_up(
    vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    """The first twelve digits are those of all."""
    constants = [1234567890120000001 + 512 * number for number in range(2000)]
    began_s = time.thread_time()
    made = compiled(of_schema({"enum": constants}), vocabulary)
    for seed in range(SEEDS):
        answer = random_answer(made, tokenizer, seed=seed)
        assert answer is not None and json.loads(answer) in constants
    assert time.thread_time() - began_s < 5 * slowness(), "where each number is looked at: a minute"


def test_tokens_of_many_digits_are_looked_at_as_others_are() -> None:
    tokens = DigitTokens(
        [b"1", b"12", b" 1234567890123456789", b"a1", b"00000000000000000", b"12x"]
    )
    assert [token for *_, token in tokens.leading(at_least=2)] == [1, 5, 4]
    assert tokens.inner == [(2, "1234567890123456789")]
    assert [tokens.after("7", token) for token in (0, 1, 3, 5)] == ["71", "712", "1", ""]

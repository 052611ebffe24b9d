"""Every answer that ends follows its schema, and what cannot be enforced is refused with its
place."""

import json
import re
from typing import Any

import jsonschema
import pytest

from model.text.tokenizer import Tokenizer
from serving.structured.compiling import compiled
from serving.structured.grammar import Grammar, GrammarError, GrammarKind
from serving.structured.vocabulary import Vocabulary
from tests.serving.structured.random_answers import answer_to, random_answer
from tests.serving.structured.schema_cases import ENFORCED, REFUSED, closed

SEEDS = 4


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer)


def of_schema(schema: Any, *, lenient: bool = False) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema), lenient)


@pytest.mark.parametrize("name", ENFORCED)
def test_answers_follow_their_schema(
    name: str, vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    schema = ENFORCED[name]
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    validator = jsonschema.Draft202012Validator(schema, format_checker=checker)
    matcher = compiled(of_schema(schema), vocabulary)
    answers = [random_answer(matcher, tokenizer, seed=seed) for seed in range(SEEDS)]
    ended = [answer for answer in answers if answer is not None]
    assert ended, answers
    for answer in ended:
        # A leap second may stand in any minute here, and only in a day's last one in the validator
        validator.validate(json.loads(re.sub(r":60\b", ":59", answer)))


def test_properties_keep_their_order(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    matcher = compiled(of_schema(ENFORCED["the order of properties"]), vocabulary)
    answer = random_answer(matcher, tokenizer, seed=1)
    assert answer is not None and [*json.loads(answer)] == ["z", "a"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_refused_with_its_place(
    name: str, vocabulary: Vocabulary
) -> None:
    schema = closed({"first": {"type": "null"}, "in/ner": closed({"x": REFUSED[name]})})
    with pytest.raises(GrammarError) as caught:
        compiled(of_schema(schema), vocabulary)
    assert caught.value.place.startswith("/properties/in~1ner/properties/x"), caught.value.place
    assert caught.value.message and "\n" not in caught.value.message


def test_a_lenient_schema_ignores_what_cannot_be_enforced(tokenizer: Tokenizer) -> None:
    schema = {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2, "uniqueItems": True}
    answer = json.loads(answer_to(of_schema(schema, lenient=True), tokenizer))
    assert set(answer) <= {1, 2} and len(answer) <= 2


def test_blanks_between_the_parts_are_few(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    matcher = compiled(of_schema(closed({"a": {"type": "null"}})), vocabulary)
    answers = [random_answer(matcher, tokenizer, seed=seed) or "" for seed in range(20)]
    assert any(re.search(r"\s", answer) for answer in answers)
    assert all(
        re.fullmatch(r"\{(\n *| )?\"a\"(\n *| )?:(\n *| )?null(\n *| )?\}", a) for a in answers
    )


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (GrammarKind.REGEX, "(ab|cd){2}[0-9]", "(ab|cd){2}[0-9]"),
        (GrammarKind.REGEX, "é€?", "é€?"),
        (GrammarKind.CHOICE, '["yes", "no", "yes \\"no\\"\\n"]', 'yes|no|yes "no"\\n'),
        (GrammarKind.GRAMMAR, 'root ::= "a" [0-9]+ ("b" | "c")', "a[0-9]+(b|c)"),
        (GrammarKind.GRAMMAR, 'start: "a" DIGIT\nDIGIT: /[0-9]/', "a[0-9]"),
    ],
)
def test_answers_follow_other_grammars(
    kind: GrammarKind, text: str, expected: str, tokenizer: Tokenizer
) -> None:
    for seed in range(SEEDS):
        answer = answer_to(Grammar(kind, text), tokenizer, seed=seed)
        assert re.fullmatch(expected, answer), answer


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (GrammarKind.REGEX, "(?<=a)b"),
        (GrammarKind.REGEX, "(a"),
        (GrammarKind.REGEX, r"(a)\1"),
        (GrammarKind.GRAMMAR, 'start: "a'),
        (GrammarKind.GRAMMAR, "root ::= missing"),
        (GrammarKind.GRAMMAR, "start: other"),
    ],
)
def test_other_grammars_are_refused_on_one_line(
    kind: GrammarKind, text: str, vocabulary: Vocabulary
) -> None:
    with pytest.raises(GrammarError) as caught:
        compiled(Grammar(kind, text), vocabulary)
    assert 0 < len(caught.value.message) <= 300 and "\n" not in caught.value.message
    assert caught.value.place == ""

"""Compiled grammars are kept within bounds, and cost no memory once they are dropped."""

import json

import psutil
import pytest

from model.text.tokenizer import Tokenizer
from serving.structured.grammar import Grammar, GrammarError, GrammarKind
from serving.structured.grammar_cache import MAX_GRAMMARS, GrammarCache
from serving.structured.vocabulary import Vocabulary
from tests.serving.structured.random_answers import random_answer
from tests.serving.structured.schema_cases import closed
from tests.time_limits import limit_s

MIB = 1 << 20


def schema(number: int) -> Grammar:
    content = closed({f"p{number}": {"enum": [f"value {number}"]}, "other": {"type": "number"}})
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(content))


def test_a_grammar_is_compiled_once(tokenizer: Tokenizer) -> None:
    loads: list[int] = []

    def load() -> Vocabulary:
        loads.append(1)
        return Vocabulary(tokenizer)

    cache = GrammarCache(load)
    first = cache.get(schema(1))
    assert cache.get(schema(1)) is first and cache.get(schema(2)) is not first
    assert random_answer(first.result(limit_s(10)), tokenizer, seed=1) is not None
    cache.get(schema(2)).result(limit_s(10))
    assert loads == [1] and len(cache) == 2


def test_what_cannot_be_compiled_says_so_again(tokenizer: Tokenizer) -> None:
    cache = GrammarCache(lambda: Vocabulary(tokenizer))
    for _ in range(2):
        with pytest.raises(GrammarError, match="look-around"):
            cache.get(Grammar(GrammarKind.REGEX, "(?=a)b")).result(limit_s(10))


def test_2000_schemas_fill_no_memory(tokenizer: Tokenizer) -> None:
    cache = GrammarCache(lambda: Vocabulary(tokenizer))

    def compile_some(start: int, stop: int) -> int:
        for number in range(start, stop):
            matcher = cache.get(schema(number)).result(limit_s(10))
            if number % 50 == 0:
                assert random_answer(matcher, tokenizer, seed=number) is not None
        return int(psutil.Process().memory_info().rss)

    before = compile_some(0, 2 * MAX_GRAMMARS)
    after = compile_some(2 * MAX_GRAMMARS, 2000)
    assert len(cache) == MAX_GRAMMARS
    assert after - before < 24 * MIB, (after - before) / MIB


def test_large_grammars_are_kept_by_their_bytes(tokenizer: Tokenizer) -> None:
    cache = GrammarCache(lambda: Vocabulary(tokenizer), max_bytes=100)
    texts = [letter * 40 for letter in "abcd"]
    for text in texts:
        cache.get(Grammar(GrammarKind.REGEX, text)).result(limit_s(10))
    assert len(cache) == 2

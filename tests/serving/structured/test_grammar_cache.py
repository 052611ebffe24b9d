"""Compiled grammars are kept within bounds, and cost no memory once they are dropped."""

import ctypes
import json
import math
import random
from dataclasses import replace

import psutil
import pytest

from model.text.tokenizer import Tokenizer
from serving.structured import grammar_memory
from serving.structured.compiled_grammar import CompiledGrammar
from serving.structured.grammar import Grammar, GrammarError, GrammarKind
from serving.structured.grammar_cache import KEPT_SHARE, MAX_GRAMMARS, GrammarCache
from serving.structured.grammar_memory import heap_bytes
from serving.structured.token_mask import TokenMask
from serving.structured.vocabulary import Vocabulary
from tests.serving.structured.random_answers import random_answer
from tests.serving.structured.schema_cases import closed
from tests.time_limits import limit_s
from tests.waiting import wait_until

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
    cache = GrammarCache(lambda: Vocabulary(tokenizer), most_bytes=2 * KEPT_SHARE * MIB)
    for number in range(4):
        measured = replace(schema(number), num_bytes=MIB * 3 // 4)
        cache.get(measured).result(limit_s(10))
    assert len(cache) == 2


def learn(compiled: CompiledGrammar, tokenizer: Tokenizer, *, seed: int) -> bool:
    """Follows an answer of 60 letters, and returns whether it got so far."""
    choose = random.Random(seed)
    letters = [tokenizer.encode(letter)[0] for letter in "abcdef"]
    mask = TokenMask(compiled, stop_ids=[tokenizer.eot_id], vocab_size=tokenizer.vocab_size)
    for _ in range(60):
        if mask.allowed() is None:
            return False
        mask.advance(choose.choice(letters))
    return True


def hungry(number: int) -> Grammar:
    """An expression whose states double with each letter of an answer."""
    text = f"(.*a.{{18}}b|.*b.{{17}}c|.*c.{{16}}d|.*e.{{15}}f)[0-9]{{{number}}}"
    return Grammar(GrammarKind.REGEX, text)


def test_what_grammars_learn_is_counted_and_bounded(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """65 such grammars would take 454 MiB."""
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("the C library does not tell its memory")
    monkeypatch.setattr(grammar_memory, "SLOW_S", math.inf)  # tests before left many free pieces
    wait_until(lambda: heap_bytes() is not None)
    most = 20 * MIB
    cache = GrammarCache(lambda: Vocabulary(tokenizer), most_bytes=most)
    cache.get(hungry(1)).result(limit_s(10))
    before = heap_bytes() or 0
    sequences, grown = list[CompiledGrammar](), 0
    for number in range(2, 9):
        compiled = cache.get(hungry(number)).result(limit_s(10))
        sequences.append(compiled)  # which an answer holds, whatever the cache does
        for seed in range(40):
            if not learn(compiled, tokenizer, seed=seed):
                break
        grown = max(grown, (heap_bytes() or 0) - before)
    assert 12 * MIB < grown < most + 8 * MIB, grown / MIB
    assert abs(cache.memory.num_bytes - grown) < 8 * MIB, "it is counted as it is"
    del sequences, compiled
    assert cache.memory.num_bytes <= most


def test_a_grammar_that_has_learned_too_much_is_compiled_anew_for_the_next(
    tokenizer: Tokenizer,
) -> None:
    """On the old code all later answers by it ended with an error."""
    cache = GrammarCache(lambda: Vocabulary(tokenizer))
    first = cache.get(hungry(1)).result(limit_s(10))
    for seed in range(20):
        if first.has_exceeded or not learn(first, tokenizer, seed=seed):
            break
    assert first.has_exceeded and not learn(first, tokenizer, seed=0)
    second = cache.get(hungry(1)).result(limit_s(10))
    assert second is not first and len(cache) == 1
    mask = TokenMask(second, stop_ids=[tokenizer.eot_id], vocab_size=tokenizer.vocab_size)
    assert mask.allowed() is not None

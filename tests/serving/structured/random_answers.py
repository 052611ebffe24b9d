"""Answers of no model: a token at random among those that a grammar allows."""

import random
from typing import Any

import numpy as np

from model.text.tokenizer import Tokenizer
from serving.structured.compiling import compiled
from serving.structured.grammar import Grammar
from serving.structured.token_mask import TokenMask
from serving.structured.vocabulary import Vocabulary

CLOSING = b'"}]'  # drawn every second time that they are allowed, so that answers end


def random_answer(
    matcher: Any, tokenizer: Tokenizer, *, seed: int, max_tokens: int = 400
) -> str | None:
    """None if it does not end within so many tokens."""
    choose = random.Random(seed)
    stop = tokenizer.eot_id
    mask = TokenMask(matcher, stop_ids=[stop], vocab_size=tokenizer.vocab_size + 7)
    closing = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) in CLOSING]
    ids: list[int] = []
    for _ in range(max_tokens):
        allowed = mask.allowed()
        assert allowed is not None and not allowed[tokenizer.vocab_size :].any()
        likely = [i for i in (*closing, stop) if allowed[i]]
        some = likely if likely and choose.random() < 0.5 else np.flatnonzero(allowed).tolist()
        token_id = choose.choice(some)
        if token_id == stop:
            return tokenizer.decode(ids, continues=True)
        mask.advance(token_id)
        ids.append(token_id)
    return None


def answer_to(grammar: Grammar, tokenizer: Tokenizer, *, seed: int = 0) -> str:
    answer = random_answer(compiled(grammar, Vocabulary(tokenizer)), tokenizer, seed=seed)
    assert answer is not None, "it did not end"
    return answer

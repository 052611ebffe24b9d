"""Sequences that follow a grammar, in the engine: the same alone and among others, and no other is
disturbed."""

import json
from typing import Any

import jsonschema
import pytest

from cluster.settings.serve import EngineConfig
from model.config import GPTConfig
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from serving.engine.engine import Engine
from serving.engine.grammar_rows import GrammarRows
from serving.engine.messages import FinishReason, SequenceRequest, TokenEvent
from serving.engine_process.run_engine import build_engine
from serving.structured.grammar import Grammar, GrammarKind
from serving.structured.grammar_cache import GrammarCache
from serving.structured.vocabulary import Vocabulary
from tests.serving.structured.schema_cases import ENFORCED
from tests.waiting import wait_until

NUM_CASES = 24
BIASED = 8.0  # of the tokens that close a text, so that a random model comes to an end


@pytest.fixture(scope="module")
def wide(tokenizer: Tokenizer) -> GPT:
    """A random model with room for long answers."""
    shape = {"n_positions": 512, "n_layer": 1, "n_head": 2, "n_embd": 32}
    gpt = GPT(GPTConfig(vocab_size=tokenizer.vocab_size + 4, initializer_range=0.3, **shape))
    gpt.init_weights(3)
    return gpt.eval()


@pytest.fixture(params=["native", "torch"])
def engine(request: pytest.FixtureRequest, wide: GPT, tokenizer: Tokenizer) -> Engine:
    return build_engine(
        wide,
        EngineConfig(kernels=request.param),
        eos_id=tokenizer.eot_id,
        threads=1,
        grammars=GrammarCache(lambda: Vocabulary(tokenizer)),
    )


def run(engine: Engine, requests: list[SequenceRequest]) -> dict[int, list[TokenEvent]]:
    events: dict[int, list[TokenEvent]] = {request.seq_id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for event in engine.step().events:
            events[event.seq_id].append(event)
    return events


def asked(
    seq_id: int, grammar: Grammar | None, tokenizer: Tokenizer, **options: Any
) -> SequenceRequest:
    closing = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) in b'"}]']
    bias = tuple((token_id, BIASED) for token_id in (*closing, tokenizer.eot_id))
    drawn = SamplingParams(temperature=1.0, seed=seq_id, logit_bias=bias)
    return SequenceRequest(
        seq_id,
        [5, 9, seq_id % 200],
        **{"max_tokens": 300, "sampling": drawn} | options,
        grammar=grammar,
    )


def text(events: list[TokenEvent], tokenizer: Tokenizer) -> str:
    ids = [event.token_id for event in events if event.token_id is not None]
    assert ids[-1] == tokenizer.eot_id
    return tokenizer.decode(ids[:-1], continues=True)


def of_case(name: str) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(ENFORCED[name]))


def test_answers_of_a_random_model_follow_their_schemas_and_are_the_same_alone(
    engine: Engine, tokenizer: Tokenizer
) -> None:
    names = [*ENFORCED][:NUM_CASES]
    requests = [asked(i, of_case(name), tokenizer) for i, name in enumerate(names)]
    free = asked(100, None, tokenizer, max_tokens=60, ignore_eos=True)
    together = run(engine, [*requests, free])
    num_ended = 0
    for request, name in zip(requests, names, strict=True):
        events = together[request.seq_id]
        if events[-1].finish_reason is FinishReason.LENGTH:
            continue
        num_ended += 1
        answer = json.loads(text(events, tokenizer))
        jsonschema.Draft202012Validator(ENFORCED[name]).validate(answer)
    assert num_ended >= NUM_CASES * 3 // 4
    for request in (*requests[::6], free):
        assert run(engine, [request])[request.seq_id] == together[request.seq_id]


def test_candidates_are_those_that_the_grammar_allows(engine: Engine, tokenizer: Tokenizer) -> None:
    grammar = Grammar(GrammarKind.CHOICE, '["yes", "no"]')
    greedy = SamplingParams(temperature=0.0)
    request = asked(1, grammar, tokenizer, sampling=greedy, num_logprobs=5)
    events = run(engine, [request])[1]
    first = events[0].logprobs
    assert first is not None and first.rank == 1 and first.logprob == first.top[0][1]
    assert {tokenizer.token_bytes(token_id) for token_id, _ in first.top} == {b"y", b"n"}
    assert all(len(e.logprobs.top) == 1 for e in events[1:] if e.logprobs is not None)


def test_a_grammar_that_leaves_no_token_ends_its_own_sequence_alone(
    engine: Engine, tokenizer: Tokenizer
) -> None:
    ambiguous = "start: a\na: a a | a a a | a a a a | /[a-z]/ | /[a-m]/ | /[k-z]/"
    too_costly = Grammar(GrammarKind.GRAMMAR, ambiguous)
    never_ending = SamplingParams(seed=1, logit_bias=((tokenizer.eot_id, -100.0),))
    requests = [
        asked(1, Grammar(GrammarKind.REGEX, "(?=a)b"), tokenizer),
        asked(2, None, tokenizer, max_tokens=20, ignore_eos=True),
        asked(3, too_costly, tokenizer, sampling=never_ending),
    ]
    events = run(engine, requests)
    assert [e.finish_reason for e in events[1]] == [FinishReason.GRAMMAR]
    assert len(events[2]) == 20 and events[2][-1].finish_reason is FinishReason.LENGTH
    assert len(events[3]) > 1 and events[3][-1].finish_reason is FinishReason.GRAMMAR
    assert run(engine, [requests[1]])[2] == events[2]
    assert engine.step().kv_cache_usage == 0


def test_a_sequence_whose_client_leaves_while_its_grammar_is_compiled_is_forgotten(
    engine: Engine, tokenizer: Tokenizer
) -> None:
    engine.submit(asked(1, of_case("format date"), tokenizer))
    assert engine.has_work
    engine.cancel(1)
    assert not engine.has_work and engine.step().events == []


def test_max_tokens_may_cut_an_answer_and_a_stop_token_ends_one(
    engine: Engine, tokenizer: Tokenizer
) -> None:
    cut = asked(1, of_case("pattern"), tokenizer, max_tokens=4)
    [stop] = tokenizer.encode("q")
    stopped = asked(2, Grammar(GrammarKind.REGEX, "a{3}"), tokenizer, stop_token_ids=(stop,))
    events = run(engine, [cut, stopped])
    assert len(events[1]) == 4 and events[1][-1].finish_reason is FinishReason.LENGTH
    ids = [event.token_id for event in events[2]]
    assert tokenizer.decode([i for i in ids[:-1] if i is not None]) == "aaa"
    assert ids[-1] in (stop, tokenizer.eot_id)
    assert events[2][-1].finish_reason is FinishReason.STOP


def test_sequences_that_wait_for_their_grammars_can_be_taken_back_and_held_again(
    tokenizer: Tokenizer,
) -> None:
    rows = GrammarRows(GrammarCache(lambda: Vocabulary(tokenizer)))
    good, bad = Grammar(GrammarKind.REGEX, "a"), Grammar(GrammarKind.REGEX, "(a")
    for seq_id in range(3):
        rows.hold(asked(seq_id, good, tokenizer))
    rows.cancel(1)
    assert [request.seq_id for request in rows.take_back()] == [0, 2]
    assert not rows and rows.take_ready() == []
    rows.hold(asked(2, good, tokenizer))
    rows.hold(asked(3, bad, tokenizer))
    ready: dict[int, Any] = {}

    def all_are_ready() -> bool:
        for request, compiled in rows.take_ready():
            ready[request.seq_id] = compiled
        return len(ready) == 2

    wait_until(all_are_ready)
    assert ready[2] is not None and ready[3] is None

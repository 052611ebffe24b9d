"""What a schema costs: 16 answers at a time that follow one, beside 16 that follow none, in turns.

    python -m tests.benchmarks.bench_structured [--rounds 7] [--layers 12]

A random model of GPT-2's width and 16,384 tokens, in one engine with the native kernels. Prints the
median of the rounds' ratios of tokens per second, and their spread, and the same by the processor time
that was used, which other processes disturb less; below 1 the schema costs time. Then the milliseconds to the first token of an answer whose schema is compiled, and of one without.
"""

import argparse
import json
import random
import statistics
import time

from cluster.settings.serve import EngineConfig
from model.config import GPTConfig
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from model.text.tokenizer import Tokenizer, train_bpe
from serving.engine.engine import Engine
from serving.engine.messages import SequenceRequest
from serving.engine_process.run_engine import build_engine
from serving.structured.grammar import Grammar, GrammarKind
from serving.structured.grammar_cache import GrammarCache
from serving.structured.vocabulary import Vocabulary

_NUM_STREAMS, _NUM_TOKENS, _VOCAB_SIZE, _PROMPT_TOKENS = 16, 96, 16_384, 32
_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
    },
    "required": ["name", "age", "email", "tags"],
    "additionalProperties": False,
}
_SCHEMA = {
    "type": "array",
    "items": _PERSON,
    "minItems": 200,
}  # no answer ends before its tokens do
_GRAMMAR = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(_SCHEMA))


def _tokenizer() -> Tokenizer:
    """Words of random syllables, so that the vocabulary has tokens of many lengths."""
    choose = random.Random(0)
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er")]
    words = ["".join(choose.choices(syllables, k=choose.randint(1, 4))) for _ in range(40_000)]
    text = " ".join(choose.choices(words, k=200_000))
    return train_bpe([text], vocab_size=_VOCAB_SIZE)


def _requests(grammar: Grammar | None, *, count: int, num_tokens: int) -> list[SequenceRequest]:
    return [
        SequenceRequest(
            seq_id,
            [(7 * seq_id + 3 * place) % 200 for place in range(_PROMPT_TOKENS)],
            num_tokens,
            SamplingParams(temperature=0.8, seed=seq_id),
            ignore_eos=grammar is None,
            grammar=grammar,
        )
        for seq_id in range(count)
    ]


def _tokens_per_s(engine: Engine, grammar: Grammar | None) -> tuple[float, float]:
    """Returns the tokens per second, and per second of processor time."""
    for request in _requests(grammar, count=_NUM_STREAMS, num_tokens=_NUM_TOKENS):
        engine.submit(request)
    began_s, began_cpu_s, num_tokens = time.perf_counter(), time.process_time(), 0
    while engine.has_work:
        num_tokens += len(engine.step().events)
    assert num_tokens == _NUM_STREAMS * _NUM_TOKENS
    taken_s, taken_cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    return num_tokens / taken_s, num_tokens / taken_cpu_s


def _first_token_ms(engine: Engine, grammar: Grammar | None) -> float:
    [request] = _requests(grammar, count=1, num_tokens=1)
    began_s = time.perf_counter()
    engine.submit(request)
    while not engine.step().events:
        pass
    return 1000 * (time.perf_counter() - began_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=12, help="12 make 98M parameters")
    asked = parser.parse_args()
    tokenizer = _tokenizer()
    shape = {"n_positions": 512, "n_layer": asked.layers, "n_head": 12, "n_embd": 768}
    gpt = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape))
    gpt.init_weights(1)
    engine = build_engine(
        gpt.eval(),
        EngineConfig(max_num_seqs=_NUM_STREAMS, prefix_cache=False),
        eos_id=tokenizer.eot_id,
        threads=1,
        grammars=GrammarCache(lambda: Vocabulary(tokenizer)),
    )
    for grammar in (None, _GRAMMAR):
        _tokens_per_s(engine, grammar)
    ratios, cpu_ratios, first_ms = [], [], {False: list[float](), True: list[float]()}
    for number in range(asked.rounds):
        order = (None, _GRAMMAR) if number % 2 == 0 else (_GRAMMAR, None)
        speed = {grammar is not None: _tokens_per_s(engine, grammar) for grammar in order}
        ratios.append(speed[True][0] / speed[False][0])
        cpu_ratios.append(speed[True][1] / speed[False][1])
        print(
            f"round {number}: {speed[False][0]:.0f} tokens/s, with the schema {speed[True][0]:.0f}"
        )
        for grammar in order:
            first_ms[grammar is not None].append(_first_token_ms(engine, grammar))
    for name, some in (("seconds", ratios), ("processor time", cpu_ratios)):
        print(f"by {name}: {statistics.median(some):.3f}, {min(some):.3f} to {max(some):.3f}")
    without, with_it = statistics.median(first_ms[False]), statistics.median(first_ms[True])
    print(f"first token after {without:.1f} ms, with the compiled schema {with_it:.1f} ms")


if __name__ == "__main__":
    main()

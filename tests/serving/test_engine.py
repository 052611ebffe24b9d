"""What the engine generates for a sequence equals what `model.generate` does, whatever shares its steps."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from model.checkpoint import load_model
from model.generate import generate
from model.gpt import GPT
from model.sampling import SamplingParams
from serving.engine import Engine
from serving.messages import FinishReason, SequenceRequest, TokenEvent

GREEDY = SamplingParams(temperature=0.0)


def request(
    seq_id: int, prompt_ids: list[int], *, sampling: SamplingParams = GREEDY, **options: Any
) -> SequenceRequest:
    return SequenceRequest(seq_id=seq_id, prompt_ids=prompt_ids, sampling=sampling, **{"max_tokens": 20} | options)


def run(engine: Engine, requests: list[SequenceRequest], *, per_step: int = 100) -> dict[int, list[TokenEvent]]:
    """All events by sequence; `per_step` requests arrive before each step."""
    events: dict[int, list[TokenEvent]] = {r.seq_id: [] for r in requests}
    pending = list(requests)
    while pending or engine.has_work:
        for arrival in pending[:per_step]:
            engine.submit(arrival)
        pending = pending[per_step:]
        for event in engine.step().events:
            events[event.seq_id].append(event)
    return events


def tokens(events: list[TokenEvent]) -> list[int]:
    assert [e.finish_reason is not None for e in events] == [False] * (len(events) - 1) + [True]
    return [e.token_id for e in events if e.token_id is not None]


@pytest.mark.parametrize(("num_slots", "per_step"), [(8, 8), (8, 1), (3, 2), (1, 8)])
def test_greedy_equals_generate(model: GPT, prompts: list[list[int]], num_slots: int, per_step: int) -> None:
    requests = [request(i, prompt, max_tokens=10 + 7 * i) for i, prompt in enumerate(prompts)]
    events = run(Engine(model, num_slots=num_slots, eos_id=None), requests, per_step=per_step)
    expected = [generate(model, r.prompt_ids, max_tokens=r.max_tokens, params=GREEDY, eos_id=None) for r in requests]
    assert [tokens(events[r.seq_id]) for r in requests] == expected
    assert len({token for output in expected for token in output}) > 30


def test_a_seeded_sequence_is_the_same_alone_and_among_others(model: GPT, prompts: list[list[int]]) -> None:
    requests = [
        request(i, prompt, sampling=SamplingParams(temperature=1.3, top_k=40, repetition_penalty=1.2, seed=100 + i))
        for i, prompt in enumerate(prompts)
    ]
    together = run(Engine(model, num_slots=5, eos_id=None), requests, per_step=2)
    for r in requests:
        alone = run(Engine(model, num_slots=1, eos_id=None), [r])
        plain = generate(model, r.prompt_ids, max_tokens=r.max_tokens, params=r.sampling, eos_id=None)
        assert tokens(together[r.seq_id]) == tokens(alone[r.seq_id]) == plain


def test_end_of_text_ends_a_sequence_unless_ignored(model: GPT, prompts: list[list[int]]) -> None:
    free = generate(model, prompts[3], max_tokens=20, params=GREEDY, eos_id=None)
    eos_id = free[5]
    end = free.index(eos_id)
    engine = Engine(model, num_slots=2, eos_id=eos_id)
    events = run(engine, [request(0, prompts[3]), request(1, prompts[3], ignore_eos=True)])
    assert tokens(events[0]) == free[: end + 1]
    assert events[0][-1].finish_reason is FinishReason.STOP
    assert tokens(events[1]) == free
    assert events[1][-1].finish_reason is FinishReason.LENGTH


def test_logprobs_are_those_of_one_forward_pass(model: GPT, prompts: list[list[int]]) -> None:
    requests = [request(i, p, num_logprobs=3, prompt_logprobs=True) for i, p in enumerate(prompts)]
    requests.append(request(99, prompts[7], max_tokens=0, num_logprobs=0, prompt_logprobs=True))
    events = run(Engine(model, num_slots=9, eos_id=None), requests)
    for r in requests:
        output = tokens(events[r.seq_id])
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([r.prompt_ids + output]))[0])  # (T, V)
        expected = logits.log_softmax(-1)
        prompt_logprobs = events[r.seq_id][0].prompt_logprobs
        assert prompt_logprobs is not None and prompt_logprobs[0] is None
        got = [*prompt_logprobs[1:], *(e.logprobs for e in events[r.seq_id] if e.token_id is not None)]
        assert len(got) == len(r.prompt_ids) + len(output) - 1
        for position, candidates in enumerate(got):
            assert candidates is not None
            token_id = (r.prompt_ids + output)[position + 1]
            assert candidates.logprob == pytest.approx(expected[position, token_id].item(), abs=1e-4)
            assert len(candidates.top) == r.num_logprobs
            for top_id, logprob in candidates.top:
                assert logprob == pytest.approx(expected[position, top_id].item(), abs=1e-4)
            if candidates.top:
                assert candidates.top[0][1] == pytest.approx(expected[position].max().item(), abs=1e-4)
    assert tokens(events[99]) == []


def test_a_cancelled_sequence_frees_its_slot_and_disturbs_nobody(model: GPT, prompts: list[list[int]]) -> None:
    engine = Engine(model, num_slots=2, eos_id=None)
    for i in range(3):
        engine.submit(request(i, prompts[i + 4], max_tokens=30))
    first = engine.step()
    assert (first.num_running, first.num_waiting) == (2, 1)
    engine.cancel(0)
    rest: list[TokenEvent] = []
    while engine.has_work:
        report = engine.step()
        assert (report.num_running, report.num_waiting) != (2, 1)
        rest += report.events
    assert {e.seq_id for e in rest} == {1, 2}
    for i in (1, 2):
        output = [e.token_id for e in [*first.events, *rest] if e.seq_id == i]
        assert output == generate(model, prompts[i + 4], max_tokens=30, params=GREEDY, eos_id=None)


def test_logits_that_are_no_numbers_end_their_own_sequence_only(model: GPT, prompts: list[list[int]]) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.transformer.wpe.weight[40:] = float("nan")  # whoever gets that far
    engine = Engine(broken, num_slots=2, eos_id=None)
    long_one, short_one, in_the_same_slot = (
        request(0, prompts[4], max_tokens=30),
        request(1, prompts[0], max_tokens=30),
        request(2, prompts[1], max_tokens=25),
    )
    events = run(engine, [long_one, short_one, in_the_same_slot])
    assert events[0][-1].finish_reason is FinishReason.ERROR
    for r in (short_one, in_the_same_slot):
        expected = generate(model, r.prompt_ids, max_tokens=r.max_tokens, params=GREEDY, eos_id=None)
        assert tokens(events[r.seq_id]) == expected


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
def test_logprobs_equal_those_of_transformers(tmp_path: Path, activation: str) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 211, "n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 3, "initializer_range": 0.3}
    theirs = GPT2LMHeadModel(GPT2Config(**shape, activation_function=activation, bos_token_id=0, eos_token_id=0)).eval()
    theirs.save_pretrained(tmp_path)
    engine = Engine(load_model(tmp_path), num_slots=1, eos_id=None)
    events = run(engine, [request(0, [5, 200, 17], num_logprobs=0)])[0]
    with torch.no_grad():
        expected = theirs(torch.tensor([[5, 200, 17, *tokens(events)]])).logits[0].log_softmax(-1)[2:-1]
    assert tokens(events) == expected.argmax(-1).tolist()
    for event, best in zip(events, expected.max(-1).values.tolist(), strict=True):
        assert event.logprobs is not None and event.logprobs.logprob == pytest.approx(best, abs=1e-4)

"""What the engine generates for a sequence equals what `model.generation.generate` does, whatever
shares its steps."""

import base64
import copy
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cluster.settings.serve import EngineConfig
from model.config import GPTConfig
from model.files.checkpoint import load_model
from model.generation.generate import generate
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from raymill.errors import UserError
from serving.engine import scheduler
from serving.engine.engine import Engine
from serving.engine.messages import FinishReason, SequenceRequest, TokenEvent
from serving.engine.native_runner import NativeRunner
from serving.engine.runner import Reading
from serving.engine.torch_runner import TorchRunner
from serving.engine_process.run_engine import build_engine

GREEDY = SamplingParams(temperature=0.0)
EngineOf = Callable[..., Engine]


@pytest.fixture(params=["native", "torch"])
def engine_of(request: pytest.FixtureRequest) -> EngineOf:
    """Makes an engine for a model, on the kernels of this round."""

    def make(model: GPT, *, eos_id: int | None = None, **settings: Any) -> Engine:
        return build_engine(
            model, EngineConfig(kernels=request.param, **settings), eos_id=eos_id, threads=2
        )

    return make


@pytest.fixture(params=["native", *(["x86-64-v3"] if platform.machine() == "x86_64" else [])])
def march(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the kernels are compiled for: this processor, and one with AVX2 only."""
    monkeypatch.setenv("RAYMILL_KERNELS_MARCH", request.param)
    return str(request.param)


def request(
    seq_id: int, prompt_ids: list[int], *, sampling: SamplingParams = GREEDY, **options: Any
) -> SequenceRequest:
    return SequenceRequest(
        seq_id=seq_id, prompt_ids=prompt_ids, sampling=sampling, **{"max_tokens": 20} | options
    )


def run(
    engine: Engine, requests: list[SequenceRequest], *, per_step: int = 100
) -> dict[int, list[TokenEvent]]:
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


@pytest.mark.parametrize(("max_num_seqs", "per_step"), [(8, 8), (8, 1), (3, 2), (1, 8)])
def test_greedy_equals_generate(
    engine_of: EngineOf, model: GPT, prompts: list[list[int]], max_num_seqs: int, per_step: int
) -> None:
    requests = [request(i, prompt, max_tokens=10 + 7 * i) for i, prompt in enumerate(prompts)]
    events = run(engine_of(model, max_num_seqs=max_num_seqs), requests, per_step=per_step)
    expected = [
        generate(model, r.prompt_ids, max_tokens=r.max_tokens, params=GREEDY, eos_id=None)
        for r in requests
    ]
    assert [tokens(events[r.seq_id]) for r in requests] == expected
    assert len({token for output in expected for token in output}) > 30


@pytest.mark.more
def test_a_seeded_sequence_is_the_same_alone_and_among_others(
    engine_of: EngineOf, model: GPT, prompts: list[list[int]]
) -> None:
    requests = [
        request(
            i,
            prompt,
            sampling=SamplingParams(
                temperature=1.3, top_k=40, repetition_penalty=1.2, seed=100 + i
            ),
        )
        for i, prompt in enumerate(prompts)
    ]
    together = run(engine_of(model, max_num_seqs=5), requests, per_step=2)
    for r in requests:
        alone = run(engine_of(model, max_num_seqs=1), [r])
        plain = generate(
            model, r.prompt_ids, max_tokens=r.max_tokens, params=r.sampling, eos_id=None
        )
        assert tokens(together[r.seq_id]) == tokens(alone[r.seq_id]) == plain


@pytest.mark.more
def test_llama_gives_a_sequence_the_same_tokens_alone_and_among_others(
    engine_of: EngineOf, prompts: list[list[int]]
) -> None:
    shape = {
        "architecture": "llama",
        "activation_function": "swiglu",
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 64,
    }
    llama = GPT(
        GPTConfig(
            **{"vocab_size": 512, "n_positions": 128, "n_layer": 2, "initializer_range": 0.2}
            | shape
        )
    )
    llama.init_weights(4)
    llama.eval()
    drawn = [GREEDY, SamplingParams(temperature=1.1, top_p=0.9, seed=3)]
    requests = [request(i, prompt, sampling=drawn[i % 2]) for i, prompt in enumerate(prompts)]
    together = run(engine_of(llama, max_num_seqs=8), requests, per_step=2)
    for r in requests:
        plain = generate(
            llama, r.prompt_ids, max_tokens=r.max_tokens, params=r.sampling, eos_id=None
        )
        assert tokens(together[r.seq_id]) == plain


def test_end_of_text_ends_a_sequence_unless_ignored(
    engine_of: EngineOf, model: GPT, prompts: list[list[int]]
) -> None:
    free = generate(model, prompts[3], max_tokens=20, params=GREEDY, eos_id=None)
    eos_id = free[5]
    end = free.index(eos_id)
    engine = engine_of(model, max_num_seqs=2, eos_id=eos_id)
    events = run(engine, [request(0, prompts[3]), request(1, prompts[3], ignore_eos=True)])
    assert tokens(events[0]) == free[: end + 1]
    assert events[0][-1].finish_reason is FinishReason.STOP
    assert tokens(events[1]) == free
    assert events[1][-1].finish_reason is FinishReason.LENGTH


@pytest.mark.more
@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.0, seed=3)])
def test_nothing_ends_a_sequence_before_its_fewest_tokens(
    engine_of: EngineOf, model: GPT, prompts: list[list[int]], sampling: SamplingParams
) -> None:
    free = generate(model, prompts[3], max_tokens=20, params=sampling, eos_id=None)
    eos_id, stop_id = free[4], free[7]
    engine = engine_of(model, max_num_seqs=8, eos_id=eos_id)
    kinds: list[dict[str, Any]] = [
        {},
        {"ignore_eos": True, "stop_token_ids": (stop_id, stop_id)},
        {"min_tokens": 12, "stop_token_ids": (stop_id,)},
        {"min_tokens": 5},
        {"min_tokens": 20, "ignore_eos": True},
    ]
    events = run(
        engine, [request(i, prompts[3], sampling=sampling, **kind) for i, kind in enumerate(kinds)]
    )
    plain, stopped, late, masked, ignoring = (tokens(events[i]) for i in range(len(kinds)))
    assert plain == free[: free.index(eos_id) + 1]
    assert stopped == free[: free.index(stop_id) + 1]
    assert events[0][-1].finish_reason is events[1][-1].finish_reason is FinishReason.STOP
    assert len(late) > 12 and not {eos_id, stop_id} & set(late[:12])
    assert len(masked) > 5 and eos_id not in masked[:5]
    # Without a token that it may not draw, a random number falls into another one's share
    if sampling is GREEDY:
        assert masked[: free.index(eos_id)] == free[: free.index(eos_id)]
    assert ignoring == free  # there is nothing that would end it


@pytest.mark.more
def test_an_embedding_is_the_mean_of_the_hidden_states_and_has_the_same_bits_however_it_is_read(
    engine_of: EngineOf, model: GPT, prompts: list[list[int]]
) -> None:
    asked = [request(i, prompt, max_tokens=0, embed=True) for i, prompt in enumerate(prompts)]
    drawing = [request(50 + i, prompt) for i, prompt in enumerate(prompts)]

    def embeddings(
        engine: Engine, requests: list[SequenceRequest], **arrival: int
    ) -> dict[int, str | None]:
        events = run(engine, requests, **arrival)
        assert all(
            event.embedding is None for r in requests if not r.embed for event in events[r.seq_id]
        )
        return {r.seq_id: events[r.seq_id][0].embedding for r in requests if r.embed}

    engine = engine_of(model, max_num_seqs=3)
    # The cache has the prompts, which must be read all the same
    found = embeddings(engine, drawing + asked)
    with torch.no_grad():
        for r in asked:
            vector = torch.frombuffer(
                bytearray(base64.b64decode(found[r.seq_id] or "")), dtype=torch.float32
            )
            torch.testing.assert_close(
                vector, model(torch.tensor([r.prompt_ids]))[0].mean(dim=0), atol=1e-4, rtol=1e-4
            )
    assert len(set(found.values())) == len(prompts)
    if isinstance(engine._runner, NativeRunner):
        assert (
            embeddings(
                engine_of(model, max_num_seqs=8, prefill_tokens_per_step=5), asked, per_step=1
            )
            == found
        )
        assert embeddings(engine_of(model, max_num_seqs=1), asked[::-1]) == found


@pytest.mark.more
def test_logprobs_are_those_of_one_forward_pass(
    engine_of: EngineOf, model: GPT, prompts: list[list[int]]
) -> None:
    requests = [request(i, p, num_logprobs=3, num_prompt_logprobs=3) for i, p in enumerate(prompts)]
    requests.append(request(99, prompts[7], max_tokens=0, num_logprobs=0, num_prompt_logprobs=0))
    events = run(engine_of(model, max_num_seqs=9), requests)
    for r in requests:
        output = tokens(events[r.seq_id])
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([r.prompt_ids + output]))[0])  # (T, V)
        expected = logits.log_softmax(-1)
        prompt_logprobs = events[r.seq_id][0].prompt_logprobs
        assert prompt_logprobs is not None and prompt_logprobs[0] is None
        got = [
            *prompt_logprobs[1:],
            *(e.logprobs for e in events[r.seq_id] if e.token_id is not None),
        ]
        assert len(got) == len(r.prompt_ids) + len(output) - 1
        for position, candidates in enumerate(got):
            assert candidates is not None
            token_id = (r.prompt_ids + output)[position + 1]
            assert candidates.logprob == pytest.approx(
                expected[position, token_id].item(), abs=1e-4
            )
            assert len(candidates.top) == r.num_logprobs
            assert candidates.rank == 1 + (expected[position] > expected[position, token_id]).sum()
            for top_id, logprob in candidates.top:
                assert logprob == pytest.approx(expected[position, top_id].item(), abs=1e-4)
            if candidates.top:
                assert candidates.top[0][1] == pytest.approx(
                    expected[position].max().item(), abs=1e-4
                )
    assert tokens(events[99]) == []


def test_a_cancelled_sequence_frees_its_slot_and_disturbs_nobody(
    engine_of: EngineOf, model: GPT, prompts: list[list[int]]
) -> None:
    engine = engine_of(model, max_num_seqs=2)
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


def test_logits_that_are_no_numbers_end_their_own_sequence_only(
    engine_of: EngineOf, model: GPT, prompts: list[list[int]]
) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.transformer.wpe.weight[40:] = float("nan")  # whoever gets that far
    engine = engine_of(broken, max_num_seqs=2)
    long_one, short_one, in_the_same_slot = (
        request(0, prompts[4], max_tokens=30),
        request(1, prompts[0], max_tokens=30),
        request(2, prompts[1], max_tokens=25),
    )
    events = run(engine, [long_one, short_one, in_the_same_slot])
    assert events[0][-1].finish_reason is FinishReason.ERROR
    for r in (short_one, in_the_same_slot):
        expected = generate(
            model, r.prompt_ids, max_tokens=r.max_tokens, params=GREEDY, eos_id=None
        )
        assert tokens(events[r.seq_id]) == expected


@pytest.mark.more
@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
def test_logprobs_equal_those_of_transformers(
    engine_of: EngineOf, tmp_path: Path, activation: str
) -> None:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 211,
        "n_positions": 64,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 3,
        "initializer_range": 0.3,
    }
    theirs = GPT2LMHeadModel(
        GPT2Config(**shape, activation_function=activation, bos_token_id=0, eos_token_id=0)
    ).eval()
    theirs.save_pretrained(tmp_path)
    engine = engine_of(load_model(tmp_path), max_num_seqs=1)
    events = run(engine, [request(0, [5, 200, 17], num_logprobs=0)])[0]
    with torch.no_grad():
        expected = (
            theirs(torch.tensor([[5, 200, 17, *tokens(events)]])).logits[0].log_softmax(-1)[2:-1]
        )
    assert tokens(events) == expected.argmax(-1).tolist()
    for event, best in zip(events, expected.max(-1).values.tolist(), strict=True):
        assert event.logprobs is not None and event.logprobs.logprob == pytest.approx(
            best, abs=1e-4
        )


def logprobs_of(
    engine: Engine, requests: list[SequenceRequest], **arrival: int
) -> dict[int, list[float]]:
    """Every bit of the numbers that the tokens were drawn from, as far as they are reported."""
    events = run(engine, requests, **arrival)
    return {
        seq_id: [v for e in es if e.logprobs for _, v in e.logprobs.top]
        for seq_id, es in events.items()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.usefixtures("march")
def test_the_bits_do_not_depend_on_what_shares_a_step_nor_on_chunks_nor_on_the_cache(
    model: GPT, dtype: str
) -> None:
    """The native kernels only: PyTorch's own sums depend on the shape of the batch."""
    prompts = [
        [(7 * i + 11 * k) % model.config.vocab_size for k in range(1 + 13 * i)] for i in range(8)
    ]
    requests = [request(i, prompt, num_logprobs=5) for i, prompt in enumerate(prompts)]

    def engine(**settings: Any) -> Engine:
        config = EngineConfig(
            kernels="native",
            **{"dtype": dtype, "max_num_seqs": 8, "prefix_cache": False} | settings,
        )
        return build_engine(model, config, eos_id=None, threads=2)

    expected = logprobs_of(engine(), requests)
    assert len({value for values in expected.values() for value in values}) > 400
    assert logprobs_of(engine(prefill_tokens_per_step=7), requests) == expected
    assert logprobs_of(engine(max_num_seqs=3), requests, per_step=1) == expected
    for r in requests:
        assert logprobs_of(engine(max_num_seqs=1), [r]) == {r.seq_id: expected[r.seq_id]}
    cached = engine(prefix_cache=True)
    assert logprobs_of(cached, requests) == expected
    assert logprobs_of(cached, requests) == expected  # now from the cache


def test_a_cached_prompt_is_not_read_again(
    engine_of: EngineOf, model: GPT, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MOST_TIMES", 1)
    engine = engine_of(model, max_num_seqs=1, prefill_tokens_per_step=16)
    prompt = prompts[7]  # 57 tokens: four steps of 16, or one when three blocks are there already
    steps: list[list[tuple[int, int, int]]] = []
    for seq_id in range(2):
        engine.submit(request(seq_id, prompt, max_tokens=1))
        steps.append([])
        while engine.has_work:
            report = engine.step()
            steps[-1].append((report.num_tokens, report.num_looked_up, report.num_found))
            assert report.steps_s[0] > 0
        [event] = report.events
        assert event.token_id == generate(model, prompt, max_tokens=1, params=GREEDY)[0]
    assert steps == [[(16, 57, 0), (16, 0, 0), (16, 0, 0), (9, 0, 0)], [(9, 57, 48)]]


def test_a_burst_is_read_in_larger_steps_once_the_engine_has_seen_its_speed(
    engine_of: EngineOf, model: GPT, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "LONGEST_BURST_S", 1e6)  # however slow this machine is now
    engine = engine_of(model, max_num_seqs=1, prefill_tokens_per_step=4)
    engine.submit(request(0, prompts[7], max_tokens=1))  # 57 tokens
    steps: list[int] = []
    while engine.has_work:
        steps.append(engine.step().num_tokens)
    assert steps == [4, 32, 21]


def test_a_small_cache_makes_sequences_wait_and_nothing_else(
    engine_of: EngineOf, model: GPT, prompts: list[list[int]]
) -> None:
    engine = engine_of(model, max_num_seqs=8, kv_cache_tokens=model.config.n_positions)
    requests = [request(i, prompt) for i, prompt in enumerate(prompts)]
    for r in requests:
        engine.submit(r)
    report = engine.step()
    assert 0 < report.num_waiting < 8 and 0 < report.kv_cache_usage <= 1
    events = {r.seq_id: [e for e in report.events if e.seq_id == r.seq_id] for r in requests}
    while engine.has_work:
        report = engine.step()
        for event in report.events:
            events[event.seq_id].append(event)
    assert report.kv_cache_usage == 0
    for r in requests:
        assert tokens(events[r.seq_id]) == generate(
            model, r.prompt_ids, max_tokens=20, params=GREEDY
        )


def test_a_cache_smaller_than_a_context_is_refused(engine_of: EngineOf, model: GPT) -> None:
    with pytest.raises(
        UserError, match="kv_cache_tokens=64 is less than one context of this model, 128 tokens"
    ):
        engine_of(model, kv_cache_tokens=64)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02), ("int8", 0.04)]
)
@pytest.mark.parametrize(
    "shape",
    [
        {"n_embd": 24, "n_head": 3},
        {"n_embd": 100, "n_head": 1, "activation_function": "gelu_exact"},
        {"n_embd": 80, "n_head": 1, "activation_function": "relu", "tie_word_embeddings": False},
        {"n_embd": 66, "n_head": 2, "n_inner": 130},
        {
            "architecture": "llama",
            "activation_function": "swiglu",
            "n_embd": 96,
            "n_head": 4,
            "n_kv_head": 2,
        },
        {
            "architecture": "llama",
            "activation_function": "swiglu",
            "n_embd": 60,
            "n_head": 6,
            "n_kv_head": 1,
            "n_inner": 70,
            "tie_word_embeddings": False,
            "rope_factor": 4.0,
            "rope_original_positions": 16,
        },
    ],
)
@pytest.mark.usefixtures("march")
def test_native_logits_are_those_of_the_model(
    shape: dict[str, Any], dtype: str, tolerance: float
) -> None:
    """`tolerance` is a share of the logits' own spread."""
    model = GPT(
        GPTConfig(
            **{"vocab_size": 211, "n_positions": 64, "n_layer": 2, "initializer_range": 0.1} | shape
        )
    )
    model.init_weights(3)
    runner = NativeRunner(model.eval(), dtype=dtype, num_blocks=6, threads=3)
    token_ids = [(5 * i * i + 3) % 211 for i in range(45)]
    readings = [Reading(token_ids[:30], 0, [4, 1, 3]), Reading(token_ids[30:], 30, [4, 1, 3])]
    logits = torch.cat([runner.logits(runner.forward([reading])) for reading in readings])
    with torch.no_grad():
        expected = model.logits(model(torch.tensor([token_ids]))[0])
    assert 0 < (logits - expected).std() / expected.std() <= tolerance


@pytest.mark.usefixtures("march")
def test_the_kernels_read_a_prompt_about_as_fast_as_pytorch() -> None:
    """As long as a tile's sums stay in registers: else it takes them 15 times as long."""
    model = GPT(GPTConfig(vocab_size=211, n_positions=64, n_layer=2, n_head=4, n_embd=256))
    model.init_weights(3)
    reading = Reading([(5 * i * i + 3) % 211 for i in range(48)], 0, [0, 1, 2])
    native = NativeRunner(model.eval(), dtype="float32", num_blocks=3, threads=1)
    cpu_s: list[list[float]] = []
    with torch.inference_mode():
        for runner in (native, TorchRunner(model, num_blocks=3)):
            cpu_s.append([])
            for _ in range(20):
                before_s = time.thread_time()
                runner.forward([reading])
                cpu_s[-1].append(time.thread_time() - before_s)
    native_s, torch_s = map(min, cpu_s)
    assert native_s < 3 * torch_s, f"{1000 * native_s:.2f} ms, PyTorch {1000 * torch_s:.2f} ms"


@pytest.mark.usefixtures("march")
def test_the_kernels_survey_of_logits_is_that_of_pytorch(model: GPT) -> None:
    logits = torch.randn(9, model.config.vocab_size, generator=torch.Generator().manual_seed(3))
    last = model.config.vocab_size - 1
    for row, places in enumerate([(0, 40), (39, 17), (last,), (last - 1, last), (3, 4)]):
        logits[row, list(places)] = 9.0  # of several highest ones the first counts
    for row, (place, number) in enumerate(
        [(5, math.nan), (last, math.nan), (20, -math.inf)], start=5
    ):
        logits[row, place] = number
    native = NativeRunner(model, dtype="float32", num_blocks=1, threads=2).survey(logits)
    expected = TorchRunner(model, num_blocks=1).survey(logits)
    assert native.finite.tolist() == expected.finite.tolist() == [True] * 5 + [False] * 3 + [True]
    assert native.best[native.finite].tolist() == expected.best[expected.finite].tolist()


def test_pytorch_reads_all_of_a_step_in_one_call(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of any length, pieces of them, and single tokens."""
    token_ids = [[(7 * i + 11 * k) % model.config.vocab_size for k in range(50)] for i in range(4)]
    blocks = [[3, 9, 1, 0], [2, 7, 4, 5], [8, 6, 10, 11], [15, 13, 12, 14]]

    def readings(*chunks: tuple[int, int, int]) -> list[Reading]:
        return [Reading(token_ids[i][first:last], first, blocks[i]) for i, first, last in chunks]

    steps = [
        readings((0, 0, 30), (1, 0, 1), (2, 0, 12)),
        readings((3, 0, 12), (0, 30, 31), (1, 1, 13), (2, 12, 42)),
    ]
    calls = []
    forward = GPT.forward
    monkeypatch.setattr(
        GPT, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    )
    together, alone = TorchRunner(model, num_blocks=16), TorchRunner(model, num_blocks=16)
    with torch.inference_mode():
        for number, step in enumerate(steps, start=1):
            hidden = together.forward(step)
            assert len(calls) == number
            one_by_one = torch.cat([alone.forward([reading]) for reading in step])
            torch.testing.assert_close(hidden, one_by_one, atol=1e-5, rtol=1e-5)
            del calls[number:]


def test_int8_is_refused_where_only_pytorch_computes(model: GPT) -> None:
    with pytest.raises(UserError, match="int8 needs the native kernels"):
        build_engine(model, EngineConfig(kernels="torch", dtype="int8"), eos_id=None, threads=1)

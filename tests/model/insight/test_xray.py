"""The x-ray of a query: its numbers are the model's own, and its tokens those of `generate`."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.generation.generate import generate
from model.generation.sampling import distribution
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from model.insight.xray import AttentionReader, Query, nearest_tokens, predictions, run_query, score
from tests.model.small_models import small_model

GREEDY = SamplingParams(temperature=0.0)
PROMPT = [5, 17, 90, 3, 3, 41, 8]
MODEL = small_model()


def full_logits(model: GPT, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(torch.tensor([token_ids]))[0])


@pytest.mark.parametrize(
    "shape", [{}, {"n_head": 1, "activation_function": "relu"}, {"tie_word_embeddings": False}]
)
def test_logits_are_those_of_the_model(shape: dict[str, object]) -> None:
    model = small_model(seed=3, **shape)
    query = run_query(model, PROMPT, max_tokens=9, params=GREEDY)
    assert len(query.token_ids) == 16 and len(query.logits) == 15  # the last token is not read
    torch.testing.assert_close(
        query.logits, full_logits(model, query.token_ids[:-1]), atol=1e-5, rtol=0
    )


@given(cuts=st.sets(st.integers(1, 19)), seed=st.integers(0, 99))
def test_reading_in_pieces_is_reading_at_once(cuts: set[int], seed: int) -> None:
    ids = torch.randint(97, (20,), generator=torch.Generator().manual_seed(seed)).tolist()
    reader = AttentionReader(MODEL)
    pieces = [reader.read(ids[a:b]).logits for a, b in itertools.pairwise([0, *sorted(cuts), 20])]
    torch.testing.assert_close(torch.cat(pieces), full_logits(MODEL, ids), atol=1e-5, rtol=0)


def test_weights_times_values_are_the_attention_output_of_the_model(model: GPT) -> None:
    theirs: list[torch.Tensor] = []
    hooks = [
        block.attn.register_forward_hook(lambda _m, _i, output: theirs.append(output))
        for block in model.transformer.h
    ]
    full_logits(model, PROMPT)
    for hook in hooks:
        hook.remove()
    reading = AttentionReader(model).read(PROMPT)
    assert len(theirs) == len(reading.attention) == 2
    for block, attention, output in zip(
        model.transformer.h, reading.attention, theirs, strict=True
    ):
        mixed = torch.einsum("htp,hpd->thd", attention.weights, attention.values).reshape(
            1, len(PROMPT), -1
        )
        with torch.no_grad():
            torch.testing.assert_close(block.attn.c_proj(mixed), output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_lower_triangular_and_its_rows_sum_to_one(dtype: torch.dtype) -> None:
    query = run_query(small_model().to(dtype), PROMPT, max_tokens=6, params=GREEDY)
    for layer in range(2):
        for reading in query.readings:
            weights = reading.attention[layer].weights
            assert torch.equal(weights, weights.tril(weights.shape[2] - weights.shape[1]))
        for head in range(4):
            rows = query.attention_rows(layer=layer, head=head)
            assert [len(row) for row in rows] == list(range(1, 13))
            assert all(abs(row.double().sum().item() - 1) < 1e-5 and row.min() >= 0 for row in rows)


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(temperature=0.9, top_k=20, top_p=0.8, seed=4)]
)
def test_tokens_are_those_of_generate(model: GPT, params: SamplingParams) -> None:
    expected = generate(model, PROMPT, max_tokens=20, params=params)
    query = run_query(model, PROMPT, max_tokens=20, params=params)
    assert query.token_ids == PROMPT + expected
    eos_id = expected[4]
    ended = run_query(model, PROMPT, max_tokens=20, params=params, eos_id=eos_id)
    assert ended.token_ids == PROMPT + expected[: expected.index(eos_id) + 1]


def test_drawn_probabilities_are_those_that_sampling_used(model: GPT) -> None:
    params = SamplingParams(temperature=0.7, top_p=0.6, seed=11)
    query = run_query(model, PROMPT, max_tokens=8, params=params)
    for index, drawn in enumerate(query.drawn_probabilities):
        position = len(PROMPT) + index
        used = distribution(query.logits[position - 1], params)
        assert drawn == pytest.approx(used[query.token_ids[position]].item())
        assert 0 < drawn <= 1
    assert run_query(model, PROMPT, max_tokens=3, params=GREEDY).drawn_probabilities == [1.0] * 3


def test_predictions_and_scores_agree_with_the_distribution(model: GPT) -> None:
    logits = full_logits(model, PROMPT)
    probabilities = logits.softmax(-1).double()
    for row, prediction in enumerate(predictions(logits, num_top=6)):
        entropy = -sum(p * math.log(p) for p in probabilities[row].tolist() if p > 0)
        assert prediction.entropy_nats == pytest.approx(entropy, abs=1e-4)
        order = probabilities[row].argsort(descending=True, stable=True)[:6].tolist()
        assert [c.token_id for c in prediction.top] == order and [
            c.rank for c in prediction.top
        ] == [1, 2, 3, 4, 5, 6]
        for candidate in prediction.top:
            assert candidate.logit == logits[row, candidate.token_id]
            assert candidate.probability == pytest.approx(
                probabilities[row, candidate.token_id].item(), abs=1e-6
            )
            assert score(logits[row : row + 1], [candidate.token_id]) == [
                pytest.approx(candidate, abs=1e-6)
            ]
    [tied] = predictions(torch.tensor([[2.0, 1.0, 2.0]]), num_top=3)
    assert sorted(c.rank for c in tied.top) == [1, 1, 3]
    assert predictions(torch.tensor([[0.0, -math.inf]]), num_top=1)[0].entropy_nats == 0


def test_spans_are_contiguous_and_stages_have_the_shapes_of_a_query(model: GPT) -> None:
    ticks = itertools.count()
    query: Query = run_query(
        model, PROMPT, max_tokens=2, params=GREEDY, clock=lambda: float(next(ticks))
    )
    assert [s.name for s in query.spans] == ["prefill", "sample", "decode", "sample"]
    assert all(b.start_s == a.end_s for a, b in itertools.pairwise(query.spans))
    shapes = [(s.name, s.layer, s.shape) for s in query.readings[0].stages]
    layers = [[("attention", n, (1, 4, 7, 7)), ("mlp", n, (1, 7, 32))] for n in range(2)]
    assert shapes == [
        ("token embedding", None, (1, 7, 32)),
        ("position embedding", None, (1, 7, 32)),
        *layers[0],
        *layers[1],
        ("final norm", None, (1, 7, 32)),
        ("logits", None, (1, 7, 97)),
        ("softmax", None, (1, 7, 97)),
    ]
    assert {s.seconds for s in query.readings[0].stages} == {1.0}


def test_the_nearest_tokens_point_the_same_way(model: GPT) -> None:
    with torch.no_grad():
        model.transformer.wte.weight[8] = 3 * model.transformer.wte.weight[5]
    table = model.transformer.wte.weight.detach()
    near, other = nearest_tokens(model, [5, 40], num_nearest=4)
    assert near[0] == (8, pytest.approx(1, abs=1e-5))
    expected = torch.nn.functional.cosine_similarity(table[40][None], table)
    expected[40] = -2
    assert [token_id for token_id, _ in other] == expected.topk(4).indices.tolist()


def test_logits_that_are_no_numbers_are_an_error(model: GPT) -> None:
    model.transformer.ln_f.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError):
        run_query(model, PROMPT, max_tokens=1, params=GREEDY)


def test_a_prompt_alone_is_read_once(model: GPT) -> None:
    query = run_query(model, PROMPT, max_tokens=0, params=GREEDY)
    assert query.token_ids == PROMPT and len(query.readings) == 1 and not query.drawn_probabilities

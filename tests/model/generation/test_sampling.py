"""Each rule draws from the distribution of its definition, and a row does not see its neighbors."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.generation.sampling import SamplingRow, distribution, sample, sample_batch, uniform
from model.generation.sampling_params import SamplingParams

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, 1.0])
RULES = {
    "plain": SamplingParams(),
    "cold": SamplingParams(temperature=0.5),
    "hot": SamplingParams(temperature=2.0),
    "top_k": SamplingParams(top_k=3),
    "top_p": SamplingParams(top_p=0.8),
    "min_p": SamplingParams(min_p=0.1),
    "all": SamplingParams(temperature=1.3, top_k=6, top_p=0.9, min_p=0.15),
}


def reference(logits: list[float], params: SamplingParams) -> list[float]:
    """Computes the definitions in plain Python: temperature → top-k → top-p → min-p."""
    weights = [math.exp(value / params.temperature) for value in logits]
    probabilities = [weight / sum(weights) for weight in weights]
    ranked = sorted(range(len(logits)), key=lambda i: (-probabilities[i], i))
    if params.top_k:
        ranked = ranked[: params.top_k]
    total, kept, reached = sum(probabilities[i] for i in ranked), [], 0.0
    for i in ranked:
        if params.top_p < 1 and reached >= params.top_p * total:
            break
        kept.append(i)
        reached += probabilities[i]
    kept = [i for i in kept if probabilities[i] >= params.min_p * probabilities[kept[0]]]
    total = sum(probabilities[i] for i in kept)
    return [probabilities[i] / total if i in kept else 0.0 for i in range(len(logits))]


def chi_square_999(degrees: int) -> float:
    """Returns the 99.9% quantile of χ² (Wilson and Hilferty's approximation)."""
    return degrees * (1 - 2 / (9 * degrees) + 3.0902 * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize("rule", RULES)
def test_draws_follow_the_reference_distribution(rule: str) -> None:
    params = replace(RULES[rule], seed=11)
    expected = np.array(reference(LOGITS.tolist(), params))
    num_draws = 4000
    rows = [SamplingRow(params, [], [], position) for position in range(num_draws)]
    counts = np.bincount(sample_batch(LOGITS.expand(num_draws, -1), rows), minlength=len(LOGITS))
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = (
        (counts - num_draws * expected)[possible] ** 2 / (num_draws * expected[possible])
    ).sum()
    assert statistic < chi_square_999(int(possible.sum()) - 1)


def test_the_rules_differ() -> None:
    assert len({tuple(reference(LOGITS.tolist(), params)) for params in RULES.values()}) == len(
        RULES
    )


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.integers(-6, 6).map(lambda value: value / 2), min_size=1, max_size=40),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([1e-6, 0.33, 0.5001, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.07, 1.0]),
)
def test_distribution_equals_the_definition(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    found = distribution(torch.tensor(logits), params).tolist()
    assert found == pytest.approx(reference(logits, params), abs=1e-6)


def test_random_numbers_are_uniform_and_a_function_of_seed_and_position() -> None:
    numbers = np.array(
        [uniform(seed, position) for seed in (0, -5, 2**63) for position in range(2000)]
    )
    assert len(set(numbers)) == len(numbers)
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    assert ((counts - 120) ** 2 / 120).sum() < chi_square_999(49)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.05
    assert uniform(1, 2) == 0.7154423197824968


def test_temperature_zero_takes_the_first_of_the_most_probable() -> None:
    greedy = SamplingParams(temperature=0)
    assert (
        sample(torch.tensor([1.0, 3.0, 3.0, 2.0]), greedy, prompt_ids=[], output_ids=[], position=0)
        == 1
    )
    almost = SamplingParams(temperature=1e-4, seed=1)
    assert all(
        sample(LOGITS, almost, prompt_ids=[], output_ids=[], position=i) == 0 for i in range(50)
    )


def test_penalties_and_bias_have_their_definitions() -> None:
    prompt, output = [0, 3], [1, 1, 3]

    def best(logits: list[float], **settings: Any) -> int:
        params = SamplingParams(temperature=0, **settings)
        return sample(
            torch.tensor(logits), params, prompt_ids=prompt, output_ids=output, position=5
        )

    # presence: off each token of the output, once; the prompt does not count
    assert best([1.0, 2.05, 1.4, 2.0], presence_penalty=0.6) == 1
    assert best([1.0, 2.05, 1.5, 2.0], presence_penalty=0.6) == 2
    assert best([1.46, 2.05, 1.0, 2.0], presence_penalty=0.6) == 0
    # frequency: for each occurrence
    assert best([0.0, 2.5, 0.0, 2.0], frequency_penalty=0.6) == 3
    assert best([0.0, 2.7, 0.0, 2.0], frequency_penalty=0.6) == 1
    # repetition: prompt and output; divides what is positive, multiplies what is negative
    assert best([2.0, 1.9, 1.1, 1.8], repetition_penalty=2.0) == 2
    assert best([-1.0, -1.2, -1.9, -1.2], repetition_penalty=2.0) == 2
    assert best([-1.0, -1.2, -2.1, -1.2], repetition_penalty=2.0) == 0
    # bias comes first: the token that it lifts above zero is divided, not multiplied
    assert best([0.0, -1.0, 1.4, 0.0], logit_bias=((1, 4.0),), repetition_penalty=2.0) == 1
    assert best([0.0, -1.0, 1.6, 0.0], logit_bias=((1, 4.0),), repetition_penalty=2.0) == 2
    assert best([5.0, 1.0, 0.0, 0.0], logit_bias=((0, -100.0),)) == 1


def test_a_row_gets_the_same_token_alone_and_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(24, 1000, generator=generator) * 3
    kinds = [
        *RULES.values(),
        SamplingParams(temperature=0),
        SamplingParams(repetition_penalty=1.3, presence_penalty=1.0),
    ]
    rows = [
        SamplingRow(replace(kinds[b % len(kinds)], seed=b), [1, 2, b], [5, b, b], 6 + b)
        for b in range(24)
    ]
    alone = [
        sample(
            logits[b],
            row.params,
            prompt_ids=row.prompt_ids,
            output_ids=row.output_ids,
            position=row.position,
        )
        for b, row in enumerate(rows)
    ]
    assert sample_batch(logits, rows) == alone
    order = torch.randperm(24, generator=generator).tolist()
    assert sample_batch(logits[order], [rows[b] for b in order]) == [alone[b] for b in order]
    # Rounding noise
    assert sample_batch(logits + 1e-6 * torch.randn(24, 1000, generator=generator), rows) == alone


def test_a_seed_is_drawn_once_and_kept() -> None:
    assert SamplingParams(seed=0).with_seed().seed == 0
    assert SamplingParams().with_seed().seed != SamplingParams().with_seed().seed


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_logits_that_are_no_numbers_are_an_error(temperature: float, bad: list[float]) -> None:
    params = SamplingParams(temperature=temperature, seed=1)
    with pytest.raises(FloatingPointError):
        sample(torch.tensor(bad), params, prompt_ids=[], output_ids=[], position=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidden_tokens_are_never_drawn_and_the_others_keep_their_shares(
    temperature: float,
) -> None:
    logits = torch.tensor([4.0, 3.0, 2.0, -5.0]).expand(400, 4)
    params = SamplingParams(temperature=temperature, seed=3)
    rows = [SamplingRow(params, [0], [0], place, forbidden_ids={0, 3}) for place in range(400)]
    drawn = sample_batch(logits, rows, best=torch.zeros(400, dtype=torch.long))
    if temperature == 0:
        assert set(drawn) == {1}
    else:
        assert set(drawn) == {1, 2} and drawn.count(1) / 400 == pytest.approx(
            math.e / (1 + math.e), abs=0.08
        )
    assert logits[0].tolist() == [4.0, 3.0, 2.0, -5.0]  # which log-probabilities are taken from


def test_weights_below_the_smallest_unit_are_none() -> None:
    logits = torch.tensor([0.0, -10.0, -18.0, -30.0, -600.0, -torch.inf])
    left = distribution(logits, SamplingParams(temperature=0.5))
    expected = (logits.double() / 0.5).exp()
    assert left.tolist()[:3] == pytest.approx(expected.tolist()[:3], rel=1e-2)
    assert left[2] > 0 and left.tolist()[3:] == [0.0, 0.0, 0.0]


def test_every_number_finds_a_token_that_has_weight_however_many_tokens_there_are() -> None:
    logits = torch.full((1, 200_001), -40.0)
    logits[0, [7, 255, 256, 199_999]] = 0.0
    rows = [SamplingRow(SamplingParams(seed=seed), [0], [], 0) for seed in range(50)]
    assert set(sample_batch(logits.expand(50, -1), rows)) == {7, 255, 256, 199_999}

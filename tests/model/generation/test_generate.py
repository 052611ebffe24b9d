"""The plain generator gives the same with and without the cache, and ends where it should."""

from typing import Any

import pytest
import torch

from model.generation.generate import ContextLengthError, generate
from model.generation.sampling import sample
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT

GREEDY = SamplingParams(temperature=0)
PROMPT = [3, 14, 15, 92, 65]


def test_greedy_follows_the_largest_logit(model: GPT) -> None:
    sequence = list(PROMPT)
    for _ in range(40):
        sequence.append(int(model.logits(model(torch.tensor([sequence])))[0, -1].argmax()))
    expected = sequence[len(PROMPT) :]
    assert generate(model, PROMPT, max_tokens=40, params=GREEDY) == expected


@pytest.mark.parametrize("seed", range(5))
def test_sampling_with_the_cache_equals_sampling_without(model: GPT, seed: int) -> None:
    params = SamplingParams(temperature=0.8, top_k=50, top_p=0.95, presence_penalty=0.5, seed=seed)
    cached = generate(model, PROMPT, max_tokens=30, params=params)
    sequence = list(PROMPT)
    for place in range(len(PROMPT), len(PROMPT) + 30):
        with torch.inference_mode():
            logits = model.logits(model(torch.tensor([sequence]))[0, -1])
        output = sequence[len(PROMPT) :]
        sequence.append(
            sample(logits, params, prompt_ids=PROMPT, output_ids=output, position=place)
        )
    assert cached == sequence[len(PROMPT) :]
    assert len(cached) == 30
    # Taken up again in the middle, a sequence goes on as it would have.
    plain = SamplingParams(seed=seed)
    whole = generate(model, PROMPT, max_tokens=30, params=plain)
    assert generate(model, PROMPT + whole[:12], max_tokens=18, params=plain) == whole[12:]


def test_requests_without_a_seed_differ(model: GPT) -> None:
    assert (
        len(
            {
                tuple(generate(model, PROMPT, max_tokens=20, params=SamplingParams()))
                for _ in range(3)
            }
        )
        > 1
    )


def test_it_ends_before_the_end_of_text(model: GPT) -> None:
    tokens = generate(model, PROMPT, max_tokens=20, params=SamplingParams(seed=3))
    eos = tokens[7]
    ended = generate(model, PROMPT, max_tokens=20, params=SamplingParams(seed=3), eos_id=eos)
    assert ended == tokens[: tokens.index(eos)]


def test_context_overflow_names_both_numbers(model: GPT) -> None:
    assert len(generate(model, PROMPT, max_tokens=43, params=GREEDY)) == 43
    with pytest.raises(
        ContextLengthError, match="context length is 48 tokens, but 49 were requested"
    ):
        generate(model, PROMPT, max_tokens=44, params=GREEDY)
    with pytest.raises(ContextLengthError, match="no token"):
        generate(model, [], max_tokens=1, params=GREEDY)
    with pytest.raises(ContextLengthError, match="max_tokens is 0"):
        generate(model, PROMPT, max_tokens=0, params=GREEDY)


class OnGpu(torch.Tensor):
    """Logits that refuse the operations that deterministic mode refuses on a GPU, until they are on
    the CPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        if func in (torch.Tensor.cumsum, torch.cumsum) and args[0].is_floating_point():
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_validation_can_sample_in_deterministic_mode_on_a_gpu(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"max_tokens": 5, "params": SamplingParams(temperature=0.8, seed=1)}
    expected = generate(model, [1, 2, 3], **settings)
    of_hidden = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: of_hidden(hidden).as_subclass(OnGpu))
    assert generate(model, [1, 2, 3], **settings) == expected

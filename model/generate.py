"""The plain generator: one sequence, one token at a time. The serving engine is tested against it."""

from collections.abc import Callable, Sequence

import torch

from model.errors import UserError
from model.gpt import GPT
from model.kv_cache import KVCache
from model.sampling import SamplingParams, sample


class ContextLengthError(UserError):
    """Prompt and answer don't fit into the model's context."""


def check_context(*, num_prompt_tokens: int, max_tokens: int, n_positions: int) -> None:
    if num_prompt_tokens < 1:
        raise ContextLengthError("the prompt has no token; start with the end-of-text token to sample without a prompt")
    if max_tokens < 1:
        raise ContextLengthError(f"max_tokens is {max_tokens}, expected at least 1")
    if num_prompt_tokens + max_tokens > n_positions:
        raise ContextLengthError(
            f"this model's context length is {n_positions} tokens, but {num_prompt_tokens + max_tokens} were requested "
            f"({num_prompt_tokens} in the prompt and max_tokens={max_tokens}); shorten the prompt or lower max_tokens"
        )


@torch.inference_mode()
def generate(
    model: GPT,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    params: SamplingParams,
    eos_id: int | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    use_cache: bool = True,
) -> list[int]:
    """Up to `max_tokens` new tokens; ends before `eos_id`, which is not returned, or when `stop(new tokens)` holds.

    Raises `ContextLengthError` when prompt and `max_tokens` exceed the context, or the prompt is empty.
    """
    config = model.config
    check_context(num_prompt_tokens=len(prompt_ids), max_tokens=max_tokens, n_positions=config.n_positions)
    assert not model.training, "dropout would disturb the answer: call model.eval()"
    params = params.with_seed()
    parameter = next(model.parameters())
    cache = None
    if use_cache:
        num_positions = len(prompt_ids) + max_tokens
        cache = KVCache(config, num_slots=1, max_len=num_positions, dtype=parameter.dtype, device=parameter.device)
    slots = torch.zeros(1, dtype=torch.long, device=parameter.device)
    output_ids: list[int] = []
    while len(output_ids) < max_tokens:
        sequence = [*prompt_ids, *output_ids]
        first = len(sequence) - 1 if cache is not None and output_ids else 0  # earlier positions are cached
        token_ids = torch.tensor([sequence[first:]], device=parameter.device)  # (1, T)
        positions = torch.arange(first, len(sequence), device=parameter.device)[None]  # (1, T)
        hidden = model(token_ids, kv_cache=cache, slots=slots, positions=positions)  # (1, T, C)
        # To the CPU: a GPU's cumulative sums of floats are no deterministic operation, which training refuses.
        logits = model.logits(hidden[0, -1]).cpu()  # (V,)
        token = sample(logits, params, prompt_ids=prompt_ids, output_ids=output_ids, position=len(sequence))
        if token == eos_id:
            break
        output_ids.append(token)
        if stop is not None and stop(output_ids):
            break
    return output_ids

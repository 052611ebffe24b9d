"""The plain generator: one sequence, one token at a time. The serving engine is tested against
it."""

from collections.abc import Sequence

import torch

from model.decoder import Decoder
from model.generation.sampling import sample
from model.generation.sampling_params import SamplingParams
from raymill.errors import UserError


class ContextLengthError(UserError):
    """The prompt and the answer do not fit into the model's context."""


@torch.inference_mode()
def generate(
    model: Decoder,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    params: SamplingParams,
    eos_id: int | None = None,
    num_ids: int | None = None,
) -> list[int]:
    """Returns up to `max_tokens` new tokens; ends before `eos_id`, which is not returned. With
    `num_ids` the tokens are among so many: an embedding may have more rows than the tokenizer has
    ids.

    Raises `ContextLengthError` when the prompt is empty, or exceeds the context together with
    `max_tokens`.
    """
    longest, total = model.config.n_positions, len(prompt_ids) + max_tokens
    if len(prompt_ids) < 1:
        raise ContextLengthError(
            "the prompt has no token; start with the end-of-text token to sample without a prompt"
        )
    if max_tokens < 1:
        raise ContextLengthError(f"max_tokens is {max_tokens}, expected at least 1")
    if total > longest:
        raise ContextLengthError(
            f"this model's context length is {longest} tokens, but {total} were requested ({len(prompt_ids)} in the "
            f"prompt and max_tokens={max_tokens}); shorten the prompt or lower max_tokens"
        )
    assert not model.training, "dropout would disturb the answer: call model.eval()"
    params = params.with_seed()
    device = next(model.parameters()).device
    cache = model.new_cache(total)
    output_ids: list[int] = []
    while len(output_ids) < max_tokens:
        sequence = [*prompt_ids, *output_ids]
        is_cached = output_ids and cache is not None
        first = len(sequence) - 1 if is_cached else 0
        token_ids = torch.tensor([sequence[first:]], device=device)  # (1, T)
        positions = torch.arange(first, len(sequence), device=device)[None]  # (1, T)
        hidden = model(token_ids, kv_cache=cache, positions=positions)  # (1, T, C)
        # On the CPU: a GPU's cumulative sums of floats are not deterministic, and training refuses
        # such operations.
        logits = model.logits(hidden[0, -1])[:num_ids].cpu()  # (V,)
        token = sample(
            logits, params, prompt_ids=prompt_ids, output_ids=output_ids, position=len(sequence)
        )
        if token == eos_id:
            break
        output_ids.append(token)
    return output_ids

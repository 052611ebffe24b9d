"""What AdamW is told: which parameters decay, and the learning rate as a function of tokens seen."""

import math

from model.gpt import GPT


def decay_parameter_names(model: GPT) -> set[str]:
    """Matrices and embeddings decay; biases and LayerNorms, which are vectors, do not (GPT-3, appendix B)."""
    return {name for name, parameter in model.named_parameters() if parameter.dim() >= 2}


def learning_rate(
    tokens_seen: int,
    *,
    peak: float,
    warmup_tokens: int,
    decay_tokens: int,
    min_ratio: float,
    cooldown_tokens: int | None = None,
) -> float:
    """Linear from 0 to `peak` over `warmup_tokens`, cosine to `min_ratio` x `peak` at `decay_tokens`, then flat.

    With `cooldown_tokens` it stays at the peak instead and falls linearly over the last so many before `decay_tokens`
    (warmup-stable-decay; Hu et al., 2024, arXiv 2404.06395), or as many as the warm-up leaves.
    Of tokens, not steps, so neither a resize nor another batch size moves it.
    """
    if tokens_seen < warmup_tokens:
        return peak * tokens_seen / warmup_tokens
    if tokens_seen >= decay_tokens:
        return peak * min_ratio
    if cooldown_tokens is not None:
        start = max(warmup_tokens, decay_tokens - cooldown_tokens)
        if tokens_seen <= start:
            return peak
        return peak * (min_ratio + (1 - min_ratio) * (decay_tokens - tokens_seen) / (decay_tokens - start))
    progress = (tokens_seen - warmup_tokens) / (decay_tokens - warmup_tokens)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))

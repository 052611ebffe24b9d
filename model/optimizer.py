"""What AdamW is told: which parameters decay, and the learning rate as a function of tokens seen."""

import math

from model.gpt import GPT


def decay_parameter_names(model: GPT) -> set[str]:
    """Matrices and embeddings decay; biases and LayerNorms, which are vectors, do not (GPT-3, appendix B)."""
    return {name for name, parameter in model.named_parameters() if parameter.dim() >= 2}


def learning_rate(tokens_seen: int, *, peak: float, warmup_tokens: int, decay_tokens: int, min_ratio: float) -> float:
    """Linear from 0 to `peak` over `warmup_tokens`, cosine to `min_ratio` x `peak` at `decay_tokens`, then flat.

    Of tokens, not steps, so neither a resize nor another batch size moves it.
    """
    if tokens_seen < warmup_tokens:
        return peak * tokens_seen / warmup_tokens
    if tokens_seen >= decay_tokens:
        return peak * min_ratio
    progress = (tokens_seen - warmup_tokens) / (decay_tokens - warmup_tokens)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))

"""The learning rate, as a function of tokens seen: neither a resize nor another batch size moves
it."""

import math
from collections.abc import Callable


def learning_rate(
    tokens_seen: int,
    *,
    peak: float,
    warmup_tokens: int,
    decay_tokens: int,
    min_ratio: float,
    cooldown_tokens: int | None = None,
    cosine: Callable[[float], float] = math.cos,
) -> float:
    """Rises linearly to `peak` over `warmup_tokens`, then follows a cosine to `min_ratio` x `peak`
    at `decay_tokens`.

    With `cooldown_tokens` it stays at the peak instead, and falls linearly over that many tokens,
    or those that the warm-up leaves, before `decay_tokens` (warmup-stable-decay; Hu et al., 2024,
    arXiv 2404.06395).
    """
    if tokens_seen < warmup_tokens:
        return peak * tokens_seen / warmup_tokens
    if tokens_seen >= decay_tokens:
        return peak * min_ratio
    if cooldown_tokens is not None:
        start = max(warmup_tokens, decay_tokens - cooldown_tokens)
        if tokens_seen <= start:
            return peak
        return peak * (
            min_ratio + (1 - min_ratio) * (decay_tokens - tokens_seen) / (decay_tokens - start)
        )
    progress = (tokens_seen - warmup_tokens) / (decay_tokens - warmup_tokens)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + cosine(math.pi * progress)))


def portable_cosine(angle: float) -> float:
    """Returns the cosine of an angle in 0 … π with the same bits everywhere, which C libraries do
    not give: the Taylor series of the sine of the complement to a right angle."""
    missing = math.pi / 2 - angle
    series = 1.0
    for k in range(11, 0, -1):
        series = 1 - series * missing * missing / (2 * k * (2 * k + 1))
    return missing * series

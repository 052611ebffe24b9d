"""The way a request's tokens are drawn. This module does not import PyTorch."""

import secrets
from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The way tokens are drawn, in ranges that were checked; the defaults draw from the model's own
    distribution."""

    temperature: float = 1.0  # 0 takes the most probable token
    top_k: int = 0  # keeps the k most probable tokens; 0 keeps all
    top_p: float = 1.0  # keeps the fewest tokens that reach this probability together
    # Keeps tokens with at least this share of the most probable one's probability
    min_p: float = 0.0
    presence_penalty: float = 0.0  # subtracted from the logit of each token in the output
    frequency_penalty: float = 0.0  # subtracted for each of its occurrences in the output
    # Divides positive logits of tokens in prompt or output, multiplies others
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    seed: int | None = None

    def with_seed(self) -> Self:
        """Adds a random seed where there is none. A request does this once, so that it can be
        repeated."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(63))

    @property
    def adjusts_logits(self) -> bool:
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return bool(self.logit_bias) or penalties != (0, 0, 1)

"""From logits to the next token: penalties, temperature, top-k, top-p, min-p, and one keyed random number.

The random number is a pure function of (seed, position), so a request's tokens do not depend on what shares its batch.
It is turned into a token by the inverse of the cumulative distribution in the order of ids, in float64: a rounding
difference d in the logits can change the token only if the number falls within about d of a border. (Borders in the
order of probabilities would move by whole tokens where two of them are nearly equal.)

Shapes: B rows of a batch, V vocabulary.
"""

import hashlib
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from model.errors import UserError


class SamplingError(UserError):
    """Sampling parameters out of their range."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. The defaults draw from the model's own distribution."""

    temperature: float = 1.0  # 0 takes the most probable token
    top_k: int = 0  # the k most probable; 0 keeps all
    top_p: float = 1.0  # the fewest tokens that reach this probability together
    min_p: float = 0.0  # tokens of at least this share of the most probable one's probability
    presence_penalty: float = 0.0  # off the logit of each token in the output
    frequency_penalty: float = 0.0  # off it for each of its occurrences in the output
    repetition_penalty: float = (
        1.0  # positive logits of tokens in prompt or output are divided by it, others multiplied
    )
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "temperature": (0 <= self.temperature < math.inf, "a finite number of at least 0"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "0 < top_p <= 1"),
            "min_p": (0 <= self.min_p <= 1, "0 <= min_p <= 1"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "-2 to 2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "-2 to 2"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "a finite number above 0"),
            "logit_bias": (all(-100 <= bias <= 100 for _, bias in self.logit_bias), "biases of -100 to 100"),
        }
        for name, (holds, expected) in checks.items():
            if not holds:
                raise SamplingError(f"{name} is {getattr(self, name)}, expected {expected}")

    def with_seed(self) -> Self:
        """With a random seed where there is none. A request does this once, so that it can be repeated."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(63))

    @property
    def adjusts_logits(self) -> bool:
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return bool(self.logit_bias) or penalties != (0, 0, 1)


@dataclass(frozen=True)
class SamplingRow:
    """What one row of a batch needs besides its logits."""

    params: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    position: int
    """Index of the token to be drawn in its sequence, prompt included: a sequence taken up again goes on the same."""


def sample(
    logits: Tensor, params: SamplingParams, *, prompt_ids: Sequence[int], output_ids: Sequence[int], position: int
) -> int:
    """The next token from logits (V,). Raises `FloatingPointError` when they are not numbers."""
    return sample_batch(logits[None], [SamplingRow(params, prompt_ids, output_ids, position)])[0]


def sample_batch(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """The next token of each row of logits (B, V): what `sample` gives for it alone."""
    if any(row.params.adjusts_logits for row in rows):
        logits = torch.stack([adjusted(row_logits, row) for row_logits, row in zip(logits, rows, strict=True)])
    best_logits, best_ids = logits.max(dim=-1)  # (B,): NaN wins where there is one
    if not best_logits.isfinite().all():
        raise FloatingPointError("the model's logits are not finite numbers")
    tokens: list[int] = best_ids.tolist()
    drawn = [b for b, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        probabilities = torch.stack([distribution(logits[b], rows[b].params) for b in drawn])  # (drawn, V)
        numbers = torch.tensor([[uniform(rows[b].params.seed, rows[b].position)] for b in drawn], dtype=torch.float64)
        borders = probabilities.cumsum(dim=-1)
        # The first border above the number: a token of probability 0 has no room between borders.
        found = torch.searchsorted(borders, numbers.to(borders.device) * borders[:, -1:], right=True)
        for b, token in zip(drawn, found[:, 0].tolist(), strict=True):
            tokens[b] = token
    return tokens


def adjusted(logits: Tensor, row: SamplingRow) -> Tensor:
    """Logits (V,) with the row's biases and penalties."""
    params = row.params
    if not params.adjusts_logits:
        return logits
    logits = logits.clone()
    if params.logit_bias:
        ids, biases = zip(*params.logit_bias, strict=True)
        logits[list(ids)] += torch.tensor(biases, dtype=logits.dtype, device=logits.device)
    output = torch.tensor(row.output_ids, dtype=torch.long, device=logits.device)
    seen = torch.cat((torch.tensor(row.prompt_ids, dtype=torch.long, device=logits.device), output)).unique()
    values = logits[seen]
    logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    ids, counts = output.unique(return_counts=True)
    logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
    return logits


def distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities (V,), float64, after temperature (> 0), top-k, top-p and min-p, in this order. Among equals the
    lower id is kept."""
    probabilities = torch.softmax(logits.double() / params.temperature, dim=-1)
    if 0 < params.top_k < len(probabilities):
        border = probabilities.topk(params.top_k).values[-1]
        above, equal = probabilities > border, probabilities == border
        keep = above | (equal & (equal.cumsum(dim=0) <= params.top_k - above.sum()))
        probabilities = torch.where(keep, probabilities, 0.0)
    if params.top_p < 1:
        needed = params.top_p * probabilities.sum()
        # Tokens below (total - needed) / V can't add up to the difference, so none of them is needed: sort the rest.
        floor = (probabilities.sum() - needed) / len(probabilities)
        candidates = (probabilities >= floor).nonzero()[:, 0]
        ranked, order = probabilities[candidates].sort(descending=True, stable=True)
        kept = candidates[order[ranked.cumsum(dim=0) - ranked < needed]]
        probabilities = torch.zeros_like(probabilities).index_copy(0, kept, probabilities[kept])
    if params.min_p > 0:
        probabilities = torch.where(probabilities >= params.min_p * probabilities.max(), probabilities, 0.0)
    return probabilities / probabilities.sum()


def uniform(seed: int | None, position: int) -> float:
    """A number of [0, 1), a multiple of 2⁻⁴⁸, from BLAKE2b of `seed:position`."""
    assert seed is not None, "sampling needs SamplingParams.with_seed()"
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48

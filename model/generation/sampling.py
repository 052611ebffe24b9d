"""From logits to the next token: penalties, temperature, top-k, top-p, min-p, and one keyed random
number.

The random number is a pure function of (seed, position), so a request's tokens do not depend on
what shares its batch. The inverse of the cumulative distribution, in the order of ids, turns it
into a token: a rounding difference d in the logits can change the token only if the number falls
within about d of a border. (In the order of probabilities, borders would move by whole tokens where
two of them are nearly equal.) Probabilities are whole numbers, whose sums have no order: the same
logits and exponentials give the same token on every processor.

Shapes: B rows of a batch, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.generation.sampling_params import SamplingParams

_LEAST_EXPONENT = -87.0  # CPUs take several times as long for exp(-inf)
_NUMBER_BITS = 48  # of the random number

Exponentials = Callable[[Tensor], Tensor]
"""Replaces fp32 numbers (B, V) by their exponentials."""


@dataclass(frozen=True)
class SamplingRow:
    """Everything that one row of a batch needs besides its logits."""

    params: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    # Of the token to be drawn in its sequence, prompt included: a resumed sequence continues the
    # same
    position: int
    forbidden_ids: Collection[int] = ()  # tokens that may not be drawn; at least one other is left

    @property
    def adjusts_logits(self) -> bool:
        return self.params.adjusts_logits or bool(self.forbidden_ids)


def sample(
    logits: Tensor,
    params: SamplingParams,
    *,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    position: int,
) -> int:
    """Returns the next token from logits (V,). Raises `FloatingPointError` when they are not
    numbers."""
    return sample_batch(logits[None], [SamplingRow(params, prompt_ids, output_ids, position)])[0]


def sample_batch(
    logits: Tensor,
    rows: Sequence[SamplingRow],
    *,
    best: Tensor | None = None,
    exponentials: Exponentials = torch.exp_,
) -> list[int]:
    """Returns the next token of each row of logits (B, V), the same as `sample` for the row alone.
    `best` (B,) holds the rows' argmax where the caller knows it."""
    if any(row.adjusts_logits for row in rows):
        pairs = zip(logits, rows, strict=True)
        logits = torch.stack([adjusted(row_logits, row) for row_logits, row in pairs])
        best = None
    if best is None:
        best = logits.argmax(dim=-1)  # (B,): NaN wins where there is one
    highest = logits.gather(1, best[:, None])  # (B, 1)
    if not highest.isfinite().all():
        raise FloatingPointError("the model's logits are not finite numbers")
    tokens: list[int] = best.tolist()
    places = [place for place, row in enumerate(rows) if row.params.temperature > 0]
    if not places:
        return tokens
    drawn = [rows[place] for place in places]
    temperatures = torch.tensor([[row.params.temperature] for row in drawn], device=logits.device)
    if len(drawn) < len(rows):
        logits, highest = logits[places], highest[places]
    weights = _weights(logits, highest, temperatures, exponentials)  # (drawn, V)
    for weight, row in zip(weights, drawn, strict=True):
        weight.copy_(truncated(weight, row.params))
    numbers = [uniform(row.params.seed, row.position) for row in drawn]
    for place, token in zip(places, _draw(weights, numbers), strict=True):
        tokens[place] = token
    return tokens


def _weights(
    logits: Tensor, best: Tensor, temperature: Tensor | float, exponentials: Exponentials
) -> Tensor:
    """Returns probabilities (B, V) in units of 2⁻ⁿ of the most probable token's, int64, with the n
    for which no sum of V of them overflows: 44 for 200,000 tokens."""
    shifted = (logits.float() - best).div_(temperature)
    shares = exponentials(shifted.clamp_(min=_LEAST_EXPONENT))
    return shares.mul_(2.0 ** (62 - logits.shape[-1].bit_length())).long()


def _draw(weights: Tensor, numbers: list[float]) -> list[int]:
    """Returns the tokens of weights (B, V) in whose shares of the total, in the order of ids, the
    numbers fall.

    It sums groups of 256 tokens, then within one of them: all sums would take longer than the
    model's step.
    """
    missing = -weights.shape[1] % 256
    groups = F.pad(weights, (0, missing)).unflatten(1, (-1, 256))  # (B, V / 256, 256)
    borders = groups.sum(dim=-1).cumsum(dim=-1)  # (B, V / 256)
    totals: list[int] = borders[:, -1].tolist()
    # Exact: the products have up to 110 bits.
    places = [
        int(number * 2**_NUMBER_BITS) * total >> _NUMBER_BITS
        for number, total in zip(numbers, totals, strict=True)
    ]
    targets = torch.tensor(places, device=weights.device)[:, None]  # (B, 1), each below its total
    # The first border above the number: a token without weight has no room between borders.
    group = torch.searchsorted(borders, targets, right=True)
    before = F.pad(borders, (1, 0)).gather(1, group)
    rows = torch.arange(len(groups), device=weights.device)
    inside = groups[rows, group[:, 0]].cumsum(dim=-1)  # (B, 256)
    token = 256 * group + torch.searchsorted(inside, targets - before, right=True)
    return token[:, 0].tolist()


def adjusted(logits: Tensor, row: SamplingRow) -> Tensor:
    """Returns logits (V,) with the row's biases and penalties, and -inf for its forbidden
    tokens."""
    params = row.params
    if not row.adjusts_logits:
        return logits
    logits = logits.clone()
    if params.logit_bias:
        ids, biases = zip(*params.logit_bias, strict=True)
        logits[list(ids)] += torch.tensor(biases, dtype=logits.dtype, device=logits.device)
    prompt = torch.tensor(row.prompt_ids, dtype=torch.long, device=logits.device)
    output = torch.tensor(row.output_ids, dtype=torch.long, device=logits.device)
    seen = torch.cat((prompt, output)).unique()
    values, penalty = logits[seen], params.repetition_penalty
    logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    ids, counts = output.unique(return_counts=True)
    logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
    if row.forbidden_ids:
        logits[list(row.forbidden_ids)] = -torch.inf
    return logits


def distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """Returns probabilities (V,), float64, after temperature (> 0), top-k, top-p and min-p, in this
    order."""
    weights = _weights(logits, logits.max(), params.temperature, torch.exp_)
    left = truncated(weights, params).double()
    return left / left.sum()


def truncated(weights: Tensor, params: SamplingParams) -> Tensor:
    """Returns weights (V,), whole numbers, with zeros for the tokens that top-k, top-p and min-p
    leave out."""
    if 0 < params.top_k < len(weights):
        weights = _heaviest(weights, params.top_k)
    if params.top_p < 1:
        weights = _heaviest(weights, _num_needed(weights, params.top_p))
    if params.min_p > 0:
        weights = torch.where(weights >= params.min_p * weights.max().item(), weights, 0)
    return weights


def _heaviest(weights: Tensor, count: int) -> Tensor:
    """Returns weights (V,) with zeros for all but `count`; among equals the lower ids are kept."""
    border = weights.topk(count).values[-1]
    above = weights > border
    equal = weights == border
    num_equal = count - above.sum()
    keep = above | (equal & (equal.cumsum(dim=0) <= num_equal))
    return torch.where(keep, weights, 0)


def _num_needed(weights: Tensor, top_p: float) -> int:
    """Returns the fewest of weights (V,) that reach this share of their sum."""
    needed = math.ceil(top_p * weights.sum().item())
    count = 256  # almost always enough, and takes a fraction of the time of ranking all of them
    while True:
        count = min(count, len(weights))
        ranked = weights.topk(count).values
        kept = ranked.cumsum(dim=0) - ranked < needed
        if count == len(weights) or not kept[-1]:
            return int(kept.sum())
        count *= 16


def uniform(seed: int | None, position: int) -> float:
    """Returns a number of [0, 1), a multiple of 2⁻⁴⁸, from BLAKE2b of `seed:position`."""
    assert seed is not None, "sampling needs SamplingParams.with_seed()"
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=6).digest()
    return int.from_bytes(digest) / 2**_NUMBER_BITS

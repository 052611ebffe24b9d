"""A look inside one query: the decoder's steps one by one, with the values that pass through them
and their times.

It computes what `GPT` and `generate` compute, but more slowly, as SDPA never reveals its attention
weights.

Shapes: N new tokens of a call, P tokens read so far, C model width, H heads of width D, V
vocabulary, B = 1.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.body import Block
from model.generation.sampling import SamplingRow, adjusted, distribution, sample
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from model.kv_cache import for_each_head

Clock = Callable[[], float]


class QueryStage(NamedTuple):
    name: str
    layer: int | None
    shape: tuple[int, ...]
    seconds: float


class TimeSpan(NamedTuple):
    """One piece of a query's time, on the given clock."""

    name: str
    start_s: float
    end_s: float


class Attention(NamedTuple):
    """One layer's attention."""

    weights: Tensor  # (H, N, P), fp32; a row sums to 1, and is 0 beyond its own position
    values: Tensor  # (H, P, D)


class AttentionReading(NamedTuple):
    """The result of reading some tokens."""

    stages: list[QueryStage]
    attention: list[Attention]  # by layer
    logits: Tensor  # (N, V), fp32


@dataclass(frozen=True)
class Query:
    """A prompt and its continuation. The last token is drawn and not read: it has no row in any
    `AttentionReading`."""

    token_ids: list[int]
    num_prompt_tokens: int
    # Of each new token, after temperature, top-k, top-p and min-p; 1 when greedy
    drawn_probabilities: list[float]
    readings: list[AttentionReading]  # of the prompt, then of each new token
    spans: list[TimeSpan]

    @property
    def logits(self) -> Tensor:
        """The logits (T, V) after each token that was read."""
        return torch.cat([reading.logits for reading in self.readings])

    def attention_rows(self, *, layer: int, head: int) -> list[Tensor]:
        """Returns for each token that was read its weights on the tokens up to itself: 1, 2, … T of
        them."""
        rows = [row for reading in self.readings for row in reading.attention[layer].weights[head]]
        return [row[: position + 1] for position, row in enumerate(rows)]


class Candidate(NamedTuple):
    token_id: int
    logit: float
    probability: float
    rank: int  # 1 is the most probable; equals share the better rank


class Prediction(NamedTuple):
    """The model's expectation of a token."""

    entropy_nats: float
    top: list[Candidate]


class AttentionReader:
    """Reads a sequence piece by piece, and keeps the keys and values of the pieces read: a `Window`
    for the model's attention, which shows its weights."""

    def __init__(self, model: GPT, *, clock: Clock = time.monotonic) -> None:
        self._model = model
        self._clock = clock
        config, parameter = model.config, next(model.parameters())
        empty = torch.empty(
            (config.num_kv_heads, 0, config.head_dim),
            dtype=parameter.dtype,
            device=parameter.device,
        )
        self._past = [(empty, empty)] * config.n_layer
        self._attention: list[Attention] = []  # of the layers that the present call has reached

    @torch.inference_mode()
    def read(self, token_ids: Sequence[int]) -> AttentionReading:
        """Reads the next tokens, at the positions after those read before."""
        body = self._model.body
        stages: list[QueryStage] = []
        self._attention = []
        last_s = self._clock()

        def done(name: str, value: Tensor, *, layer: int | None = None) -> None:
            nonlocal last_s
            now_s = self._clock()
            stages.append(QueryStage(name, layer, tuple(value.shape), now_s - last_s))
            last_s = now_s

        first, device = self._past[0][0].shape[1], self._past[0][0].device
        ids = torch.tensor([token_ids], device=device)  # (1, N)
        x = body.token_embedding(ids)  # (1, N, C)
        done("token embedding", x)
        positions = torch.arange(first, first + len(token_ids), device=device)
        for_blocks = body.for_blocks(positions[None])
        if body.position_embedding is not None:
            x = x + body.position_embedding(positions)
            done("position embedding", x)
        for layer, block in enumerate(body.blocks):
            assert isinstance(block, Block)
            x = block.attended(x, self, None, *for_blocks)
            done("attention", self._attention[layer].weights[None], layer=layer)  # (1, H, N, P)
            x = block.fed_forward(x)
            done("mlp", x, layer=layer)
        x = body.last_norm(x)
        done("final norm", x)
        logits = self._model.logits(x)  # (1, N, V)
        done("logits", logits)
        done("softmax", logits.softmax(dim=-1))
        return AttentionReading(stages, self._attention, logits[0])

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Returns the attention of the new tokens (1, H, N, D) to themselves and to all tokens read
        before."""
        past_keys, past_values = self._past[layer]  # (G, P - N, D)
        seen_keys = torch.cat((past_keys, keys[0]), dim=1)
        seen_values = torch.cat((past_values, values[0]), dim=1)
        self._past[layer] = seen_keys, seen_values  # (G, P, D)
        seen_keys, seen_values = (
            for_each_head(part, queries.shape[1], dim=0) for part in (seen_keys, seen_values)
        )
        # (H, N, P)
        scores = (queries[0] @ seen_keys.transpose(1, 2)).float() / math.sqrt(queries.shape[-1])
        seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).tril(
            past_keys.shape[1]
        )
        weights = scores.masked_fill(~seen, -math.inf).softmax(dim=-1)
        self._attention.append(Attention(weights, seen_values))
        return (weights.to(seen_values.dtype) @ seen_values)[None]


def run_query(
    model: GPT,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    params: SamplingParams,
    eos_id: int | None = None,
    clock: Clock = time.monotonic,
) -> Query:
    """Prefills, then samples and decodes up to `max_tokens` times; `eos_id`, when drawn, is the
    last token. The tokens are the same as from `generate`. The caller has checked that all of them
    fit into the context.

    Raises `FloatingPointError` when the logits are not finite numbers.
    """
    begun_s = clock()
    params = params.with_seed()
    reader = AttentionReader(model, clock=clock)
    spans: list[TimeSpan] = []
    drawn: list[float] = []
    output_ids: list[int] = []

    def end_span(name: str) -> None:
        """Ends the span that began where the one before it ended, so that no time lies between
        two."""
        spans.append(TimeSpan(name, spans[-1].end_s if spans else begun_s, clock()))

    readings = [reader.read(prompt_ids)]
    end_span("prefill")
    while len(output_ids) < max_tokens:
        row = SamplingRow(
            params, prompt_ids, output_ids, position=len(prompt_ids) + len(output_ids)
        )
        logits = readings[-1].logits[-1]  # (V,)
        token_id = sample(
            logits, params, prompt_ids=prompt_ids, output_ids=output_ids, position=row.position
        )
        drawn.append(
            float(distribution(adjusted(logits, row), params)[token_id])
            if params.temperature
            else 1.0
        )
        output_ids.append(token_id)
        end_span("sample")
        if token_id == eos_id or len(output_ids) == max_tokens:
            break
        readings.append(reader.read([token_id]))
        end_span("decode")
    return Query([*prompt_ids, *output_ids], len(prompt_ids), drawn, readings, spans)


def predictions(logits: Tensor, *, num_top: int) -> list[Prediction]:
    """Returns the entropy and the most probable tokens of each row of logits (T, V)."""
    logprobs = logits.log_softmax(dim=-1)
    entropies = -(logprobs.exp() * logprobs).nan_to_num(0.0).sum(dim=-1)  # p log p is 0 where p is
    values, ids = logits.topk(min(num_top, logits.shape[-1]), dim=-1)  # (T, num_top)
    probabilities = logprobs.gather(1, ids).exp()
    ranks = 1 + (values[:, None] > values[..., None]).sum(dim=-1)
    rows = zip(
        entropies.tolist(),
        *(part.tolist() for part in (ids, values, probabilities, ranks)),
        strict=True,
    )
    return [Prediction(entropy, list(map(Candidate, *top))) for entropy, *top in rows]


def score(logits: Tensor, token_ids: Sequence[int]) -> list[Candidate]:
    """Returns how each row of logits (T, V) rates its own token of `token_ids` (T)."""
    # (T, 1)
    own = logits.gather(1, torch.tensor(token_ids, dtype=torch.long, device=logits.device)[:, None])
    probabilities = (own - logits.logsumexp(dim=-1, keepdim=True)).exp()[:, 0]
    ranks = 1 + (logits > own).sum(dim=-1)
    rows = zip(token_ids, own[:, 0].tolist(), probabilities.tolist(), ranks.tolist(), strict=True)
    return [Candidate(*row) for row in rows]


@torch.inference_mode()
def nearest_tokens(
    model: GPT, token_ids: Sequence[int], *, num_nearest: int
) -> list[list[tuple[int, float]]]:
    """Returns for each token the ids of others whose embeddings point in the most similar
    directions, with cosines."""
    table = model.token_embedding.weight  # (V, C)
    norms = torch.linalg.vector_norm(table, dim=-1, dtype=torch.float32)  # (V,)
    ids = torch.tensor(token_ids, device=table.device)
    cosines = (table[ids] @ table.T).float() / (norms[ids, None] * norms).clamp(min=1e-12)  # (T, V)
    cosines.scatter_(1, ids[:, None], -math.inf)
    values, nearest = cosines.topk(min(num_nearest, len(table) - 1), dim=-1)
    rows = zip(nearest.tolist(), values.tolist(), strict=True)
    return [
        list(zip(ids_of_row, cosines_of_row, strict=True)) for ids_of_row, cosines_of_row in rows
    ]

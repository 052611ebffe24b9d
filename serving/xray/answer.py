"""Builds the answer of /v1/xray: what happened in a query, with each token's text beside its
numbers.

Shapes: T tokens read, C model width, V vocabulary.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import orjson
import torch

from model.gpt import GPT
from model.insight.xray import (
    Candidate,
    Query,
    TimeSpan,
    nearest_tokens,
    predictions,
    run_query,
    score,
)
from model.tables import read_table
from serving.protocol.errors import ApiError
from serving.protocol.protocol import sampling_of
from serving.protocol.served_model import ServedModel
from serving.xray.xray import MAX_SEQUENCE_TOKENS, MAX_WEIGHTS, XrayRequest

NUM_NEAREST = 5


@torch.inference_mode()
def xray_answer(
    request: XrayRequest, *, model: GPT, served: ServedModel, arrived_s: float
) -> bytes:
    """Returns the JSON body. `arrived_s` is the time of the request, on the clock that all
    processes of a machine share.

    Raises `ApiError` (400) for a request over the limits, and `FloatingPointError` for a model
    whose logits are NaN.
    """
    spans = [TimeSpan("queue", arrived_s, time.monotonic())]
    prompt_ids = served.prompt_ids(request.prompt, max_tokens=request.max_tokens)
    _check_limits(request, model, num_tokens=len(prompt_ids) + request.max_tokens)
    params = sampling_of(request).with_seed()
    spans.append(TimeSpan("tokenize", spans[-1].end_s, time.monotonic()))
    query = run_query(
        model, prompt_ids, max_tokens=request.max_tokens, params=params, eos_id=served.eos_id
    )
    spans += query.spans
    text_ids = query.token_ids[query.num_prompt_tokens :]
    stopped = bool(text_ids) and text_ids[-1] == served.eos_id
    text = b"".join(map(served.token_bytes, text_ids[:-1] if stopped else text_ids)).decode(
        errors="replace"
    )
    spans.append(TimeSpan("detokenize", spans[-1].end_s, time.monotonic()))
    body = orjson.dumps(
        {
            "object": "xray",
            "model": served.name,
            "version": served.version,
            "step": None if served.metadata is None else served.metadata.step,
            "text": text,
            "finish_reason": "stop" if stopped else "length",
            "seed": params.seed,
            "num_prompt_tokens": query.num_prompt_tokens,
            "num_layers": model.config.n_layer,
            "num_heads": model.config.n_head,
            "tokens": _tokens(query, model, served),
            "predictions": [
                {
                    "entropy_nats": p.entropy_nats,
                    "top": [_scored(c.token_id, c, served) for c in p.top],
                }
                for p in predictions(query.logits, num_top=request.top)
            ],
            "stages": _stages(query, request, model, served, spans),
            "attention": list(_attention(query, request, model)),
        }
    )
    # The rest is the extra work of an x-ray, including the JSON above.
    spans.append(TimeSpan("inspect", spans[-1].end_s, time.monotonic()))
    pieces = [
        {"name": s.name, "start_ms": (s.start_s - arrived_s) * 1e3, "ms": _ms(s)} for s in spans
    ]
    total_ms = (time.monotonic() - arrived_s) * 1e3  # measured separately from the spans
    return (
        body[:-1] + b',"timeline":' + orjson.dumps({"total_ms": total_ms, "spans": pieces}) + b"}"
    )


def _check_limits(request: XrayRequest, model: GPT, *, num_tokens: int) -> None:
    if num_tokens > MAX_SEQUENCE_TOKENS:
        raise ApiError(
            f"{num_tokens} tokens were asked for ({num_tokens - request.max_tokens} in the prompt, "
            f"{request.max_tokens} in max_tokens), an x-ray shows at most {MAX_SEQUENCE_TOKENS}; shorten the prompt",
            param="prompt",
        )
    config = model.config
    for name, indices, count in (
        ("layers", request.layers, config.n_layer),
        ("heads", request.heads, config.n_head),
    ):
        for index in indices or []:
            if index >= count:
                raise ApiError(
                    f"{name}: {index} is not one of this model's, 0 to {count - 1}", param=name
                )
    num_maps = len(request.layers) * (len(request.heads) if request.heads else config.n_head)
    num_weights = num_maps * num_tokens * (num_tokens + 1) // 2
    if num_weights > MAX_WEIGHTS:
        raise ApiError(
            f"{num_maps} attention maps of {num_tokens} tokens hold {num_weights} numbers, at most {MAX_WEIGHTS} are "
            "given in one answer; ask for fewer layers or heads",
            param="layers",
        )


def _tokens(query: Query, model: GPT, served: ServedModel) -> list[dict[str, Any]]:
    ids = query.token_ids
    # The first has none
    scores: list[Candidate | None] = [None, *score(query.logits[: len(ids) - 1], ids[1:])]
    norms = model.token_embedding.weight[ids].float().norm(dim=-1).tolist()  # (T,)
    position_norms: list[Any] = [None] * len(ids)  # rotary positions add nothing
    if (embedding := model.body.position_embedding) is not None:
        position_norms = embedding.weight[: len(ids)].float().norm(dim=-1).tolist()
    distinct = sorted(set(ids))
    nearest = dict(
        zip(distinct, nearest_tokens(model, distinct, num_nearest=NUM_NEAREST), strict=True)
    )
    ends = list(
        itertools.accumulate((len(served.token_bytes(token_id)) for token_id in ids), initial=0)
    )
    drawn = [None] * query.num_prompt_tokens + query.drawn_probabilities
    return [
        _scored(token_id, scores[index], served)
        | {
            "bytes": ends[index : index + 2],
            "generated": index >= query.num_prompt_tokens,
            "drawn_probability": drawn[index],
            "embedding_norm": embedding_norm,
            "position_norm": position_norm,
            "nearest": [
                _token(near_id, served) | {"cosine": cosine}
                for near_id, cosine in nearest[token_id]
            ],
        }
        for index, (token_id, embedding_norm, position_norm) in enumerate(
            zip(ids, norms, position_norms, strict=True)
        )
    ]


def _token(token_id: int, served: ServedModel) -> dict[str, Any]:
    return {"id": token_id, "text": served.token_name(token_id)}


def _scored(token_id: int, candidate: Candidate | None, served: ServedModel) -> dict[str, Any]:
    scores = {
        name: candidate and getattr(candidate, name) for name in ("logit", "probability", "rank")
    }
    return _token(token_id, served) | scores


def _stages(
    query: Query, request: XrayRequest, model: GPT, served: ServedModel, spans: list[TimeSpan]
) -> list[dict[str, Any]]:
    """Returns the stages of the prompt, in order. Each new token passes through those from the
    embedding on."""
    tokenizer = served.tokenizer
    normalizer = None if tokenizer is None else tokenizer.backend.normalizer
    normalized = type(normalizer).__name__ if normalizer else "the text stays as it is"
    tokenize = next(span for span in spans if span.name == "tokenize")
    shape = [1, query.num_prompt_tokens]
    to_ids = f"to ids below {model.config.vocab_size:,}"
    stages = [
        _stage("normalize", normalized),
        _stage("tokenize", to_ids, shape=shape, ms=_ms(tokenize)),
    ]
    notes = read_table(__file__, "stages")
    stages += [
        _stage(s.name, notes[s.name], layer=s.layer, shape=s.shape, ms=s.seconds * 1e3)
        for s in query.readings[0].stages
    ]
    if sampled := [s for s in query.spans if s.name == "sample"]:
        how = (
            "the most probable"
            if request.temperature == 0
            else f"drawn at temperature {request.temperature:g}"
        )
        stages.append(_stage("sampling", how, shape=[1, 1], ms=_ms(sampled[0])))
    return stages


def _stage(
    name: str,
    note: str,
    *,
    layer: int | None = None,
    shape: Sequence[int] | None = None,
    ms: float | None = None,
) -> dict[str, Any]:
    return {"name": name, "layer": layer, "shape": shape, "ms": ms, "note": note}


def _attention(query: Query, request: XrayRequest, model: GPT) -> Iterator[dict[str, Any]]:
    """Yields rows of 1, 2, … T weights, rounded to 7 decimals: T of them still add up to 1 within
    1e-5."""
    heads = range(model.config.n_head) if request.heads is None else request.heads
    for layer in request.layers:
        for head in heads:
            rows = [
                row.double().mul(1e7).round().div(1e7).tolist()
                for row in query.attention_rows(layer=layer, head=head)
            ]
            yield {"layer": layer, "head": head, "rows": rows}


def _ms(span: TimeSpan) -> float:
    return (span.end_s - span.start_s) * 1e3

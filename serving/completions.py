"""The life of a completion request: admitted, turned into sequences, answered whole or as a stream of events."""

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import orjson

from model.sampling import SamplingParams
from serving.answers import Answer
from serving.choice_output import ChoiceOutput, join_parts
from serving.engine_client import EngineClient, EngineDiedError, Generation
from serving.errors import ApiError, engine_unavailable, internal_error, invalid_request, overloaded
from serving.messages import FinishReason, SequenceRequest
from serving.metrics import ReplicaMetrics, RequestTimer
from serving.protocol import Choice, CompletionRequest, Usage
from serving.served_model import ServedModel


@dataclass(frozen=True)
class AdmissionLimits:
    """What a replica takes on at once; more gets 429."""

    max_requests: int
    max_sequences: int  # running and waiting ones; each prompt and each choice of a request is one


class Completion:
    """A request that the engine works on. `close` frees its slots, whatever became of it."""

    def __init__(
        self,
        request: CompletionRequest,
        *,
        answer: Answer,
        model: ServedModel,
        sequences: list[SequenceRequest],
        generation: Generation,
        timer: RequestTimer,
    ) -> None:
        self._request = request
        self._answer = answer
        self._generation = generation
        self._timer = timer
        self._choices = {
            sequence.seq_id: ChoiceOutput(index, sequence, request, model) for index, sequence in enumerate(sequences)
        }
        # A prompt counts once, however many choices it has.
        self._num_prompt_tokens = sum(len(sequence.prompt_ids) for sequence in sequences[:: request.n])

    def close(self) -> None:
        self._generation.close()
        self._timer.close()

    async def respond(self) -> bytes:
        """The whole answer, as JSON. Raises `ApiError` when the engine fails."""
        parts: dict[int, list[Choice]] = {}
        async for part in self._parts():
            parts.setdefault(part.index, []).append(part)
        return to_json(self._answer.whole([join_parts(parts[index]) for index in sorted(parts)], self._usage()))

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events. A failure is an event too, and then no `[DONE]` follows: a client cannot mistake half
        an answer for a whole one."""
        options = self._request.stream_options
        try:
            async for part in self._parts():
                yield b"data: %b\n\n" % to_json(self._answer.part(part))
        except ApiError as error:
            yield error.event().encode()
            return
        if options is not None and options.include_usage:
            yield b"data: %b\n\n" % to_json(self._answer.usage_part(self._usage()))
        yield b"data: [DONE]\n\n"

    async def _parts(self) -> AsyncIterator[Choice]:
        try:
            async for event in self._generation:
                if event.finish_reason is FinishReason.ERROR:
                    self._timer.finished(event.seq_id, FinishReason.ERROR)
                    raise internal_error("The model gave logits that are not finite numbers for this prompt.")
                if event.token_id is not None:
                    self._timer.token(event.seq_id)
                part = self._choices[event.seq_id].push(event)
                if part.finish_reason is not None:
                    self._timer.finished(event.seq_id, part.finish_reason)
                    self._generation.cancel(event.seq_id)  # a stop string ends what the engine would go on with
                yield part
        except EngineDiedError:
            raise engine_unavailable() from None

    def _usage(self) -> Usage:
        num_output_tokens = sum(choice.num_output_tokens for choice in self._choices.values())
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=num_output_tokens,
            total_tokens=self._num_prompt_tokens + num_output_tokens,
        )


async def start_completion(
    request: CompletionRequest,
    *,
    answer: Answer,
    model: ServedModel,
    engine: EngineClient,
    metrics: ReplicaMetrics,
    limits: AdmissionLimits,
) -> Completion:
    """Admits a request to the engine. Raises `ApiError`: 400 for a request that cannot be served, 429 when there is
    no room for it now, 503 without an engine."""
    num_sequences = len(request.prompt) * request.n
    if num_sequences > limits.max_sequences:
        raise invalid_request(
            f"The request asks for {num_sequences} sequences ({len(request.prompt)} prompts, n={request.n}); "
            f"this endpoint holds {limits.max_sequences} at once",
            param="n",
        )
    _refuse_when_full(engine, num_sequences, limits)
    model.checked_ids(list(request.logit_bias), param="logit_bias")
    if request.stop:
        model.require_tokenizer()
    # Tokenizing a long prompt takes milliseconds that other streams' tokens would wait for.
    prompts = await asyncio.to_thread(
        lambda: [model.prompt_ids(prompt, max_tokens=request.max_tokens) for prompt in request.prompt]
    )
    _refuse_when_full(engine, num_sequences, limits)
    sequences = [
        SequenceRequest(
            seq_id=engine.next_seq_id(),
            prompt_ids=prompt_ids,
            max_tokens=request.max_tokens,
            sampling=_sampling(request, seed=choice_seed(seed, index)),
            ignore_eos=request.ignore_eos,
            num_logprobs=request.logprobs,
            prompt_logprobs=request.echo and request.logprobs is not None,
        )
        for prompt_ids in prompts
        for seed in [secrets.randbits(63) if request.seed is None else request.seed]
        for index in range(request.n)
    ]
    try:
        generation = engine.submit(sequences)
    except EngineDiedError:
        raise engine_unavailable() from None
    timer = metrics.start_request(
        [sequence.seq_id for sequence in sequences], num_prompt_tokens=sum(len(prompt_ids) for prompt_ids in prompts)
    )
    return Completion(request, answer=answer, model=model, sequences=sequences, generation=generation, timer=timer)


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice `index`: the request's own for the first, so that n=1 is the first choice of any n."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8]) >> 1


def to_json(answer: dict[str, Any]) -> bytes:
    return orjson.dumps(answer)


def _refuse_when_full(engine: EngineClient, num_sequences: int, limits: AdmissionLimits) -> None:
    if engine.num_open_requests >= limits.max_requests:
        raise overloaded(f"The replica is at its limit of {limits.max_requests} requests; try again later")
    if engine.num_open_sequences + num_sequences > limits.max_sequences:
        raise overloaded(
            f"The replica is at its limit of {limits.max_sequences} running and waiting sequences "
            f"({engine.num_open_sequences} now, {num_sequences} asked for); try again later"
        )


def _sampling(request: CompletionRequest, *, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=request.temperature,
        top_k=max(request.top_k, 0),
        top_p=request.top_p,
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=tuple(request.logit_bias.items()),
        seed=seed,
    )

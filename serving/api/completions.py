"""The life of a completion request: admitted, turned into sequences, answered whole or as a stream of events."""

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator
from typing import Any

import orjson

from model.sampling import SamplingParams
from serving.api.admission import AdmissionLimits, refuse_when_full, waited_too_long
from serving.api.answers import Answer
from serving.api.choice_output import ChoiceOutput, SharedEchoes, join_parts
from serving.api.metrics import ReplicaMetrics, RequestTimer
from serving.delivery.loaded_version import LoadedVersion
from serving.engine.messages import FinishReason, SequenceRequest
from serving.engine_process.client import EngineDiedError, Generation
from serving.protocol.errors import ApiError, engine_unavailable, internal_error, invalid_request
from serving.protocol.protocol import Choice, CompletionRequest, Usage
from serving.protocol.served_model import ServedModel


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
        self._echoes = None
        if request.echo and request.logprobs is not None:
            self._echoes = SharedEchoes([sequence.seq_id for sequence in sequences], num_choices=request.n)
        self._parts = self._generated_parts()
        self._first_part: Choice | None = None
        # A prompt counts once, however many choices it has.
        self._num_prompt_tokens = sum(len(sequence.prompt_ids) for sequence in sequences[:: request.n])

    def close(self) -> None:
        self._generation.close()
        self._timer.close()

    async def begin(self) -> None:
        """Waits for the first token, and so until the request can be answered: what fails before it has a status.
        Raises `ApiError`."""
        self._first_part = await anext(self._parts)

    async def respond(self) -> bytes:
        """The whole answer, as JSON. Raises `ApiError` when the engine fails."""
        parts: dict[int, list[Choice]] = {}
        async for part in self._all_parts():
            parts.setdefault(part.index, []).append(part)
        return to_json(self._answer.whole([join_parts(parts[index]) for index in sorted(parts)], self._usage()))

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events. A failure is an event too, and then no `[DONE]` follows: a client cannot mistake half
        an answer for a whole one."""
        options = self._request.stream_options
        has_usage = options is not None and options.include_usage
        is_counted = has_usage and options is not None and options.continuous_usage_stats
        try:
            async for part in self._all_parts():
                yield b"data: %b\n\n" % to_json(self._answer.part(part, self._usage() if is_counted else None))
        except ApiError as error:
            yield error.event().encode()
            return
        if has_usage:
            yield b"data: %b\n\n" % to_json(self._answer.usage_part(self._usage()))
        yield b"data: [DONE]\n\n"

    async def _all_parts(self) -> AsyncIterator[Choice]:
        assert self._first_part is not None, "begin() comes first"
        yield self._first_part
        async for part in self._parts:
            yield part

    async def _generated_parts(self) -> AsyncIterator[Choice]:
        finished: set[int] = set()
        try:
            async for arrived in self._generation:
                if arrived.finish_reason is FinishReason.ERROR:
                    self._timer.finished(arrived.seq_id, FinishReason.ERROR)
                    raise internal_error("The model gave logits that are not finite numbers for this prompt.")
                for event in [arrived] if self._echoes is None else self._echoes.complete(arrived):
                    if event.seq_id in finished:  # by a stop string, in an event that was held back with this one
                        continue
                    if event.token_id is not None:
                        self._timer.token(event.seq_id)
                    part = self._choices[event.seq_id].push(event)
                    if part.finish_reason is not None:
                        finished.add(event.seq_id)
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
    version: LoadedVersion,
    metrics: ReplicaMetrics,
    limits: AdmissionLimits,
) -> Completion:
    """Admits a request to the engine of `version`, and returns with its first token. Raises `ApiError`: 400 for a
    request that cannot be served, 429 when there is no room for it now, 503 without an engine."""
    model, engine = version.model, version.engine
    num_sequences = len(request.prompt) * request.n
    if num_sequences > limits.max_sequences:
        raise invalid_request(
            f"The request asks for {num_sequences} sequences ({len(request.prompt)} prompts, n={request.n}); "
            f"this endpoint holds {limits.max_sequences} at once; ask for fewer",
            param="n",
        )
    refuse_when_full(engine, num_sequences, limits)
    model.checked_ids(list(request.logit_bias), param="logit_bias")
    if request.stop:
        model.require_tokenizer()
    # Tokenizing a long prompt takes milliseconds that other streams' tokens would wait for.
    prompts = await asyncio.to_thread(
        lambda: [model.prompt_ids(prompt, max_tokens=request.max_tokens) for prompt in request.prompt]
    )
    refuse_when_full(engine, num_sequences, limits)
    sequences = [
        SequenceRequest(
            seq_id=engine.next_seq_id(),
            prompt_ids=prompt_ids,
            max_tokens=request.max_tokens,
            sampling=_sampling(request, seed=choice_seed(seed, index)),
            ignore_eos=request.ignore_eos,
            num_logprobs=request.logprobs,
            prompt_logprobs=request.echo and request.logprobs is not None and index == 0,
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
        [sequence.seq_id for sequence in sequences],
        num_prompt_tokens=sum(len(prompt_ids) for prompt_ids in prompts),
        stats=version.stats,
    )
    completion = Completion(
        request, answer=answer, model=model, sequences=sequences, generation=generation, timer=timer
    )
    try:
        async with asyncio.timeout(limits.max_queue_s):
            await generation.has_begun.wait()
        await completion.begin()
    except TimeoutError:
        completion.close()
        raise waited_too_long(limits) from None
    except BaseException:  # a client that leaves too
        completion.close()
        raise
    return completion


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice `index`: the request's own for the first, so that n=1 is the first choice of any n."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8]) >> 1


def to_json(answer: dict[str, Any]) -> bytes:
    return orjson.dumps(answer)


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

"""Admits a completion request and turns it into sequences, or refuses it."""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

from cluster.settings.serve import ServeConfig
from model.files.bounded_text import TextError
from serving.api.completions import Completion
from serving.api.key_limits import Reservation
from serving.api.metrics import ReplicaMetrics, RequestTimer, WatchedSteps
from serving.api.score_limit import prompt_candidates, require_few_scores
from serving.delivery.loaded_version import LoadedVersion
from serving.engine.messages import SequenceRequest
from serving.engine_process.client import EngineClient, EngineDiedError
from serving.limits.asker import CURRENT_ASKER
from serving.output.answers import Answer
from serving.protocol.errors import ApiError, error_of, overloaded
from serving.protocol.protocol import CompletionRequest, choice_seed, sampling_of
from serving.protocol.request_facts import RequestFacts
from serving.protocol.served_model import ServedModel
from serving.structured.grammar import Grammar, GrammarError
from serving.text.grammar_check import GrammarsBusyError

# Characters or tokens of prompts that are read in the event loop: half a millisecond, while a thread costs
# a quarter of one
READ_AT_ONCE = 2_000
# Of the longest wait: a refusal at once is better than one after a wait that was misjudged
EXPECTED_SHARE = 0.8


async def start_completion(
    request: CompletionRequest,
    *,
    answer: Answer,
    version: LoadedVersion,
    metrics: ReplicaMetrics,
    config: ServeConfig,
    facts: RequestFacts,
    reserve: Callable[[int], Reservation],
) -> Completion:
    """Admits a request to the engine of `version`, and returns with its first token. Its key is
    charged by `reserve`. Raises `ApiError`: 400 for a request that cannot be served, 429 if there
    is no room for it now or its key has no tokens left, 503 without an engine."""
    model, engine, key = version.model, version.engine, facts.key or ""
    at_once, num_before = _num_at_once(request, engine, config), engine.num_submitted
    refuse_when_full(engine, at_once, config, key=key)
    _require_possible(request, model)
    if answer.EMBEDS and not engine.facts.embeds:
        raise error_of("unsupported_by_backend")
    grammar = await _checked_grammar(request, version)
    prompts = await _read_prompts(request, answer, version, config)
    if engine.num_submitted > num_before:  # others were faster
        refuse_when_full(engine, at_once, config, key=key)
    sequences = _sequences(
        request,
        prompts,
        version=version,
        engine=engine,
        embeds=answer.EMBEDS,
        grammar=grammar,
        cache_scope=key if config.engine.prefix_cache_scope == "key" else "",
    )
    require_few_scores(request, sequences)
    num_prompt_tokens = sum(map(len, prompts))
    num_open = sum(min(request.reserved_tokens, sequence.max_tokens) for sequence in sequences)
    reservation = reserve(num_prompt_tokens + num_open)
    counted = metrics.of(model.version)
    try:
        generation = engine.submit(
            sequences, at_once=at_once, key=key, observer=WatchedSteps(counted, version.stats)
        )
    except EngineDiedError:
        reservation.settle(prompt_tokens=0, generated_tokens=0)
        raise error_of("engine_unavailable") from None
    facts.queued_s = time.monotonic()
    counted.prompt_tokens.inc(num_prompt_tokens)
    completion = Completion(
        request,
        answer=answer,
        model=model,
        sequences=sequences,
        generation=generation,
        timer=RequestTimer.of(sequences, counted, version.stats, generation.entered_s),
        facts=facts,
        reservation=reservation,
        shows_cache=not key or config.engine.prefix_cache_scope == "key",
    )
    await completion.begin(max_queue_s=config.engine.max_queue_s)
    return completion


def _num_at_once(request: CompletionRequest, engine: EngineClient, config: ServeConfig) -> int:
    """Returns how many sequences of a request the engine gets at once: no more than keep it busy.
    The others wait here, and leave room for other requests."""
    num_slots = engine.facts.max_num_seqs
    most = min(2 * num_slots, num_slots + config.engine.waiting_room)
    return min(len(request.prompt) * request.n, most)


async def _checked_grammar(request: CompletionRequest, version: LoadedVersion) -> Grammar | None:
    """Returns what the answer follows, if anything. Raises `ApiError` as `require_grammar`."""
    grammar = request.read_grammar()
    if grammar is None:
        return None
    return await require_grammar(grammar, version, field=request.grammar_field)


async def require_grammar(grammar: Grammar, version: LoadedVersion, *, field: str) -> Grammar:
    """Returns a grammar with what it takes. Raises `ApiError` for the field of a request: 400 for
    what no answer can follow, 429 if others of its key wait that take long to compile."""
    version.model.require_tokenizer()
    try:
        return await version.grammars.require(grammar, CURRENT_ASKER.get())
    except GrammarsBusyError as error:
        raise overloaded(str(error)) from None
    except GrammarError as error:
        place = f" at #{error.place}" if error.place else ""
        raise error_of(
            "grammar_refused", param=field, field=field, place=place, problem=error.message
        ) from None


async def _read_prompts(
    request: CompletionRequest, answer: Answer, version: LoadedVersion, config: ServeConfig
) -> list[list[int]]:
    """Returns the prompts' tokens. Raises `ApiError` (400) for a prompt that leaves too few tokens
    to draw."""
    room = request.token_limit
    if config.engine.clip_max_tokens:
        room = min(room, 1)
    read = partial(
        version.model.prompt_ids,
        max_tokens=max(room, version.engine.facts.least_tokens),
        param=answer.PROMPT_FIELD,
        how=request.encoding,
    )
    try:
        texts = await version.texts.encoded(request.prompt, request.encoding)
    except TextError as error:
        raise ApiError(str(error), param=answer.PROMPT_FIELD, code="invalid_value") from None
    if sum(map(len, texts)) <= READ_AT_ONCE:
        return [read(text) for text in texts]
    # In the event loop other streams' tokens would wait for the milliseconds that it takes.
    return await asyncio.to_thread(lambda: [read(text) for text in texts])


def _sequences(
    request: CompletionRequest,
    prompts: Sequence[list[int]],
    *,
    version: LoadedVersion,
    engine: EngineClient,
    embeds: bool,
    grammar: Grammar | None,
    cache_scope: str,
) -> list[SequenceRequest]:
    """Returns what the engine gets: `n` choices of each prompt, one after the other."""
    sampling = sampling_of(request)
    scored = prompt_candidates(request)
    sequences = []
    for prompt_ids, choice in product(prompts, range(request.n)):
        most_tokens = version.model.config.n_positions - len(prompt_ids)
        sequence = SequenceRequest(
            seq_id=engine.next_seq_id(),
            prompt_ids=prompt_ids,
            max_tokens=min(request.token_limit, most_tokens),
            sampling=sampling
            if choice == 0 or sampling.seed is None
            else replace(sampling, seed=choice_seed(sampling.seed, choice)),
            ignore_eos=request.ignore_eos,
            stop_token_ids=tuple(request.stop_token_ids),
            min_tokens=min(request.min_tokens, most_tokens),
            num_logprobs=request.logprobs,
            # The other choices share them: see `SharedPrompts`
            num_prompt_logprobs=scored if choice == 0 else None,
            embed=embeds,
            grammar=grammar,
            cache_scope=cache_scope,
            weights=version.weights,
        )
        sequences.append(sequence)
    return sequences


def _require_possible(request: CompletionRequest, model: ServedModel) -> None:
    """Raises `ApiError` (400) for what this model cannot do, and for fields that contradict each
    other."""
    model.checked_ids(list(request.logit_bias), param="logit_bias")
    model.checked_ids(request.stop_token_ids, param="stop_token_ids")
    if request.stop:
        model.require_tokenizer()
    if request.min_tokens > request.token_limit:
        raise ApiError(
            f"min_tokens={request.min_tokens} exceeds the {request.token_limit} tokens of max_tokens",
            param="min_tokens",
        )
    if not request.min_tokens:
        return
    ending = {*request.stop_token_ids, *({model.eos_id} if model.eos_id is not None else ())}
    if len(ending) >= model.config.vocab_size:
        raise ApiError("stop_token_ids leave no token for min_tokens", param="stop_token_ids")


def refuse_when_full(
    engine: EngineClient, num_sequences: int, config: ServeConfig, *, key: str
) -> None:
    """Raises `ApiError` (429) if there is no room for as many more sequences, or only after too
    long a wait. The sequences that they would pass in the queue take no room from them: a key that
    fills the queue fills it for itself."""
    num_requests, num_others, wait_s = engine.ahead(key)
    max_requests = config.max_ongoing_requests
    max_sequences = engine.facts.max_num_seqs + config.engine.waiting_room
    max_queue_s = config.engine.max_queue_s
    if num_requests >= max_requests:
        raise overloaded(f"The replica is at its limit of {max_requests} requests; try again later")
    if num_others + num_sequences > max_sequences:
        raise overloaded(
            f"The replica is at its limit of {max_sequences} running and waiting sequences "
            f"({num_others} now, {num_sequences} asked for); try again later"
        )
    if wait_s > EXPECTED_SHARE * max_queue_s:
        raise overloaded(
            f"The request would wait about {wait_s:.1f} s, and {max_queue_s:g} s are the most; try again later",
            retry_after_s=max(1, math.ceil(wait_s - max_queue_s)),
        )

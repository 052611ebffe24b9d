"""Admits a completion request, turns it into sequences, and answers it whole or as a stream of
events."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from itertools import chain, product

import orjson

from cluster.settings.serve import ServeConfig
from model.files.bounded_text import TextError
from serving.api.answers import Answer, Usage
from serving.api.choice_output import ChoiceOutput, Part, join_parts
from serving.api.key_limits import Reservation
from serving.api.metrics import ReplicaMetrics, RequestTimer, WatchedSteps
from serving.api.score_limit import held_scores, prompt_candidates, require_few_scores
from serving.api.shared_prompts import SharedPrompts
from serving.delivery.loaded_version import LoadedVersion
from serving.engine.messages import FinishReason, SequenceRequest, TokenEvent
from serving.engine_process.client import EngineClient, EngineDiedError
from serving.engine_process.generation import Generation
from serving.limits.asker import CURRENT_ASKER
from serving.protocol.errors import ApiError, error_of, overloaded
from serving.protocol.protocol import CompletionRequest, StreamOptions, choice_seed, sampling_of
from serving.protocol.request_facts import RequestFacts
from serving.protocol.served_model import ServedModel
from serving.structured.grammar import Grammar, GrammarError
from serving.text.grammar_check import GrammarsBusyError

# log-probabilities written in the event loop; more would hold up other streams for milliseconds
SCORES_AT_ONCE = 5_000
# Characters or tokens of prompts that are read there too: half a millisecond, while a thread costs
# a quarter of one
READ_AT_ONCE = 2_000
# Of the longest wait: a refusal at once is better than one after a wait that was misjudged
EXPECTED_SHARE = 0.8

OnFirst = Callable[[], Awaitable[None]]


@dataclass(eq=False)
class Completion:
    """A request that the engine works on. `close` frees its slots, however it ended."""

    request: CompletionRequest
    _: KW_ONLY
    answer: Answer
    model: ServedModel
    sequences: list[SequenceRequest]
    generation: Generation
    timer: RequestTimer
    facts: RequestFacts
    reservation: Reservation
    # In the usage; to a key it would show what others have sent, where they share the cache
    shows_cache: bool

    def __post_init__(self) -> None:
        request, sequences = self.request, self.sequences
        self._choices = {
            s.seq_id: ChoiceOutput(i, s, request, self.model, shown=self.answer.shown)
            for i, s in enumerate(sequences)
        }
        self._prompts = SharedPrompts(sequences, num_choices=request.n)
        self._first_parts: Iterator[Part] = iter(())
        self._reasons: dict[int, str] = {}  # by choice that has ended
        self._failure: ApiError | None = None  # of a sequence
        self._has_failed = False  # by the engine's fault
        # A prompt counts once, however many choices it has.
        self._num_prompt_tokens = sum(
            len(sequence.prompt_ids) for sequence in sequences[:: request.n]
        )
        self.facts.prompt_tokens, self.facts.stream = self._num_prompt_tokens, request.stream

    def close(self) -> None:
        """Ends the request, and charges its key: with nothing if the engine has not begun or has
        failed."""
        self.generation.close()
        self.timer.close()
        has_begun = self.generation.has_begun.is_set()
        if has_begun and self.facts.last_token_s is None:
            self._complete_facts()
        costs = has_begun and not self._has_failed
        self.reservation.settle(
            prompt_tokens=self._num_prompt_tokens if costs else 0,
            generated_tokens=self._num_output_tokens if costs else 0,
        )

    async def begin(self) -> None:
        """Waits for the first token: a failure before it can still have an HTTP status. Raises
        `ApiError`."""
        first = None
        with self._death_told():
            while first is None:
                parts = self._parts_of(await self.generation.next())
                first = next(parts, None)
                self._require_success()
        self._first_parts = chain((first,), parts)

    async def respond(self) -> bytes:
        """Returns the whole answer as JSON. Raises `ApiError` if the engine fails."""
        parts: dict[int, list[Part]] = {}
        choices: dict[int, Part] = {}

        def keep(arrived: Iterator[Part]) -> None:
            for part in arrived:
                parts.setdefault(part.index, []).append(part)
                if part.finish_reason is not None:
                    choices[part.index] = join_parts(parts.pop(part.index))

        await self._hand_parts_to(keep)
        if held_scores(self.request, self.sequences) > SCORES_AT_ONCE:
            return await asyncio.to_thread(self._written, choices)
        return self._written(choices)

    def _written(self, choices: dict[int, Part]) -> bytes:
        return orjson.dumps(
            self.answer.whole([choices[index] for index in sorted(choices)], self._usage())
        )

    async def stream_to(
        self, write: Callable[[bytes], None], *, on_first: OnFirst | None = None
    ) -> None:
        """Writes server-sent events, together those that the engine reports together. A failure is
        an event too. Awaits `on_first` after the first write. Raises what both do."""
        options = self.request.stream_options or StreamOptions()
        is_counted = options.include_usage and options.continuous_usage_stats

        def send(parts: Iterator[Part]) -> None:
            sent = b""
            for part in parts:
                sent += self.answer.sent([part], self._usage() if is_counted else None)
            if sent:
                write(sent)

        try:
            await self._hand_parts_to(send, on_first=on_first)
        except ApiError as error:
            self.facts.reason = error.code
            write(self.answer.sent_failure(error))
            return
        usage_event = self.answer.sent([], self._usage()) if options.include_usage else b""
        write(usage_event + self.answer.sent_end())

    async def _hand_parts_to(
        self, take: Callable[[Iterator[Part]], None], *, on_first: OnFirst | None = None
    ) -> None:
        """Hands over all parts, those of a report together; `take` takes each of them. Raises
        `ApiError` after the parts before a failure."""

        def hand(parts: Iterator[Part]) -> None:
            take(parts)
            self.timer.count()
            self._require_success()

        try:
            hand(self._first_parts)
            if on_first is not None:
                await on_first()
            with self._death_told():
                await self.generation.hand_to(lambda events: hand(self._parts_of(events)))
        finally:
            self._complete_facts()

    def _require_success(self) -> None:
        if self._failure is not None:
            raise self._failure

    @contextmanager
    def _death_told(self) -> Iterator[None]:
        """Turns the engine's death into an `ApiError`."""
        try:
            yield
        except EngineDiedError:
            self._has_failed = True
            raise error_of("engine_unavailable") from None

    def _complete_facts(self) -> None:
        self.facts.reason = "+".join(sorted({*self._reasons.values()})) or None
        self.facts.last_token_s = time.monotonic()
        self.facts.completion_tokens = self._num_output_tokens

    def _parts_of(self, events: Iterator[TokenEvent]) -> Iterator[Part]:
        """Yields what events make final, up to a failure."""
        now_s = time.monotonic()
        for event in events:
            if event.finish_reason in (FinishReason.ERROR, FinishReason.GRAMMAR):
                self._fail(event.seq_id, event.finish_reason)
                return
            for answerable in self._prompts.take(event):
                # A stop string has ended it, and later tokens were waiting
                if answerable.seq_id not in self._reasons:
                    yield self._part_of(answerable, now_s)

    def _fail(self, seq_id: int, reason: FinishReason) -> None:
        self.timer.finished(seq_id, reason)
        if reason is FinishReason.GRAMMAR:
            self._failure = error_of("grammar_exceeded", param=self.request.grammar_field)
        else:
            self._has_failed = True
            self._failure = error_of("not_finite")

    def _part_of(self, event: TokenEvent, now_s: float) -> Part:
        """Returns what an event makes final. A choice that it ends leaves the engine."""
        if event.token_id is not None:
            self.timer.token(event.seq_id, now_s)
        part = self._choices[event.seq_id].push(event)
        if part.finish_reason is not None:
            self._reasons[event.seq_id] = part.finish_reason
            self.timer.finished(event.seq_id, part.finish_reason)
            self.generation.cancel(event.seq_id)  # the engine does not know of stop strings
        return part

    @property
    def _num_output_tokens(self) -> int:
        return sum(choice.num_output_tokens for choice in self._choices.values())

    def _usage(self) -> Usage:
        num_output_tokens = self._num_output_tokens
        usage: Usage = {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": num_output_tokens,
            "total_tokens": self._num_prompt_tokens + num_output_tokens,
        }
        if self.shows_cache:
            # As the prompt's tokens, which count once.
            first_choices = self.sequences[:: self.request.n]
            num_cached = sum(
                self.generation.num_found.get(sequence.seq_id, 0) for sequence in first_choices
            )
            usage["prompt_tokens_details"] = {"cached_tokens": num_cached}
        return usage


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
    at_once = _num_at_once(request, engine, config)
    refuse_when_full(engine, at_once, config, key=key)
    _require_possible(request, model)
    if answer.EMBEDS and not engine.facts.embeds:
        raise error_of("unsupported_by_backend")
    grammar = await _checked_grammar(request, version)
    prompts = await _read_prompts(request, answer, version, config)
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
    unfinished: dict[int, float | None] = dict.fromkeys(sequence.seq_id for sequence in sequences)
    timer = RequestTimer(counted, version.stats, generation.entered_s, unfinished)
    completion = Completion(
        request,
        answer=answer,
        model=model,
        sequences=sequences,
        generation=generation,
        timer=timer,
        facts=facts,
        reservation=reservation,
        shows_cache=not key or config.engine.prefix_cache_scope == "key",
    )
    await _begin(completion, max_queue_s=config.engine.max_queue_s)
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


async def _begin(completion: Completion, *, max_queue_s: float) -> None:
    """Returns with the first token, or closes the completion. Raises `ApiError`: 429 if the engine
    has not begun after so long."""
    facts = completion.facts
    try:
        async with asyncio.timeout(max_queue_s):
            await completion.generation.has_begun.wait()
        facts.begun_s = time.monotonic()
        await completion.begin()
        facts.first_token_s = time.monotonic()
    except BaseException as error:  # also a client that leaves
        completion.close()
        if not isinstance(error, TimeoutError):
            raise
        message = (
            f"The request has waited for {max_queue_s:g} s, which is the most; try again later"
        )
        raise overloaded(message, retry_after_s=math.ceil(max_queue_s)) from None


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
            sampling=replace(sampling, seed=choice_seed(sampling.seed, choice)),
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
    ending = {*request.stop_token_ids, *({model.eos_id} if model.eos_id is not None else ())}
    if request.min_tokens and len(ending) >= model.config.vocab_size:
        raise ApiError("stop_token_ids leave no token for min_tokens", param="stop_token_ids")


def refuse_when_full(
    engine: EngineClient, num_sequences: int, config: ServeConfig, *, key: str
) -> None:
    """Raises `ApiError` (429) if there is no room for as many more sequences, or only after too
    long a wait. What they would pass in the queue takes no room from them: a key that fills the
    queue fills it for itself."""
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

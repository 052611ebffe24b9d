"""The life of a completion that the engine works on, and its answer: whole, or as a stream of
events."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from itertools import chain, groupby
from operator import itemgetter

import orjson

from serving.api.key_limits import Reservation
from serving.api.metrics import RequestTimer
from serving.api.score_limit import held_scores
from serving.engine.messages import FinishReason, SequenceRequest, TokenEvent
from serving.engine_process.client import EngineDiedError
from serving.engine_process.generation import Generation, LateError
from serving.output.answers import Answer, Usage
from serving.output.choice_output import ChoiceOutput, ChoicePart, Texts, join_parts
from serving.output.shared_prompts import SharedPrompts
from serving.protocol.errors import ApiError, error_of, overloaded
from serving.protocol.protocol import CompletionRequest
from serving.protocol.request_facts import RequestFacts
from serving.protocol.served_model import ServedModel

# log-probabilities written in the event loop; more would hold up other streams for milliseconds
SCORES_AT_ONCE = 5_000

OnFirst = Callable[[], Awaitable[None]]
_SEQ_AND_END = itemgetter(*map(TokenEvent._fields.index, ("seq_id", "finish_reason")))
_FAILURES = (FinishReason.ERROR, FinishReason.GRAMMAR)


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
        options = request.stream_options
        self._ends_with_usage = options is not None and options.include_usage
        self._counts_parts = (
            options is not None and options.include_usage and options.continuous_usage_stats
        )
        as_texts = not request.stream or (self.answer.streams_texts and not self._counts_parts)
        self._choices = {
            s.seq_id: ChoiceOutput(
                i, s, request, self.model, shown=self.answer.shown, as_texts=as_texts
            )
            for i, s in enumerate(sequences)
        }
        self._prompts = SharedPrompts(sequences, num_choices=request.n)
        self._first_parts: Iterator[ChoicePart | Texts] = iter(())
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
        self.facts.begun_s = self.generation.begun_s
        has_begun = self.generation.begun_s is not None
        if has_begun and self.facts.last_token_s is None:
            self._complete_facts()
        costs = has_begun and not self._has_failed
        self.reservation.settle(
            prompt_tokens=self._num_prompt_tokens if costs else 0,
            generated_tokens=self._num_output_tokens if costs else 0,
        )

    async def begin(self, *, max_queue_s: float) -> None:
        """Waits for the first token: a failure before it can still have an HTTP status. If there is
        one the completion is closed. Raises `ApiError`: 429 if the engine has not begun after so
        long."""
        first = None
        try:
            while first is None:
                parts = self._parts_of(await self.generation.first(within_s=max_queue_s))
                first = next(parts, None)
                self._require_success()
        except BaseException as error:  # also a client that leaves
            told = self._told(error)
            self.close()
            if told is error:
                raise
            raise told from None
        self._first_parts = chain((first,), parts)
        self.facts.begun_s, self.facts.first_token_s = self.generation.begun_s, time.monotonic()

    async def respond(self) -> bytes:
        """Returns the whole answer as JSON. Raises `ApiError` if the engine fails."""
        parts: dict[int, list[ChoicePart]] = {}
        choices: dict[int, ChoicePart] = {}

        def keep(arrived: Iterator[ChoicePart | Texts]) -> None:
            for part in arrived:
                if isinstance(part, Texts):
                    part = part.as_part()  # noqa: PLW2901
                parts.setdefault(part.index, []).append(part)
                if part.finish_reason is not None:
                    choices[part.index] = join_parts(parts.pop(part.index))

        await self._hand_parts_to(keep)
        if held_scores(self.request, self.sequences) > SCORES_AT_ONCE:
            return await asyncio.to_thread(self._written, choices)
        return self._written(choices)

    def _written(self, choices: dict[int, ChoicePart]) -> bytes:
        return orjson.dumps(
            self.answer.whole([choices[index] for index in sorted(choices)], self._usage())
        )

    async def stream_to(
        self, write: Callable[[bytes], None], *, on_first: OnFirst | None = None
    ) -> None:
        """Writes server-sent events, together if the engine reports them together. A failure is an
        event too. Awaits `on_first` after the first write. Raises the errors of both."""

        def send(parts: Iterator[ChoicePart | Texts]) -> None:
            sent = b""
            for part in parts:
                if isinstance(part, Texts):
                    sent += self.answer.sent_texts(part)
                else:
                    sent += self.answer.sent([part], self._usage() if self._counts_parts else None)
            if sent:
                write(sent)

        try:
            await self._hand_parts_to(send, on_first=on_first)
        except ApiError as error:
            self.facts.reason = error.code
            write(self.answer.sent_failure(error))
            return
        usage_event = self.answer.sent([], self._usage()) if self._ends_with_usage else b""
        write(usage_event + self.answer.sent_end())

    async def _hand_parts_to(
        self,
        take: Callable[[Iterator[ChoicePart | Texts]], None],
        *,
        on_first: OnFirst | None = None,
    ) -> None:
        """Hands over all parts, those of a report together; `take` takes each of them. Raises
        `ApiError` after the parts before a failure."""

        def hand(parts: Iterator[ChoicePart | Texts]) -> None:
            take(parts)
            self.timer.count()
            self._require_success()

        try:
            hand(self._first_parts)
            if on_first is not None:
                await on_first()
            await self.generation.hand_to(lambda events: hand(self._parts_of(events)))
        except EngineDiedError as error:
            raise self._told(error) from None
        finally:
            self._complete_facts()

    def _require_success(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _told(self, error: BaseException) -> BaseException:
        """Returns what a client hears of an error."""
        if isinstance(error, EngineDiedError):
            self._has_failed = True
            return error_of("engine_unavailable")
        if isinstance(error, LateError):
            message = f"The request has waited for {error.after_s:g} s, which is the most; try again later"
            return overloaded(message, retry_after_s=math.ceil(error.after_s))
        return error

    def _complete_facts(self) -> None:
        self.facts.reason = "+".join(sorted({*self._reasons.values()})) or None
        self.facts.last_token_s = time.monotonic()
        self.facts.completion_tokens = self._num_output_tokens

    def _parts_of(self, events: list[TokenEvent]) -> Iterator[ChoicePart | Texts]:
        """Yields what events make final, up to a failure."""
        now_s = time.monotonic()
        for (seq_id, _), run in groupby(events, _SEQ_AND_END):
            together = [*run]
            texts = self._choices[seq_id].texts_of(together)
            if texts is not None:
                self.timer.tokens(seq_id, now_s, num_tokens=len(together))
                yield texts
                continue
            for event in together:
                if seq_id in self._reasons:  # a stop string has ended it before
                    break
                if event.finish_reason in _FAILURES:
                    self._fail(seq_id, event.finish_reason)
                    return
                for answerable in self._prompts.take(event):
                    # Nor what has waited of one that has ended meanwhile
                    if answerable.seq_id not in self._reasons:
                        yield self._part_of(answerable, now_s)

    def _fail(self, seq_id: int, reason: FinishReason) -> None:
        self.timer.finished(seq_id, reason)
        if reason is FinishReason.GRAMMAR:
            self._failure = error_of("grammar_exceeded", param=self.request.grammar_field)
        else:
            self._has_failed = True
            self._failure = error_of("not_finite")

    def _part_of(self, event: TokenEvent, now_s: float) -> ChoicePart:
        """Returns what an event makes final. A choice that it ends leaves the engine."""
        if event.token_id is not None:
            self.timer.tokens(event.seq_id, now_s, num_tokens=1)
        part = self._choices[event.seq_id].push(event)
        if part.finish_reason is not None:
            self._reasons[event.seq_id] = part.finish_reason
            self.timer.finished(event.seq_id, part.finish_reason)
            if event.finish_reason is None:  # the engine does not know of stop strings
                self.generation.cancel(event.seq_id)
        return part

    @property
    def _num_output_tokens(self) -> int:
        return sum([choice.num_output_tokens for choice in self._choices.values()])

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

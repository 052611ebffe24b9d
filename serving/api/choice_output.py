"""Turns the engine's events into the text and log-probabilities of one choice, as soon as they are final."""

from typing import NamedTuple

from serving.api.detokenizer import Detokenizer
from serving.engine.messages import Candidates, FinishReason, SequenceRequest, TokenEvent
from serving.protocol.protocol import Choice, CompletionRequest, Logprobs
from serving.protocol.served_model import ServedModel


class TokenEntry(NamedTuple):
    """One token of the answer's `logprobs`."""

    token_id: int
    candidates: Candidates | None
    text_offset: int


class SharedEchoes:
    """Gives all choices of a prompt its log-probabilities, which the engine computes for the first choice only. Choices
    whose tokens come earlier wait: their blocks may have been in the cache."""

    def __init__(self, seq_ids: list[int], *, num_choices: int) -> None:
        self._first_of = {seq_id: seq_ids[i - i % num_choices] for i, seq_id in enumerate(seq_ids)}
        self._echoes: dict[int, list[Candidates | None]] = {}  # by first choice
        self._without_echo = set(seq_ids)
        self._held: list[TokenEvent] = []

    def complete(self, arrived: TokenEvent) -> list[TokenEvent]:
        """Returns the events that are complete now, in order."""
        first = self._first_of[arrived.seq_id]
        if arrived.prompt_logprobs is not None:
            self._echoes[first] = arrived.prompt_logprobs
        if first not in self._echoes:
            self._held.append(arrived)
            return []
        held = [event for event in self._held if self._first_of[event.seq_id] == first]
        self._held = [event for event in self._held if self._first_of[event.seq_id] != first]
        return [self._with_echo(event, self._echoes[first]) for event in [*held, arrived]]

    def _with_echo(self, event: TokenEvent, echo: list[Candidates | None]) -> TokenEvent:
        if event.seq_id not in self._without_echo:
            return event
        self._without_echo.remove(event.seq_id)
        return event._replace(prompt_logprobs=echo)


class ChoiceOutput:
    """The text and log-probabilities of one choice, as far as they are not given out."""

    def __init__(self, index: int, sequence: SequenceRequest, request: CompletionRequest, model: ServedModel) -> None:
        self._index = index
        self._sequence = sequence
        self._request = request
        self._model = model
        self._detokenizer = Detokenizer(stop=request.stop)
        self._entries: list[TokenEntry] = []  # those whose text is held back
        self._echoed_chars = 0
        self._started = False
        self.num_output_tokens = 0

    def push(self, event: TokenEvent) -> Choice:
        """Returns the part of the choice that this event makes final. It may be empty: a stream has a part for each
        token, so that a client sees when tokens arrive. `finish_reason` is set on the last part."""
        text = ""
        if not self._started and self._request.echo:
            text = self._echo(event.prompt_logprobs)
        self._started = True
        if event.token_id is not None:
            self.num_output_tokens += 1
            offset = self._echoed_chars + self._detokenizer.num_chars
            self._entries.append(TokenEntry(event.token_id, event.logprobs, offset))
            # The end-of-text token is not text but has an entry: lm-eval takes the last one for the new token's.
            if event.finish_reason is not FinishReason.STOP:
                text += self._detokenizer.push(self._model.token_bytes(event.token_id))
        if event.finish_reason is not None:
            text += self._detokenizer.finish()
        finish_reason = FinishReason.STOP if self._detokenizer.stopped else event.finish_reason
        entries = self._take_entries(all_of_them=finish_reason is not None and not self._detokenizer.stopped)
        logprobs = None if self._request.logprobs is None else self._logprobs(entries)
        return Choice(text=text, index=self._index, logprobs=logprobs, finish_reason=finish_reason)

    def _echo(self, prompt_logprobs: list[Candidates | None] | None) -> str:
        """Returns the prompt as the start of the text, and puts its tokens' entries before all others."""
        detokenizer = Detokenizer()
        text = ""
        token_ids = self._sequence.prompt_ids
        for token_id, candidates in zip(token_ids, prompt_logprobs or [None] * len(token_ids), strict=True):
            self._entries.append(TokenEntry(token_id, candidates, detokenizer.num_chars))
            text += detokenizer.push(self._model.token_bytes(token_id))
        text += detokenizer.finish()
        self._echoed_chars = len(text)
        return text

    def _take_entries(self, *, all_of_them: bool) -> list[TokenEntry]:
        """Removes and returns the entries whose text has been given out, at least in part. Entries after a stop string
        never are."""
        num_chars = self._echoed_chars + self._detokenizer.num_released_chars
        nothing_held = not (self._detokenizer.holds_text or self._detokenizer.stopped)
        taken = [e for e in self._entries if all_of_them or nothing_held or e.text_offset < num_chars]
        self._entries = self._entries[len(taken) :]
        return taken

    def _logprobs(self, entries: list[TokenEntry]) -> Logprobs:
        name = self._model.token_name
        return Logprobs(
            tokens=[name(entry.token_id) for entry in entries],
            token_logprobs=[entry.candidates and entry.candidates.logprob for entry in entries],
            top_logprobs=[
                entry.candidates
                and {name(token_id): logprob for token_id, logprob in entry.candidates.top}
                | {name(entry.token_id): entry.candidates.logprob}
                for entry in entries
            ],
            text_offset=[entry.text_offset for entry in entries],
        )


def join_parts(parts: list[Choice]) -> Choice:
    """Returns the whole choice from all its parts."""
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    return Choice(
        text="".join(part.text for part in parts),
        index=parts[-1].index,
        logprobs=None
        if not logprobs
        else Logprobs(
            tokens=[x for part in logprobs for x in part.tokens],
            token_logprobs=[x for part in logprobs for x in part.token_logprobs],
            top_logprobs=[x for part in logprobs for x in part.top_logprobs],
            text_offset=[x for part in logprobs for x in part.text_offset],
        ),
        finish_reason=parts[-1].finish_reason,
    )

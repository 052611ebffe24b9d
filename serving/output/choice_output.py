"""Turns the engine's events into the text and the tokens of one choice, as soon as they are
final."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import NamedTuple

from serving.engine.messages import Candidates, FinishReason, SequenceRequest, TokenEvent
from serving.output.detokenizer import Detokenizer
from serving.protocol.protocol import CompletionRequest
from serving.protocol.served_model import ServedModel

_TOKEN_ID = itemgetter(TokenEvent._fields.index("token_id"))


class TokenEntry(NamedTuple):
    """One token of the answer's `logprobs`."""

    token_id: int
    candidates: Candidates | None
    text_offset: int


@dataclass(slots=True)  # made for each token: a frozen one takes longer
class ChoicePart:
    """A piece of a choice, or all of it."""

    index: int  # of the choice
    text: str
    tokens: list[TokenEntry] | None  # None if the request asks for no `logprobs`
    finish_reason: FinishReason | None  # on the last part
    token_ids: list[int] | None  # if asked for, as are the following; not held back like their text
    prompt_ids: list[int] | None  # on the first part, like the following
    prompt_logprobs: list[tuple[int, Candidates | None]] | None  # by token
    embedding: str | None


@dataclass(slots=True)
class Texts:
    """Pieces of a choice that are text alone, one for each token."""

    index: int  # of the choice
    texts: list[str]

    def as_part(self) -> ChoicePart:
        """Returns them as one piece."""
        return ChoicePart(self.index, "".join(self.texts), None, None, None, None, None, None)


class ChoiceOutput:
    """The text and the tokens of one choice, as far as they are not given out."""

    def __init__(
        self,
        index: int,
        sequence: SequenceRequest,
        request: CompletionRequest,
        model: ServedModel,
        *,
        shown: Sequence[str] = (),
        as_texts: bool = False,
    ) -> None:
        """The text has the special tokens that are `shown`, and no others. With `as_texts` a token
        may be given out by its text alone where nothing else is asked for."""
        self.index = index
        self._sequence = sequence
        self._request = request
        self._shown = (*request.stop, *shown)
        self._model = model
        self._detokenizer = Detokenizer(stop=request.stop, min_tokens=request.min_tokens)
        self._entries: list[TokenEntry] = []  # those whose text is held back
        self._echoed_chars = 0
        self._started = False
        # A grammar has each token as inside a text, perhaps with its blank
        is_constrained = sequence.grammar is not None
        self._is_text_begun = is_constrained or model.has_text(sequence.prompt_ids)
        self.num_output_tokens = 0
        asks_for_scores = request.logprobs is not None or request.prompt_logprobs is not None
        self._may_be_texts = as_texts and not (
            asks_for_scores or request.stop or request.return_token_ids
        )
        self._are_texts = False  # whether tokens now add nothing but their text

    def texts_of(self, events: Sequence[TokenEvent]) -> Texts | None:
        """Returns the texts that events of the choice make final, one for each; None where they may
        make more than that, which `push` takes."""
        if not self._are_texts or events[-1].finish_reason is not None:
            return None
        self.num_output_tokens += len(events)
        return Texts(self.index, [*map(self._next_text, map(_TOKEN_ID, events))])

    def _next_text(self, token_id: int) -> str:
        """Returns the text that a token makes final, within a text without stop strings."""
        if self._detokenizer.is_whole:
            text = self._model.plain_texts.get(token_id)
            if text is not None:
                return text
        return self._detokenizer.push(self._text_bytes(token_id))

    def push(self, event: TokenEvent) -> ChoicePart:
        """Returns the part of the choice that this event makes final. It may be empty: a stream has
        a part for each token, so that a client sees when tokens arrive."""
        is_first, self._started = not self._started, True
        asked = self._request
        text = self._echo(event.prompt_logprobs) if is_first and asked.echo else ""
        if event.token_id is not None:
            self.num_output_tokens += 1
            if asked.logprobs is not None:
                offset = self._echoed_chars + self._detokenizer.num_chars
                self._entries.append(TokenEntry(event.token_id, event.logprobs, offset))
            # The end-of-text token is not text but has an entry: lm-eval takes the last one for the
            # new token's.
            if event.finish_reason is not FinishReason.STOP:
                text += self._detokenizer.push(self._text_bytes(event.token_id))
        if event.finish_reason is not None:
            text += self._detokenizer.finish()
        finish_reason = FinishReason.STOP if self._detokenizer.stopped else event.finish_reason
        self._are_texts = self._may_be_texts and self._is_text_begun
        all_of_them = finish_reason is not None and not self._detokenizer.stopped
        token_ids = [] if event.token_id is None else [event.token_id]
        return ChoicePart(
            self.index,
            text,
            None if asked.logprobs is None else self._take_entries(all_of_them=all_of_them),
            finish_reason,
            token_ids=token_ids if asked.return_token_ids else None,
            prompt_ids=self._sequence.prompt_ids if asked.return_token_ids and is_first else None,
            prompt_logprobs=self._scored(event.prompt_logprobs, asked.prompt_logprobs)
            if is_first
            else None,
            embedding=event.embedding,
        )

    def _text_bytes(self, token_id: int) -> bytes:
        is_first = not self._is_text_begun
        content = self._model.text_bytes(token_id, stop=self._shown, is_first=is_first)
        self._is_text_begun = self._is_text_begun or self._model.has_text([token_id])
        return content

    def _scored(
        self, prompt_logprobs: list[Candidates | None] | None, num_top: int | None
    ) -> list[tuple[int, Candidates | None]] | None:
        """Returns the prompt's tokens with as many of the candidates as were asked for, None if
        none were."""
        if num_top is None:
            return None
        found = [each and each._replace(top=each.top[:num_top]) for each in prompt_logprobs or []]
        return list(zip(self._sequence.prompt_ids, found, strict=True))

    def _echo(self, prompt_logprobs: list[Candidates | None] | None) -> str:
        """Returns the prompt as the start of the text, and puts its tokens' entries before all
        others."""
        detokenizer = Detokenizer()
        text = ""
        unscored = [(token_id, None) for token_id in self._sequence.prompt_ids]
        scored = self._scored(prompt_logprobs, self._request.logprobs) or unscored
        is_first = True
        for place, (token_id, candidates) in enumerate(scored):
            self._entries.append(TokenEntry(token_id, candidates, detokenizer.num_chars))
            if self._is_added(place, token_id):
                continue
            text += detokenizer.push(self._model.token_bytes(token_id, is_first=is_first))
            is_first = is_first and not self._model.has_text([token_id])
        text += detokenizer.finish()
        self._echoed_chars = len(text)
        return text

    def _is_added(self, place: int, token_id: int) -> bool:
        """Whether a token of the prompt is BOS, and no part of the text that the client wrote."""
        tokenizer, asked = self._model.tokenizer, self._request
        if tokenizer is None or token_id != tokenizer.bos_id:
            return False
        prompt = asked.prompt[self.index // asked.n]
        if not (asked.parse_special and isinstance(prompt, str)):
            return True
        return place == 0 and not prompt.encode().startswith(tokenizer.token_bytes(token_id))

    def _take_entries(self, *, all_of_them: bool) -> list[TokenEntry]:
        """Removes and returns the entries whose text has been given out, at least in part. Entries
        after a stop string never are."""
        num_chars = self._echoed_chars + self._detokenizer.num_released_chars
        nothing_held = self._detokenizer.num_chars == self._detokenizer.num_released_chars
        everything = all_of_them or (nothing_held and not self._detokenizer.stopped)
        taken = [e for e in self._entries if everything or e.text_offset < num_chars]
        self._entries = self._entries[len(taken) :]
        return taken


def join_parts(parts: list[ChoicePart]) -> ChoicePart:
    """Returns the whole choice from all its parts."""
    first = parts[0]
    if len(parts) == 1:
        return first
    return replace(
        first,
        text="".join(part.text for part in parts),
        tokens=None
        if first.tokens is None
        else [token for part in parts for token in part.tokens or []],
        finish_reason=parts[-1].finish_reason,
        token_ids=None
        if first.token_ids is None
        else [i for part in parts for i in part.token_ids or []],
    )

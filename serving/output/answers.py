"""The JSON of answers, whole or as the events of a stream. chat.py has the shape of chats."""

import base64
import os
import time
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import orjson

from serving.engine.messages import Candidates
from serving.output.choice_output import ChoicePart, Texts, TokenEntry
from serving.protocol.errors import ApiError
from serving.protocol.served_model import ServedModel

# In JSON as they are, and the end of a line to some clients, such as httpx
LINE_ENDS = {end.encode(): b"\\u%04x" % ord(end) for end in ("\u2028", "\u2029", "\x85")}

Usage = dict[str, Any]
_MARK = os.urandom(16).hex()  # in no other field


class Answer(ABC):
    """One request's answer. Subclasses have the shape of their endpoint."""

    ID_PREFIX: ClassVar[str]
    KIND: ClassVar[str]  # `object` of a whole answer
    PART_KIND: ClassVar[str]  # `object` of an event
    PROMPT_FIELD: ClassVar[str] = "prompt"  # of the request
    EMBEDS: ClassVar[bool] = False  # whether it shows the prompts' hidden states
    shown: tuple[str, ...] = ()  # special tokens that its text has, to be read by it
    # Whether a choice's events, after its first one, differ by their text alone
    streams_texts: bool = False

    def __init__(self, model: ServedModel) -> None:
        self._id = f"{self.ID_PREFIX}-{os.urandom(16).hex()}"
        self._created = int(time.time())
        self._model = model
        self._frames: dict[int, tuple[bytes, bytes]] = {}  # by choice

    def whole(self, choices: list[ChoicePart], usage: Usage) -> dict[str, Any]:
        return self._fields(self.KIND, [self._whole_choice(choice) for choice in choices], usage)

    def event(self, parts: list[ChoicePart], usage: Usage | None) -> dict[str, Any]:
        """Returns an event of a stream. `stream_options` asks for the usage in each, or in a last
        one without parts."""
        return self._fields(self.PART_KIND, [self._part_choice(part) for part in parts], usage)

    def sent(self, parts: list[ChoicePart], usage: Usage | None) -> bytes:
        """Returns what `event` has as a stream sends it; nothing where there is nothing to
        send."""
        return server_sent(self.event(parts, usage))

    def sent_texts(self, texts: Texts) -> bytes:
        """Returns what `sent` gives for each of the texts without a usage, where `streams_texts`
        is set: the event of a mark, with the text in place of the mark."""
        if texts.index not in self._frames:
            marked = Texts(texts.index, [_MARK]).as_part()
            before, after = self.sent([marked], None).split(orjson.dumps(_MARK))
            self._frames[texts.index] = before, after
        before, after = self._frames[texts.index]
        return before + _on_one_line((after + before).join(map(orjson.dumps, texts.texts))) + after

    def sent_end(self) -> bytes:
        """Returns the end of a stream whose answer is whole."""
        return b"data: [DONE]\n\n"

    def sent_failure(self, error: ApiError) -> bytes:
        """Returns the end of a stream whose answer has failed, by which a client cannot mistake
        half an answer for a whole one."""
        return error.event().encode()

    def _fields(
        self, kind: str, choices: list[dict[str, Any]], usage: Usage | None
    ) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model.name,
            "system_fingerprint": self._model.version,
            "choices": choices,
            "usage": usage,
        }

    def _token_ids(self, part: ChoicePart) -> dict[str, Any]:
        """Returns what `return_token_ids` adds to a choice, as in vLLM."""
        return {} if part.token_ids is None else {"token_ids": part.token_ids}

    def _of_prompt(self, part: ChoicePart) -> dict[str, Any]:
        """Returns what `return_token_ids` and `prompt_logprobs` add about the prompt, as in
        vLLM."""
        fields: dict[str, Any] = (
            {} if part.prompt_ids is None else {"prompt_token_ids": part.prompt_ids}
        )
        if part.prompt_logprobs is None:
            return fields
        return fields | {
            "prompt_logprobs": [
                found and self._ranked(i, found) for i, found in part.prompt_logprobs
            ]
        }

    def _ranked(self, token_id: int, candidates: Candidates) -> dict[str, dict[str, Any]]:
        ranked = [(candidates.rank, token_id, candidates.logprob)]
        ranked += [(rank, *candidate) for rank, candidate in enumerate(candidates.top, start=1)]
        name = lambda i: self._model.token_bytes(i).decode(errors="replace")  # noqa: E731
        return {
            str(i): {"logprob": logprob, "rank": rank, "decoded_token": name(i)}
            for rank, i, logprob in ranked
        }

    @abstractmethod
    def _whole_choice(self, part: ChoicePart) -> dict[str, Any]:
        """Returns a choice of a whole answer."""

    def _part_choice(self, part: ChoicePart) -> dict[str, Any]:
        """Returns a choice of an event."""
        return self._whole_choice(part)


class TextAnswer(Answer):
    """The answer of POST /v1/completions."""

    ID_PREFIX, KIND, PART_KIND = "cmpl", "text_completion", "text_completion"
    streams_texts = True

    def _whole_choice(self, part: ChoicePart) -> dict[str, Any]:
        return {
            "text": part.text,
            "index": part.index,
            "logprobs": None if part.tokens is None else self._logprobs(part.tokens),
            "finish_reason": part.finish_reason,
            **self._token_ids(part),
            **self._of_prompt(part),
        }

    def _logprobs(self, tokens: list[TokenEntry]) -> dict[str, list[Any]]:
        name = self._model.token_name
        return {
            "tokens": [name(token.token_id) for token in tokens],
            "token_logprobs": [token.candidates and token.candidates.logprob for token in tokens],
            "top_logprobs": [
                token.candidates
                and {name(token_id): logprob for token_id, logprob in token.candidates.top}
                | {name(token.token_id): token.candidates.logprob}
                for token in tokens
            ],
            "text_offset": [token.text_offset for token in tokens],
        }


class EmbeddingAnswer(Answer):
    """For each text the mean of its tokens' hidden states after the final norm, computed as the
    engine reads them."""

    ID_PREFIX, KIND = "embd", "list"
    EMBEDS, PROMPT_FIELD = True, "input"

    def __init__(self, model: ServedModel, *, encoding: str) -> None:
        super().__init__(model)
        self._encoding = encoding

    def whole(self, choices: list[ChoicePart], usage: Usage) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": self.KIND,
            "created": self._created,
            "model": self._model.name,
            "data": [self._whole_choice(choice) for choice in choices],
            "usage": {name: usage[name] for name in ("prompt_tokens", "total_tokens")},
        }

    def _whole_choice(self, part: ChoicePart) -> dict[str, Any]:
        assert part.embedding is not None
        vector: str | list[float] = part.embedding
        if self._encoding != "base64":
            vector = np.frombuffer(base64.b64decode(part.embedding), dtype="<f4").tolist()
        return {"object": "embedding", "index": part.index, "embedding": vector}


def server_sent(content: dict[str, Any]) -> bytes:
    """Returns a server-sent event, on one line for every client."""
    return b"data: %b\n\n" % _on_one_line(orjson.dumps(content))


def _on_one_line(data: bytes) -> bytes:
    if not data.isascii():  # each of those ends is more than a byte
        for end, escaped in LINE_ENDS.items():
            data = data.replace(end, escaped)
    return data

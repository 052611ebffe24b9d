"""The answer of POST /v1/responses: a chat's, in the shape of a response."""

import time
import uuid
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from itertools import count
from typing import Any, Literal

from serving.api.chat import ChatAnswer
from serving.engine.messages import FinishReason
from serving.output.answers import Usage, server_sent
from serving.output.choice_output import ChoicePart
from serving.protocol.errors import ApiError
from serving.protocol.served_model import ServedModel
from serving.responses.output import Event, Output
from serving.responses.request import ResponseRequest, ResponseText
from serving.responses.words import in_words_of_responses
from serving.tools.call_parser import Content

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class ResponseAnswer(ChatAnswer):
    """One response. A whole one has the items that its stream tells."""

    PROMPT_FIELD = "input"

    def __init__(self, model: ServedModel, *, request: ResponseRequest, **reading: Any) -> None:
        """`reading` are the keywords of `ChatAnswer`."""
        super().__init__(model, **reading)
        self._id = f"resp_{uuid.uuid4().hex}"
        self.streams_texts = False  # each event has its number
        self._asked = _echo(request)
        self._output = Output()
        self._numbers = count()
        self._unplaced: list[dict[str, Any]] = []  # log-probabilities whose text is held back
        self._finish: FinishReason | None = None
        self._has_begun = False

    def whole(self, choices: list[ChoicePart], usage: Usage) -> dict[str, Any]:
        [part] = choices
        for _ in self._added(part):
            pass
        return self._ended(usage)

    def sent(self, parts: list[ChoicePart], usage: Usage | None) -> bytes:
        events: list[Event] = [] if self._has_begun else [*self._begun()]
        for part in parts:
            events += self._added(part)
        if usage is not None:
            response = self._ended(usage)
            events.append({"type": f"response.{response['status']}", "response": response})
        return self._numbered(events)

    def sent_end(self) -> bytes:
        """The last event says by itself that the answer is whole."""
        return b""

    def sent_failure(self, error: ApiError) -> bytes:
        error = in_words_of_responses(error)
        code = (
            "server_error" if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_prompt"
        )
        response = self._response("failed", error={"code": code, "message": error.message})
        failed = self._numbered([{"type": "response.failed", "response": response}])
        return failed + error.response_event(next(self._numbers)).encode()

    def _begun(self) -> Iterator[Event]:
        self._has_begun = True
        response = self._response("in_progress")
        yield {"type": "response.created", "response": response}
        yield {"type": "response.in_progress", "response": response}

    def _added(self, part: ChoicePart) -> Iterator[Event]:
        """Takes a part into the output. Yields what changes."""
        if part.tokens is not None:
            self._unplaced += self._logprobs(part.tokens)
        for piece in self._pieces(part):
            if isinstance(piece, Content):
                yield from self._output.text(piece.text, self._unplaced)
            elif piece.name is not None:
                yield from self._output.call(piece.name, self._new_call_id())
            if not isinstance(piece, Content) and piece.arguments:
                yield from self._output.arguments(piece.arguments)
            self._unplaced = []
        if part.finish_reason is None:
            return
        self._finish = part.finish_reason
        if self._output.takes_text:
            yield from self._output.text("", self._unplaced)
        is_whole = self._finish is not FinishReason.LENGTH
        yield from self._output.close("completed" if is_whole else "incomplete")

    def _ended(self, usage: Usage) -> dict[str, Any]:
        told = {"usage": _usage(usage)}
        if self._finish is FinishReason.LENGTH:
            return self._response("incomplete", incomplete_details=_CUT, **told)
        return self._response("completed", completed_at=int(time.time()), **told)

    def _response(self, status: Status, **more: Any) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self._model.name,
            "system_fingerprint": self._model.version,
            "output": self._output.items,
            "usage": None,
            **self._asked,
            **more,
        }

    def _numbered(self, events: Iterable[Event]) -> bytes:
        return b"".join(
            b"event: %b\n%b"
            % (event["type"].encode(), server_sent(event | {"sequence_number": number}))
            for event, number in zip(events, self._numbers, strict=False)
        )


_CUT = {"reason": "max_output_tokens"}


def _usage(usage: Usage) -> dict[str, Any]:
    """Returns the same counts under the names that responses have. There are no thoughts apart from
    the text, and what a key may not know of the cache counts as none."""
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }


def _echo(request: ResponseRequest) -> dict[str, Any]:
    """Returns what a response repeats of its request."""
    choice, text = request.tool_choice, request.text or ResponseText()
    shown = {"type": "text"} if text.format is None else text.format.model_dump(by_alias=True)
    return {
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "text": {"format": shown, "verbosity": text.verbosity},
        "reasoning": {"effort": request.reasoning and request.reasoning.effort, "summary": None},
        "tools": [tool.model_dump() for tool in request.tools],
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "parallel_tool_calls": request.parallel_tool_calls,
        "top_logprobs": request.top_logprobs,
        "metadata": request.metadata,
        "user": request.user,
        "background": False,
        "previous_response_id": None,
        "truncation": "disabled",
        "store": False,
    }

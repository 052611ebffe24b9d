"""Chat: requests as completions, written by the checkpoint's own template, and answers in the
shapes of chats.

A base model has no template, as it was never taught to chat; it continues text. A plain template
shows it a dialogue, and every answer says so in the header `x-model-note`.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from model.text.chat import plain_speakers
from serving.api.answers import Answer, Usage
from serving.api.choice_output import Part, TokenEntry
from serving.api.score_limit import most_new_tokens
from serving.delivery.loaded_version import LoadedVersion
from serving.protocol import harmless_fields
from serving.protocol.errors import ApiError
from serving.protocol.protocol import MAX_LOGPROBS, CompletionRequest, GenerationRequest
from serving.protocol.request import Request
from serving.protocol.served_model import ServedModel

MAX_MESSAGES = 256
NOTE_HEADER = {
    "x-model-note": "base model, not chat-tuned; the messages were given to it as plain text"
}


def _content(value: Any, info: ValidationInfo) -> Any:
    """Accepts a text, or a list of parts that are texts. An assistant's message without text is an
    empty turn."""
    if value is None and info.data.get("role") == "assistant":
        return ""
    if not isinstance(value, list):
        return value
    for part in value:
        # It says up to where OpenAI would cache the prompt.
        names = set(part) - {"prompt_cache_breakpoint"} if isinstance(part, dict) else set()
        if names != {"type", "text"} or part["type"] != "text":
            raise ValueError(
                'this model reads text only: expected parts {"type": "text", "text": ...}'
            )
        if not isinstance(part["text"], str):
            raise ValueError("the text of a part is a string")
    return "".join(part["text"] for part in value)


def _limit(value: Any) -> Any:
    # How llama.cpp and others write "no limit"
    return None if type(value) is int and value == -1 else value


Limit = Annotated[int, Field(ge=1, le=2**31)]


class Message(Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)]
    name: str | None = Field(None, max_length=64)

    @model_validator(mode="before")
    @classmethod
    def _without_harmless(cls, fields: Any) -> Any:
        """Removes harmless fields, so that an answer can be sent back as it came."""
        if not isinstance(fields, dict):
            return fields
        table = harmless_fields.MESSAGE_FIELDS
        return {
            n: value
            for n, value in fields.items()
            if not harmless_fields.is_harmless(n, value, table)
        }


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: Annotated[Limit | None, BeforeValidator(_limit)] = None
    max_completion_tokens: Limit | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _candidates_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs is allowed with logprobs=true only", param="top_logprobs")
        return self


class OpenEndedCompletion(CompletionRequest):
    """A completion whose client has left its length open. To count the rest of the context against
    a key's quota would refuse almost all of them."""

    @property
    def reserved_tokens(self) -> int:
        return 0


async def as_completion(
    request: ChatRequest, version: LoadedVersion, *, clips: bool
) -> CompletionRequest:
    """Returns the completion that answers a chat. Without a limit it may fill the context, or as
    much of it as leaves room for its log-probabilities. Where the endpoint `clips`, a larger limit
    fills the context too. Raises `ApiError` (400) if there is no room for a token, and `ChatError`
    or `TextError` if the template refuses the messages."""
    model, end_of_turn = version.model, version.texts.probe.end_of_turn
    max_tokens = request.max_completion_tokens or request.max_tokens
    model.require_tokenizer()
    messages = [message.model_dump(exclude_none=True) for message in request.messages]
    rendered_ids = await version.texts.chat_ids(messages)
    room = 1 if clips or max_tokens is None else max_tokens
    prompt_ids = model.prompt_ids(rendered_ids, max_tokens=room, param=ChatAnswer.PROMPT_FIELD)
    shared = {name: getattr(request, name) for name in GenerationRequest.model_fields}
    if not model.is_chat_tuned:
        # Or a base model would continue with the next turn, whoever's it is.
        shared["stop"] = (*request.stop, *(f"\n{speaker}:" for speaker in plain_speakers(messages)))
    elif end_of_turn is not None and not request.ignore_eos:
        shared["stop_token_ids"] = [*request.stop_token_ids, end_of_turn]
    shape = CompletionRequest if max_tokens else OpenEndedCompletion
    completion = shape.model_construct(
        **shared,
        prompt=[prompt_ids],
        max_tokens=max_tokens or model.config.n_positions - len(prompt_ids),
        logprobs=request.top_logprobs if request.logprobs else None,
        echo=False,
    )
    most = most_new_tokens(completion, num_prompt_tokens=len(prompt_ids))
    if max_tokens is None and most is not None:
        return completion.model_copy(update={"max_tokens": min(completion.max_tokens, most)})
    return completion


class ChatAnswer(Answer):
    """The answer of POST /v1/chat/completions."""

    ID_PREFIX, KIND, PART_KIND = "chatcmpl", "chat.completion", "chat.completion.chunk"
    PROMPT_FIELD = "messages"

    def __init__(self, model: ServedModel) -> None:
        super().__init__(model)
        self._started: set[int] = set()  # choices

    def whole(self, choices: list[Part], usage: Usage) -> dict[str, Any]:
        return super().whole(choices, usage) | self._of_prompt(choices[0])

    def event(self, parts: list[Part], usage: Usage | None) -> dict[str, Any]:
        return super().event(parts, usage) | (self._of_prompt(parts[0]) if parts else {})

    def _whole_choice(self, part: Part) -> dict[str, Any]:
        message = {"role": "assistant", "content": part.text, "refusal": None}
        return {"index": part.index, "message": message} | self._ending(part)

    def _part_choice(self, part: Part) -> dict[str, Any]:
        role = {} if part.index in self._started else {"role": "assistant"}
        self._started.add(part.index)
        return {"index": part.index, "delta": role | {"content": part.text}} | self._ending(part)

    def _ending(self, part: Part) -> dict[str, Any]:
        logprobs = None if part.tokens is None else {"content": list(self._logprobs(part.tokens))}
        return {"logprobs": logprobs, "finish_reason": part.finish_reason} | self._token_ids(part)

    def _logprobs(self, tokens: list[TokenEntry]) -> Iterator[dict[str, Any]]:
        for token_id, candidates, _ in tokens:
            assert candidates is not None  # only an echoed prompt's first token has none
            top = [self._token(*candidate) for candidate in candidates.top]
            yield self._token(token_id, candidates.logprob) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        token = self._model.token_bytes(token_id)
        return {"token": self._model.token_name(token_id), "logprob": logprob, "bytes": list(token)}

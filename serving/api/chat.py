"""Chat: requests as completions, written by the checkpoint's own template, and answers in the
shapes of chats.

A base model has no template, as it was never taught to chat; it continues text. A plain template
shows it a dialogue, and every answer says so in the header `x-model-note`.
"""

import asyncio
import json
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from model.text.chat import plain_speakers
from serving.api.admission import require_grammar
from serving.api.score_limit import most_new_tokens
from serving.delivery.loaded_version import LoadedVersion
from serving.engine.messages import FinishReason
from serving.output.answers import Answer, Usage
from serving.output.choice_output import ChoicePart, TokenEntry
from serving.protocol import harmless_fields
from serving.protocol.errors import ApiError, error_of
from serving.protocol.protocol import MAX_LOGPROBS, CompletionRequest, GenerationRequest
from serving.protocol.request import Request
from serving.protocol.served_model import ServedModel
from serving.protocol.structured_fields import GrammarOfTools
from serving.protocol.template_fields import TemplateFields
from serving.protocol.tool_fields import MAX_TOOLS, Tool, ToolCall, ToolFields
from serving.structured.grammar import MAX_GRAMMAR_BYTES, Grammar, GrammarKind
from serving.structured.subschemas import without_notes
from serving.tools.call_grammar import grammar_of_calls
from serving.tools.call_parser import CallParser, Content, Piece
from serving.tools.formats import NO_PARAMETERS, format_of, takes_tools

MAX_MESSAGES = 2048
MAX_SPEAKERS = 256  # who have a name: each is a text that ends a base model's answer
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


class ChatMessage(Request):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_content)]
    name: str | None = Field(None, max_length=64)
    tool_calls: list[ToolCall] = Field([], max_length=MAX_TOOLS)
    tool_call_id: str | None = Field(None, max_length=256)

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls are of an assistant's message only")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("a message of the role tool has a tool_call_id, and no other has")
        return self

    @property
    def concerns_tools(self) -> bool:
        return self.role == "tool" or bool(self.tool_calls)

    @property
    def seen(self) -> dict[str, Any]:
        """The message as a chat template sees it."""
        seen = self.model_dump(exclude_none=True, exclude={"tool_calls"})
        calls = [call.seen for call in self.tool_calls]
        return seen | ({"tool_calls": calls} if calls else {})

    @model_validator(mode="before")
    @classmethod
    def _without_harmless(cls, fields: Any) -> Any:
        """Removes harmless fields, so that an answer can be sent back as it came."""
        if not isinstance(fields, dict):
            return fields
        table = harmless_fields.MESSAGE_FIELDS
        kept = {
            n: value
            for n, value in fields.items()
            if not harmless_fields.is_harmless(n, value, table)
        }
        if kept.get("tool_calls") is None:
            kept.pop("tool_calls", None)
            return kept
        return {"content": None} | kept  # which an assistant that calls may leave out


class ChatRequest(GenerationRequest, ToolFields, TemplateFields):
    """The body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: Annotated[Limit | None, BeforeValidator(_limit)] = None
    max_completion_tokens: Limit | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _candidates_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs is allowed with logprobs=true only", param="top_logprobs")
        return self

    @model_validator(mode="after")
    def _has_few_speakers(self) -> Self:
        num_names = len({message.name for message in self.messages} - {None})
        if num_names > MAX_SPEAKERS:
            raise ApiError(
                f"messages has {num_names} different names, at most {MAX_SPEAKERS} are allowed",
                param="messages",
                code="invalid_value",
            )
        return self

    @model_validator(mode="after")
    def _tools_fit_the_rest(self) -> Self:
        grammar = self.read_grammar() if self.offered else None
        if grammar is not None and grammar.kind is not GrammarKind.JSON_SCHEMA:
            raise ApiError(
                "tools go together with JSON by a schema only: leave tools out, say tool_choice none, or ask for json "
                f"in {self.grammar_field}",
                param=self.grammar_field,
            )
        for name in ("ignore_eos", "min_tokens"):
            if self.forced and getattr(self, name):
                raise ApiError(
                    f"{name} is not allowed with this tool_choice, by which the answer ends",
                    param=name,
                )
        return self

    @property
    def calls_by_grammar(self) -> bool:
        """Whether calls follow their schemas: required calls do, and all calls where text follows a
        schema."""
        return bool(self.forced) or bool(self.offered and self.read_grammar() is not None)

    @property
    def reading(self) -> dict[str, Any]:
        """How the answer's text is read: the keywords of `ChatAnswer`."""
        by_grammar = self.calls_by_grammar
        only_these = by_grammar or len(self.allowed) < len(self.offered)
        return {"tools": self.allowed, "only_these": only_these, "at_start": by_grammar}


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
    messages = [message.seen for message in request.messages]
    _require_tools(request, model)
    rendered_ids = await version.texts.chat_ids(
        messages, [tool.seen for tool in request.offered], request.template_kwargs
    )
    room = 1 if clips or max_tokens is None else max_tokens
    prompt_ids = model.prompt_ids(rendered_ids, max_tokens=room, param=ChatAnswer.PROMPT_FIELD)
    shared = {name: getattr(request, name) for name in GenerationRequest.model_fields}
    if not model.is_chat_tuned:
        # Or a base model would continue with the next turn, whoever's it is.
        shared["stop"] = (*request.stop, *(f"\n{speaker}:" for speaker in plain_speakers(messages)))
    elif end_of_turn is not None and not request.ignore_eos:
        shared["stop_token_ids"] = [*request.stop_token_ids, end_of_turn]
    if request.calls_by_grammar:
        shared["structured_outputs"] = await _grammar_of_tools(request, version)
        shared["response_format"] = None
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


def _require_tools(request: ChatRequest, model: ServedModel) -> None:
    """Raises `ApiError` (400) for tools, or their calls in earlier messages, that the model's chat
    template does not write."""
    if not request.offered and not any(message.concerns_tools for message in request.messages):
        return
    template = _template_of(model)
    if not takes_tools(template):
        why = "it has no chat template that takes any"
    elif request.offered and format_of(template) is None:
        why = (
            "its chat template has calls written in a format that is not read here; expected that of Hermes and "
            "Qwen, of Qwen3-Coder, of Mistral, or Llama 3's JSON"
        )
    else:
        return
    raise error_of("tools_unsupported", param="tools", name=model.name, why=why)


def _template_of(model: ServedModel) -> str:
    chat = None if model.tokenizer is None else model.tokenizer.chat
    return "" if chat is None else chat.chat_template


async def _grammar_of_tools(request: ChatRequest, version: LoadedVersion) -> GrammarOfTools:
    """Returns what calls follow, and an answer by a schema that may be given instead of calls that
    are not required. Raises `ApiError` (400) for what cannot be enforced."""
    functions = await asyncio.to_thread(_enforced, request.allowed)
    places = [tool.function.name for tool in request.tools]
    for function in functions:
        schema = json.dumps(function["parameters"])
        parameters = Grammar(GrammarKind.JSON_SCHEMA, schema, lenient=not function["strict"])
        place = f"tools.{places.index(function['name'])}.function.parameters"
        await require_grammar(parameters, version, field=place)
    by_schema = None if request.forced else request.read_grammar()
    answer: dict[str, Any] | None = None
    if by_schema is not None:
        await require_grammar(by_schema, version, field=request.grammar_field)
        answer = {"parameters": json.loads(by_schema.text), "strict": not by_schema.lenient}
    tool_format = format_of(_template_of(version.model))
    assert tool_format is not None, "_require_tools comes first"
    grammar = grammar_of_calls(
        tool_format,
        functions,
        several=request.calls_several,
        special_ids=version.model.require_tokenizer().special_ids,
        answer=answer,
    )
    return GrammarOfTools.model_construct(grammar=grammar)


def _enforced(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Returns the functions as the grammar of their calls has them. Raises `ApiError` (400) where
    it would be too large."""
    functions = [tool.function.model_dump(exclude={"description"}) for tool in tools]
    for function in functions:
        function["parameters"] = without_notes(function["parameters"] or NO_PARAMETERS)
    size = sum(len(json.dumps(function["parameters"])) for function in functions)
    if size > MAX_GRAMMAR_BYTES:
        raise ApiError(
            f"tools: the parameters have {size} bytes without descriptions, at most {MAX_GRAMMAR_BYTES} are enforced; "
            "offer fewer tools, or simpler ones",
            param="tools",
            code="invalid_value",
        )
    return functions


class ChatAnswer(Answer):
    """The answer of POST /v1/chat/completions."""

    ID_PREFIX, KIND, PART_KIND = "chatcmpl", "chat.completion", "chat.completion.chunk"
    PROMPT_FIELD = "messages"

    def __init__(
        self,
        model: ServedModel,
        *,
        tools: Sequence[Tool] = (),
        only_these: bool = False,
        at_start: bool = False,
    ) -> None:
        """The calls of these tools in the answer's text are read, as `CallParser` does."""
        super().__init__(model)
        self._started: set[int] = set()  # choices
        self._tool_format = format_of(_template_of(model)) if tools else None
        parameters = {tool.function.name: tool.function.parameters or {} for tool in tools}
        self.shown = self._tool_format.marks if self._tool_format is not None else ()
        self.streams_texts = self._tool_format is None
        self._parser = partial(
            CallParser, parameters=parameters, only_these=only_these, at_start=at_start
        )
        self._parsers: dict[int, CallParser] = {}  # by choice

    def whole(self, choices: list[ChoicePart], usage: Usage) -> dict[str, Any]:
        return super().whole(choices, usage) | self._of_prompt(choices[0])

    def event(self, parts: list[ChoicePart], usage: Usage | None) -> dict[str, Any]:
        return super().event(parts, usage) | (self._of_prompt(parts[0]) if parts else {})

    def _whole_choice(self, part: ChoicePart) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": part.text, "refusal": None}
        content, calls = self._read(part)
        if calls:
            for call in calls:
                del call["index"]
            message |= {"content": content or None, "tool_calls": calls}
        return {"index": part.index, "message": message} | self._ending(part)

    def _part_choice(self, part: ChoicePart) -> dict[str, Any]:
        delta: dict[str, Any] = {} if part.index in self._started else {"role": "assistant"}
        self._started.add(part.index)
        content, calls = self._read(part)
        delta |= {"content": content} if content or not calls else {}
        delta |= {"tool_calls": calls} if calls else {}
        return {"index": part.index, "delta": delta} | self._ending(part)

    def _read(self, part: ChoicePart) -> tuple[str, list[dict[str, Any]]]:
        """Returns the content in a part's text, and what it adds to calls, each once."""
        if self._tool_format is None:
            return part.text, []
        content, calls = "", dict[int, dict[str, Any]]()
        for piece in self._pieces(part):
            if isinstance(piece, Content):
                content += piece.text
                continue
            call = calls.setdefault(
                piece.index, {"index": piece.index, "function": {"arguments": ""}}
            )
            call["function"]["arguments"] += piece.arguments
            if piece.name is not None:
                call |= {"id": self._new_call_id(), "type": "function"}
                call["function"] = {"name": piece.name, **call["function"]}
        return content, [*calls.values()]

    def _pieces(self, part: ChoicePart) -> list[Piece]:
        """Returns what is content and what are calls in a part's text, in order."""
        if self._tool_format is None:
            return [Content(part.text)] if part.text else []
        if part.index not in self._parsers:
            self._parsers[part.index] = self._parser(self._tool_format)
        parser = self._parsers[part.index]
        pieces = parser.push(part.text)
        return pieces + (parser.finish() if part.finish_reason is not None else [])

    def _new_call_id(self) -> str:
        """Returns the id of a call, as long as its template asks for."""
        length = 0 if self._tool_format is None else self._tool_format.id_length
        return uuid.uuid4().hex[:length] if length else f"call_{uuid.uuid4().hex[:24]}"

    def _finish_reason(self, part: ChoicePart) -> str | None:
        parser = self._parsers.get(part.index)
        has_called = parser is not None and parser.num_calls > 0
        return (
            "tool_calls"
            if has_called and part.finish_reason is FinishReason.STOP
            else part.finish_reason
        )

    def _ending(self, part: ChoicePart) -> dict[str, Any]:
        logprobs = None if part.tokens is None else {"content": list(self._logprobs(part.tokens))}
        reason = self._finish_reason(part)
        return {"logprobs": logprobs, "finish_reason": reason} | self._token_ids(part)

    def _logprobs(self, tokens: list[TokenEntry]) -> Iterator[dict[str, Any]]:
        for token_id, candidates, _ in tokens:
            assert candidates is not None  # only an echoed prompt's first token has none
            top = [self._token(*candidate) for candidate in candidates.top]
            yield self._token(token_id, candidates.logprob) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        token = self._model.token_bytes(token_id)
        return {"token": self._model.token_name(token_id), "logprob": logprob, "bytes": list(token)}

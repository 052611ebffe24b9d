"""The body of POST /v1/responses, and the chat that it asks for."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from model.files.strict_json import shown
from serving.api.chat import ChatRequest, Limit
from serving.protocol.errors import ApiError
from serving.protocol.harmless_fields import RESPONSE_FIELDS
from serving.protocol.plain_words import refusal_of
from serving.protocol.protocol import MAX_LOGPROBS, AnswerRequest, StreamOptions
from serving.protocol.request import Request
from serving.protocol.structured_fields import JsonSchemaFormat, StructuredOutputs
from serving.protocol.template_fields import ReasoningEffort
from serving.protocol.tool_fields import MAX_TOOLS, Function, FunctionName, read_choice
from serving.responses.items import Input, Item, ReasoningItem, messages_of

LOGPROBS = "message.output_text.logprobs"
_SEND_AGAIN = "nothing is stored here to go on with; send the earlier items again, in input"


class PlainFormat(Request):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(JsonSchemaFormat, Item):
    """JSON by a schema."""

    type: Literal["json_schema"]


def _format(value: Any) -> Any:
    """Raises `ApiError` (400) for a format of another type, as pydantic would not name the types."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(value, dict) and kind not in ("text", "json_object", "json_schema"):
        raise ApiError(
            'text.format.type: expected "text", "json_object" or "json_schema"',
            param="text.format.type",
            code="invalid_value",
        )
    return value


TextFormat = Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")]


class ResponseText(Request):
    """The form of an answer's text. Its verbosity changes nothing."""

    format: Annotated[TextFormat | None, BeforeValidator(_format)] = None
    verbosity: Literal["low", "medium", "high"] | None = None

    @property
    def response_format(self) -> dict[str, Any] | None:
        """The same as a chat has it."""
        match self.format:
            case SchemaFormat() as schema:
                fields = {name: getattr(schema, name) for name in JsonSchemaFormat.model_fields}
                named = JsonSchemaFormat.model_construct(**fields)
                return {"type": "json_schema", "json_schema": named}
            case PlainFormat(type=kind):
                return {"type": kind}
        return None


class Reasoning(Request):
    """How much to think. Thoughts that a model writes are part of its text."""

    effort: ReasoningEffort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None
    mode: Literal["standard"] | None = None


class FunctionTool(Function, Item):
    """A function that the model may call."""

    type: Literal["function"]

    @property
    def as_tool(self) -> dict[str, Any]:
        """The same as a chat has it."""
        named = {name: getattr(self, name) for name in Function.model_fields}
        return {"type": "function", "function": named}


class ResponseNamedTool(Request):
    """The one function that has to be called."""

    type: Literal["function"]
    name: FunctionName

    @property
    def as_choice(self) -> dict[str, Any]:
        """The same as a chat has it."""
        return {"type": "function", "function": {"name": self.name}}


class ResponseAllowedTools(Request):
    """Some of the functions: with the mode `required` one of them has to be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ResponseNamedTool] = Field(min_length=1, max_length=MAX_TOOLS)

    @property
    def as_choice(self) -> dict[str, Any]:
        """The same as a chat has it."""
        allowed = {"mode": self.mode, "tools": [tool.as_choice for tool in self.tools]}
        return {"type": "allowed_tools", "allowed_tools": allowed}


ToolChoice = Literal["auto", "none", "required"] | ResponseNamedTool | ResponseAllowedTools
_CHOICES: Mapping[str, type[Request]] = {
    "function": ResponseNamedTool,
    "allowed_tools": ResponseAllowedTools,
}


def _tools(value: Any) -> Any:
    """Raises `ApiError` (400) for a tool that is no function, by its name."""
    for place, tool in enumerate(value if isinstance(value, list) else []):
        kind = tool.get("type") if isinstance(tool, dict) else "function"
        if kind not in ("function", None):
            param = f"tools.{place}"
            raise ApiError(
                f"{param}: this endpoint has no tool {shown(str(kind))}; it calls functions of the client only, "
                'as {"type": "function", "name": NAME, "parameters": SCHEMA}',
                param=param,
                code="unsupported_parameter",
            )
    return value


def _tool_choice(value: Any) -> Any:
    shapes = (
        '{"type": "function", "name": NAME}, or {"type": "allowed_tools", "mode": "auto" or "required", "tools": '
        '[{"type": "function", "name": NAME}]}'
    )
    return read_choice(value, _CHOICES, shapes=shapes)


Includable = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]
MetadataName = Annotated[str, Field(max_length=64)]
MetadataText = Annotated[str, Field(max_length=512)]


class ResponseRequest(AnswerRequest):
    """The body of POST /v1/responses."""

    harmless = RESPONSE_FIELDS
    advice: ClassVar[Mapping[str, str]] = {
        "previous_response_id": _SEND_AGAIN,
        "conversation": _SEND_AGAIN,
        "prompt": "templates of prompts are not stored here; send instructions and input",
        "background": "nothing is stored here that could be fetched later; leave it out and wait, or stream",
        "truncation": "nothing is cut out of input here; leave it out, and send what has room",
    }
    input: Input
    instructions: str | None = None
    max_output_tokens: Limit | None = None
    text: ResponseText | None = None
    reasoning: Reasoning | None = None
    tools: Annotated[list[FunctionTool], BeforeValidator(_tools)] = Field([], max_length=MAX_TOOLS)
    tool_choice: Annotated[ToolChoice, BeforeValidator(_tool_choice)] = "auto"
    parallel_tool_calls: bool = True
    include: list[Includable] = Field([], max_length=16)
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    metadata: dict[MetadataName, MetadataText] = Field({}, max_length=16)
    structured_outputs: StructuredOutputs | None = None
    chat_template_kwargs: dict[str, Any] = Field({})

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        is_said = any(not isinstance(item, ReasoningItem) for item in self.input)
        if not (is_said or self.instructions):
            raise ApiError(
                "input: expected a text, or a list with at least one item that is no reasoning",
                param="input",
                code="invalid_value",
            )
        return self

    @property
    def shows_logprobs(self) -> bool:
        return LOGPROBS in self.include or self.top_logprobs > 0


def as_chat(request: ResponseRequest) -> ChatRequest:
    """Returns the chat that answers a request. Raises `ApiError` (400), in the words of chats."""
    choice = request.tool_choice
    fields = {name: getattr(request, name) for name in AnswerRequest.model_fields}
    fields |= {
        "logit_bias": {str(token_id): bias for token_id, bias in request.logit_bias.items()},
        "messages": messages_of(request.input, instructions=request.instructions),
        "max_completion_tokens": request.max_output_tokens,
        "response_format": request.text and request.text.response_format,
        "reasoning_effort": request.reasoning and request.reasoning.effort,
        "tools": [tool.as_tool for tool in request.tools],
        "tool_choice": choice if isinstance(choice, str) else choice.as_choice,
        "parallel_tool_calls": request.parallel_tool_calls,
        "logprobs": request.shows_logprobs,
        "top_logprobs": request.top_logprobs,
        "structured_outputs": request.structured_outputs,
        "chat_template_kwargs": request.chat_template_kwargs,
        # The last event has the usage
        "stream_options": StreamOptions(include_usage=True) if request.stream else None,
    }
    try:
        return ChatRequest(**fields)
    except ValidationError as error:
        raise refusal_of(error, fields) from None

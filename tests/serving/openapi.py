"""The endpoint's OpenAPI document, which it does not publish: request bodies from its own models,
with what their validators accept; answers as OpenAI has them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, create_model
from pydantic.json_schema import models_json_schema

from serving.api.chat import ChatRequest, Limit
from serving.protocol.protocol import (
    MAX_PROMPTS,
    MAX_STOP_STRINGS,
    Bias,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from serving.protocol.request import Request
from serving.protocol.tool_fields import MAX_TOOLS
from serving.responses.request import ResponseRequest
from tests.serving.hostile_requests import MODEL

REFERENCE = "#/components/schemas/{model}"


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Error(Answer):
    message: str = Field(min_length=1)
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    error: Error


class PromptTokensDetails(Answer):
    cached_tokens: int = Field(ge=0)


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails  # of an endpoint without keys


class Logprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class RankedLogprob(Answer):
    logprob: float
    rank: int = Field(ge=1)
    decoded_token: str


class OfPrompt(Answer):
    """Where clients ask for them."""

    prompt_token_ids: list[int] = []
    prompt_logprobs: list[dict[str, RankedLogprob] | None] = []


class Choice(OfPrompt):
    text: str
    index: int
    logprobs: Logprobs | None
    finish_reason: str
    token_ids: list[int] = []


class Head(Answer):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str


class CompletionAnswer(Head):
    choices: list[Choice] = Field(min_length=1)
    usage: Usage


class TokenLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class AnswerMessage(Answer):
    role: str
    content: str
    refusal: None


class ChatChoice(Answer):
    index: int
    message: AnswerMessage
    logprobs: create_model("ChatLogprobs", content=(list[ChosenLogprob], ...)) | None  # type: ignore[misc, valid-type]
    finish_reason: str
    token_ids: list[int] = []


class ChatAnswer(Head, OfPrompt):
    choices: list[ChatChoice] = Field(min_length=1)
    usage: Usage


class OutputText(Answer):
    type: Literal["output_text"]
    text: str
    annotations: list[str]
    logprobs: list[ChosenLogprob]


class OutputMessage(Answer):
    id: str
    type: Literal["message"]
    status: Literal["completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText] = Field(min_length=1, max_length=1)


class InputTokensDetails(PromptTokensDetails):
    cache_write_tokens: Literal[0]


class ResponseUsage(Answer):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: create_model("OutputTokensDetails", reasoning_tokens=(Literal[0], ...))  # type: ignore[valid-type]
    total_tokens: int


class ResponseAnswer(Answer):
    """What comes back of the request is not looked at here."""

    model_config = ConfigDict(extra="allow")
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[OutputMessage] = Field(min_length=1)
    usage: ResponseUsage
    store: Literal[False]


class Embedding(Answer):
    object: str
    index: int
    embedding: list[float] | str


class EmbeddingAnswer(Answer):
    id: str
    object: str
    created: int
    model: str
    data: list[Embedding] = Field(min_length=1)
    usage: create_model("PromptUsage", prompt_tokens=(int, ...), total_tokens=(int, ...))  # type: ignore[valid-type]


class TokenizeAnswer(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(Answer):
    prompt: str


ROUTES: dict[str, tuple[type[Request], type[Answer]]] = {
    "/v1/completions": (CompletionRequest, CompletionAnswer),
    "/v1/chat/completions": (ChatRequest, ChatAnswer),
    "/v1/responses": (ResponseRequest, ResponseAnswer),
    "/v1/embeddings": (EmbeddingRequest, EmbeddingAnswer),
    "/tokenize": (TokenizeRequest, TokenizeAnswer),
    "/detokenize": (DetokenizeRequest, DetokenizeAnswer),
}


TokenIds = Annotated[list[int], Field(min_length=1)]
SeveralPrompts = Field(min_length=1, max_length=MAX_PROMPTS)
StopString = Annotated[str, Field(min_length=1, max_length=1024)]


def _text_part(kind: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"type": {"const": kind}, "text": {"type": "string"}},
        "required": ["type", "text"],
        "additionalProperties": False,
    }


def _schema(accepted: Any) -> dict[str, Any]:
    return TypeAdapter(accepted).json_schema()


PROMPTS = _schema(
    str
    | TokenIds
    | Annotated[list[str], SeveralPrompts]
    | Annotated[list[TokenIds], SeveralPrompts]
)
ACCEPTED: dict[tuple[str, str], dict[str, Any]] = {
    ("CompletionRequest", "prompt"): PROMPTS,
    ("EmbeddingRequest", "input"): PROMPTS,
    ("ChatRequest", "max_tokens"): _schema(Literal[-1] | Limit),
    ("ChatMessage", "tool_calls"): {
        "anyOf": [
            {
                "type": "array",
                "items": {"$ref": REFERENCE.format(model="ToolCall")},
                "maxItems": MAX_TOOLS,
            },
            {"type": "null"},
        ],
    },
    ("ChatMessage", "content"): {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": _text_part("text")},
            {"type": "null"},
        ],
    },
}
INPUT_TEXT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _text_part("input_text")}]}
ACCEPTED |= {("MessageItem", "content"): INPUT_TEXT, ("OutputItem", "output"): INPUT_TEXT}
for _model in ("CompletionRequest", "ChatRequest", "ResponseRequest"):
    ACCEPTED |= {
        (_model, "stop"): _schema(
            StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]
        ),
        (_model, "seed"): _schema(Annotated[int, Field(ge=-(2**63), lt=2**63)]),
        (_model, "logit_bias"): {
            "type": "object",
            "patternProperties": {"^[0-9]{1,10}$": _schema(Bias)},
            "additionalProperties": False,
            "maxProperties": 300,
        },
    }
for _name in ("include_usage", "continuous_usage_stats", "include_obfuscation"):
    ACCEPTED["StreamOptions", _name] = _schema(bool | None)


def openapi() -> dict[str, Any]:
    models = [model for route in ROUTES.values() for model in route] + [ErrorAnswer]
    _, definitions = models_json_schema([(m, "validation") for m in models], ref_template=REFERENCE)
    schemas = definitions["$defs"]
    given = schemas["ResponseRequest"]["properties"]["input"]
    schemas["ResponseRequest"]["properties"]["input"] = {
        "anyOf": [{"type": "string"}, given | {"minItems": 1}]
    }
    for (model, field), accepted in ACCEPTED.items():
        assert field in schemas[model]["properties"]
        schemas[model]["properties"][field] = accepted
    names = [request.__name__ for request, _ in ROUTES.values()]
    for name in (*names, "MessageItem", "CallItem", "OutputItem", "FunctionTool", "SchemaFormat"):
        _as_the_endpoint_reads(schemas[name])
    return {
        "openapi": "3.1.0",
        "info": {"title": "raymill", "version": "1"},
        "paths": {
            path: {
                "post": {
                    "requestBody": {"required": True, "content": _json(request.__name__)},
                    "responses": {
                        "200": {
                            "description": "done",
                            "content": _json(answer.__name__) | _events(path),
                        },
                        **{
                            str(status): {
                                "description": "refused",
                                "content": _json(ErrorAnswer.__name__),
                            }
                            for status in (400, 404, 413, 415)
                        },
                    },
                }
            }
            for path, (request, answer) in ROUTES.items()
        },
        "components": {"schemas": schemas},
    }


def _as_the_endpoint_reads(schema: dict[str, Any]) -> None:
    """A field that is null counts as absent, and there is one model."""
    for name, field in schema["properties"].items():
        if name == "model":
            field["enum"] = [MODEL]
        if name not in schema["required"]:
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}


def _json(model: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": REFERENCE.format(model=model)}}}


def _events(path: str) -> dict[str, Any]:
    """Where the answer may be a stream: the shape of each of its events."""
    event = {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"type": "string", "minLength": 1}},
    }
    streams = path.endswith(("completions", "responses"))
    return {"text/event-stream": {"schema": event}} if streams else {}

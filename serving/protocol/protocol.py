"""The requests of the HTTP interface: OpenAI's completions, vLLM's tokenize."""

import asyncio
import difflib
import hashlib
import re
from dataclasses import fields
from functools import cache
from typing import Annotated, Any, Literal, NoReturn, Self, TypeVar

import fastapi
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)

from model.files.strict_json import shown
from model.generation.sampling_params import SamplingParams
from model.text.tokenizer import PromptEncoding
from serving.protocol import harmless_fields
from serving.protocol.errors import ApiError
from serving.protocol.plain_words import refusal_of
from serving.protocol.request import Request
from serving.protocol.strict_json import parse_json_object, read_json_body
from serving.protocol.structured_fields import StructuredFields

MAX_PROMPTS = 256
MAX_CHOICES = 8
MAX_STOP_STRINGS = 16  # OpenAI has 4, vLLM no limit
MAX_STOP_TOKEN_IDS = 128
MAX_LOGPROBS = 20
DEFAULT_MAX_TOKENS = 16
PARSED_AT_ONCE_BYTES = 16 << 10  # takes at most 2 to 5 ms; a megabyte takes up to 0.25 s

Prompts = list[str] | list[list[int]]


def _is_token_ids(value: Any) -> bool:
    return set(map(type, value)) <= {int}


def _prompts(value: Any) -> Prompts:
    """Turns one prompt or several, as text or as token ids, into a list of prompts of one kind."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _is_token_ids(value):
            return [value]
        if len(value) > MAX_PROMPTS:
            raise ValueError(
                f"{len(value)} prompts were given, at most {MAX_PROMPTS} are allowed in one request"
            )
        if all(isinstance(prompt, str) for prompt in value):
            return value
        if all(isinstance(prompt, list) and prompt and _is_token_ids(prompt) for prompt in value):
            return value
    raise ValueError(
        "expected a string, a list of strings, a list of token ids, or a list of such lists; none empty"
    )


def _stop_strings(value: Any) -> tuple[str, ...]:
    stop = (value,) if isinstance(value, str) else value
    if not isinstance(stop, list | tuple) or not all(isinstance(s, str) for s in stop):
        raise ValueError("expected a string or a list of strings")
    if len(stop) > MAX_STOP_STRINGS:
        raise ValueError(
            f"{len(stop)} stop strings were given, at most {MAX_STOP_STRINGS} are allowed"
        )
    if not all(1 <= len(s) <= 1024 for s in stop):
        raise ValueError("a stop string has 1 to 1024 characters")
    return tuple(stop)


def _token_id_keys(value: Any) -> Any:
    if not isinstance(value, dict) or not all(re.fullmatch("[0-9]{1,10}", key) for key in value):
        raise ValueError('expected an object from token ids to biases, such as {"50256": -100}')
    return {int(key): bias for key, bias in value.items()}


def _whole_number(value: Any) -> Any:
    """Accepts 1.0 for 1, which some libraries write."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Smaller numbers would overflow or vanish in the sampler, where they change nothing: the most
# probable token already wins by far, or has more than 1e-9 of all.
GREEDY_BELOW, SMALLEST_TOP_P = 1e-5, 1e-9
Temperature = Annotated[
    float, Field(ge=0, le=2), AfterValidator(lambda value: 0.0 if value < GREEDY_BELOW else value)
]
TopP = Annotated[float, Field(gt=0, le=1), AfterValidator(lambda value: max(value, SMALLEST_TOP_P))]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]


Flag = Annotated[bool, BeforeValidator(lambda value: value is not None and value)]  # null is false


class StreamOptions(Request):
    include_usage: Flag = False
    continuous_usage_stats: Flag = False  # with include_usage: usage so far in every part
    include_obfuscation: Flag = False  # there is none


class RaymillOptions(Request):
    """Fields that only raymill has."""

    receipt: bool = False


class AnswerRequest(Request):
    """The fields that all requests for an answer share. `top_k`, `min_p`, `repetition_penalty` and
    the last four but `raymill` are vLLM's; the others, with their ranges and defaults, are
    OpenAI's."""

    model: str
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: int = Field(0, ge=-1, le=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    stream: bool = False
    stop: Annotated[tuple[str, ...], PlainValidator(_stop_strings)] = ()
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63), BeforeValidator(_whole_number)] = None
    user: str | None = Field(None, max_length=256)
    logit_bias: Annotated[dict[int, Bias], BeforeValidator(_token_id_keys)] = Field(
        default_factory=dict, max_length=300
    )
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: float = Field(1.0, ge=0.01, le=2)
    ignore_eos: bool = False
    stop_token_ids: list[int] = Field(default_factory=list, max_length=MAX_STOP_TOKEN_IDS)
    min_tokens: int = Field(0, ge=0, le=2**31)
    raymill: RaymillOptions | None = None


class GenerationRequest(StructuredFields, AnswerRequest):
    """The fields that completions and chats share. `structured_outputs` and the last two are
    vLLM's."""

    harmless = harmless_fields.FIELDS
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    return_token_ids: bool = False

    @model_validator(mode="after")
    def _ends_by_its_grammar(self) -> Self:
        if self.read_grammar() is None:
            return self
        for name in ("ignore_eos", "min_tokens"):
            if getattr(self, name):
                raise ApiError(
                    f"{name} is not allowed with {self.grammar_field}, by which the answer ends",
                    param=name,
                )
        return self

    @model_validator(mode="after")
    def _fits_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                "stream_options is allowed with stream=true only", param="stream_options"
            )
        if self.prompt_logprobs is not None and self.stream:
            raise ApiError(
                "prompt_logprobs is allowed only without stream=true", param="prompt_logprobs"
            )
        return self


@cache
def _names(request_type: type[Request]) -> frozenset[str]:
    """Returns the names of a request's fields, for which pydantic takes longer each time."""
    return frozenset(request_type.model_fields)


@cache
def _sampling_names(request_type: type[Request]) -> frozenset[str]:
    return _names(request_type) & {field.name for field in fields(SamplingParams)}


def sampling_of(request: Request) -> SamplingParams:
    """Returns how a request's tokens are drawn: by its fields that have the names of
    `SamplingParams`."""
    given = vars(request)
    asked = {name: given[name] for name in _sampling_names(type(request))}
    asked |= {
        "top_k": max(asked["top_k"], 0),
        "logit_bias": tuple(asked.get("logit_bias", {}).items()),
    }
    return SamplingParams(**asked)


def choice_seed(seed: int | None, index: int) -> int | None:
    """Returns the seed of choice `index`. The first has the request's own, so that n=1 is the first
    choice of any n. Without a seed none has one, as vLLM draws rows with a seed alone."""
    if seed is None or index == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8]) >> 1


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: Annotated[Prompts, PlainValidator(_prompts)]
    max_tokens: int = Field(DEFAULT_MAX_TOKENS, ge=0, le=2**31)
    # Counts before max_tokens; guidellm sends both
    max_completion_tokens: int | None = Field(None, ge=0, le=2**31)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    add_special_tokens: bool = True
    parse_special: bool = False

    @property
    def encoding(self) -> PromptEncoding:
        return PromptEncoding(self.add_special_tokens, self.parse_special)

    @property
    def token_limit(self) -> int:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def reserved_tokens(self) -> int:
        """The tokens of each choice that count against a key's quota before they are generated."""
        return self.token_limit

    @model_validator(mode="after")
    def _no_tokens_need_another_result(self) -> Self:
        if self.token_limit == 0 and not self.echo and self.prompt_logprobs is None:
            raise ApiError(
                "max_tokens=0 is allowed with echo=true or prompt_logprobs only", param="max_tokens"
            )
        return self


class EmbeddingRequest(Request):
    """The body of POST /v1/embeddings."""

    harmless = harmless_fields.FIELDS
    model: str
    input: Annotated[Prompts, PlainValidator(_prompts)]
    encoding_format: Literal["float", "base64"] = "float"
    add_special_tokens: bool = True
    user: str | None = Field(None, max_length=256)


class TokenizeRequest(Request):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    parse_special: bool = False
    return_token_strs: bool = False

    @property
    def encoding(self) -> PromptEncoding:
        return PromptEncoding(self.add_special_tokens, self.parse_special)


class DetokenizeRequest(Request):
    model: str | None = None
    tokens: list[int]


RequestType = TypeVar("RequestType", bound=Request)


async def read_request(request: fastapi.Request, request_type: type[RequestType]) -> RequestType:
    """Reads a request's body, in a thread if it is large. Raises `ApiError`."""
    body = await read_json_body(request)
    if len(body) <= PARSED_AT_ONCE_BYTES:
        return parse_request(body, request_type)
    return await asyncio.to_thread(parse_request, body, request_type)


def parse_request(body: bytes, request_type: type[RequestType]) -> RequestType:
    """Reads a body, in which null counts as missing. Raises `ApiError` (400) that names the
    field."""
    fields = parse_json_object(body)
    given: dict[str, Any] = {}
    names = _names(request_type)
    for name, value in fields.items():
        if name in names:
            if value is not None:
                given[name] = value
        elif not harmless_fields.is_harmless(name, value, request_type.harmless):
            _refuse_field(name, request_type)
    try:
        return request_type(**given)
    except ValidationError as error:
        raise refusal_of(error, given) from None


def _refuse_field(name: str, request_type: type[Request]) -> NoReturn:
    param = shown(name)
    if name in request_type.harmless:
        advice = request_type.advice.get(name) or harmless_fields.advice(
            name, request_type.harmless
        )
        raise ApiError(
            f"{param} is not supported; {advice}",
            param=param,
            code="unsupported_parameter",
        )
    similar = difflib.get_close_matches(name[:64], list(request_type.model_fields), n=1)
    hint = f"; did you mean {similar[0]}?" if similar else ""
    raise ApiError(f"Unknown field: {param}{hint}", param=param, code="unknown_parameter")

"""The requests and answers of the HTTP interface: strict JSON, OpenAI's completions, vLLM's tokenize."""

import difflib
import json
import math
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError

from serving.errors import ApiError, invalid_request

MAX_BODY_BYTES = 1 << 20
MAX_PROMPTS = 32
MAX_CHOICES = 8
MAX_STOP_STRINGS = 4
MAX_LOGPROBS = 5
DEFAULT_MAX_TOKENS = 16
UNSUPPORTED_FIELDS = ("best_of", "suffix")  # OpenAI's, known and left out

Prompts = list[str] | list[list[int]]


def _is_token_ids(value: Any) -> bool:
    return all(type(token_id) is int for token_id in value)


def _prompts(value: Any) -> Prompts:
    """One prompt or several, as text or as token ids: always a list of prompts of one kind."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _is_token_ids(value):
            return [value]
        if len(value) > MAX_PROMPTS:
            raise ValueError(f"{len(value)} prompts were given, at most {MAX_PROMPTS} are allowed in one request")
        if all(isinstance(prompt, str) for prompt in value):
            return value
        if all(isinstance(prompt, list) and prompt and _is_token_ids(prompt) for prompt in value):
            return value
    raise ValueError("expected a string, a list of strings, a list of token ids, or a list of such lists; none empty")


def _stop_strings(value: Any) -> tuple[str, ...]:
    stop = (value,) if isinstance(value, str) else value
    if not isinstance(stop, list | tuple) or not all(isinstance(s, str) for s in stop):
        raise ValueError("expected a string or a list of strings")
    if len(stop) > MAX_STOP_STRINGS:
        raise ValueError(f"{len(stop)} stop strings were given, at most {MAX_STOP_STRINGS} are allowed")
    if not all(1 <= len(s) <= 1024 for s in stop):
        raise ValueError("a stop string has 1 to 1024 characters")
    return tuple(stop)


def _token_id_keys(value: Any) -> Any:
    if not isinstance(value, dict) or not all(key.isdecimal() and len(key) <= 10 for key in value):
        raise ValueError('expected an object from token ids to biases, such as {"50256": -100}')
    return {int(key): bias for key, bias in value.items()}


Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Request(BaseModel):
    """Base of the request bodies: no conversion between types, no unknown field, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class StreamOptions(Request):
    include_usage: bool = False


class CompletionRequest(Request):
    """Body of POST /v1/completions; ranges and defaults are OpenAI's, `top_k`, `min_p`, `repetition_penalty` and
    `ignore_eos` vLLM's."""

    model: str
    prompt: Annotated[Prompts, PlainValidator(_prompts)]
    max_tokens: int = Field(DEFAULT_MAX_TOKENS, ge=0, le=2**31)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(_stop_strings)] = ()
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    user: str | None = Field(None, max_length=256)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    logit_bias: Annotated[dict[int, Bias], BeforeValidator(_token_id_keys), Field(max_length=300)] = {}
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: float = Field(1.0, gt=0, le=2)
    ignore_eos: bool = False


class TokenizeRequest(Request):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True  # GPT-2 vocabularies add none
    return_token_strs: bool = False


class DetokenizeRequest(Request):
    model: str | None = None
    tokens: list[int]


class Logprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(BaseModel):
    text: str
    index: int
    logprobs: Logprobs | None
    finish_reason: str | None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionResponse(BaseModel):
    """A whole answer, or one event of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[Choice]
    usage: Usage | None


RequestType = TypeVar("RequestType", bound=Request)


def parse_request(body: bytes, request_type: type[RequestType]) -> RequestType:
    """Raises `ApiError` (400) that names the field. A field that is null counts as not given."""
    fields = parse_json_object(body)
    for name in fields:
        if name not in request_type.model_fields:
            _refuse_field(name, list(request_type.model_fields))
    try:
        return request_type(**{name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise _from_pydantic(error) from None


def parse_completion(body: bytes) -> CompletionRequest:
    request = parse_request(body, CompletionRequest)
    if request.stream_options is not None and not request.stream:
        raise invalid_request("stream_options is allowed with stream=true only", param="stream_options")
    if request.max_tokens == 0 and not request.echo:
        raise invalid_request("max_tokens=0 is allowed with echo=true only", param="max_tokens")
    return request


def parse_json_object(body: bytes) -> dict[str, Any]:
    """One JSON object, more strictly than `json.loads`: UTF-8 only, no NaN or Infinity, no key twice, no text that
    cannot be encoded. Raises `ApiError` (400)."""
    try:
        fields = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else ascii(str(error))[1:-1]
        raise invalid_request(f"The body is not valid JSON: {reason}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise invalid_request("The body must be a JSON object", code="invalid_json")
    for name, value in fields.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise invalid_request(
                f"{_shown(name)} contains half of a surrogate pair, which is no character", param=_shown(name)
            ) from None
    return fields


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the key {_shown(name)} occurs twice")
        fields[name] = value
    return fields


def _refuse_constant(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not a JSON number")


def _finite_float(literal: str) -> float:
    if not math.isfinite(value := float(literal)):
        raise ValueError(f"{literal[:32]} is too large a number")
    return value


def _shown(name: str) -> str:
    """A client's own text in a message: short, and without control characters."""
    return ascii(name[:64])[1:-1]


def _refuse_field(name: str, known: list[str]) -> NoReturn:
    shown = _shown(name)
    if name in UNSUPPORTED_FIELDS:
        raise invalid_request(f"{shown} is not supported; leave it out", param=shown, code="unsupported_parameter")
    similar = difflib.get_close_matches(name[:64], known, n=1)
    hint = f"; did you mean {similar[0]}?" if similar else ""
    raise invalid_request(f"Unknown field: {shown}{hint}", param=shown, code="unknown_parameter")


def _from_pydantic(error: ValidationError) -> ApiError:
    """The first problem, in words."""
    first = error.errors(include_url=False)[0]
    param = ".".join(_shown(str(part)) for part in first["loc"])
    if first["type"] == "missing":
        return invalid_request(f"{param} is missing", param=param, code="missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    value = first["input"]
    got = f" (got {str(value)[:32]})" if isinstance(value, int | float) else ""
    return invalid_request(f"{param}: {message}{got}", param=param, code="invalid_value")

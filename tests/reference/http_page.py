"""The page of the HTTP interface: routes, and the fields of their requests."""

import json
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from model.tables import read_table
from serving.api.admin_routes import DrainRequest, Order, PromoteRequest, RollbackRequest
from serving.api.chat import ChatMessage, ChatRequest
from serving.protocol import protocol
from serving.protocol.harmless_fields import (
    FIELDS,
    ITEM_FIELDS,
    KINDS,
    MESSAGE_FIELDS,
    RESPONSE_FIELDS,
)
from serving.protocol.protocol import (
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    StreamOptions,
    TokenizeRequest,
)
from serving.protocol.request import Request
from serving.protocol.structured_fields import (
    JsonSchemaFormat,
    ResponseFormat,
    StructuredOutputs,
)
from serving.protocol.tool_fields import Function
from serving.responses.items import CallItem, MessageItem, OutputItem
from serving.responses.request import Reasoning, ResponseRequest, ResponseText
from serving.xray.trace import TraceRequest
from serving.xray.xray import XrayRequest
from tests.reference.markdown import MADE, cell, code, listed, sentence, table
from tests.reference.settings_page import bounds_of

BODIES: dict[str, tuple[str, type[Request], str]] = {
    "Completions": ("", CompletionRequest, "`POST /v1/completions`."),
    "Options of a stream": ("stream_options", StreamOptions, "The field `stream_options`."),
    "What an answer follows": (
        "response_format",
        ResponseFormat,
        "The field `response_format`. [Structured answers and tools](../how-to/structured.md) shows it.",
    ),
    "A schema": ("json_schema", JsonSchemaFormat, "The field `json_schema` of it."),
    "The same as vLLM has it": (
        "structured_outputs",
        StructuredOutputs,
        "The field `structured_outputs`: exactly one of these.",
    ),
    "Chat": ("chat", ChatRequest, "`POST /v1/chat/completions`."),
    "A tool": (
        "function",
        Function,
        'The field `function` of an entry of `tools`, beside `"type": "function"`.',
    ),
    "A message of a chat": ("message", ChatMessage, "An entry of `messages`."),
    "Responses": (
        "response",
        ResponseRequest,
        "`POST /v1/responses`. [Serve](../how-to/serve.md#responses) says what there is of it.",
    ),
    "The text of a response": ("response_text", ResponseText, "The field `text`."),
    "Thoughts of a response": ("reasoning", Reasoning, "The field `reasoning`."),
    "A message of a response": (
        "message_item",
        MessageItem,
        "An item of `input`. Items of the type `reasoning` are left out, and others are refused.",
    ),
    "A call of a response": ("call_item", CallItem, "An item of `input`."),
    "What a call of a response came to": ("output_item", OutputItem, "An item of `input`."),
    "Embeddings": ("embedding", EmbeddingRequest, "`POST /v1/embeddings`."),
    "Tokenize": ("tokenize", TokenizeRequest, "`POST /tokenize`."),
    "Detokenize": ("detokenize", DetokenizeRequest, "`POST /detokenize`."),
    "X-ray": ("xray", XrayRequest, "`POST /v1/xray`."),
    "Trace": ("trace", TraceRequest, "`POST /v1/trace`, with either `text` or `tokens`."),
    "Promote": ("promote", PromoteRequest, "`POST /admin/promote`."),
    "Finish": ("order", Order, "`POST /admin/finish`."),
    "Roll back": ("rollback", RollbackRequest, "`POST /admin/rollback`."),
    "Drain": ("drain", DrainRequest, "`POST /admin/drain`."),
}
_INTRODUCTION = """\
# HTTP interface

OpenAI's completions, chat and responses API, vLLM's tokenize, and routes of our own. Bodies are strict JSON of at most 1 MiB. A field that
is null counts as missing.

**What would change the answer is refused, everything else is accepted.** A field that neither OpenAI's nor vLLM's interface
has is refused as `unknown_parameter`, and a field of theirs whose value would change the answer as `unsupported_parameter`, with
a hint what to do. [Errors](errors.md) lists all errors.

| route | key | what it does |
| --- | --- | --- |
| `POST /v1/completions` | user | continues prompts |
| `POST /v1/chat/completions` | user | answers conversations |
| `POST /v1/responses` | user | answers conversations, in the shapes of responses. Under `/v1/responses/{id}` is nothing, as none is stored |
| `POST /v1/embeddings` | user | the mean of a text's hidden states after the final norm |
| `GET /v1/models`, `/v1/models/{id}` | user | the models, with run, step, parameters, data manifest, tokenizer and code |
| `POST /tokenize`, `/detokenize` | user | text to token ids, and back |
| `GET /version`, `/metrics` | user | the code's version; the metrics of the replica that answers |
| `POST /v1/xray`, `GET /v1/xray` | user or admin | looks inside a query; the limits and the run's steps |
| `POST /v1/trace`, `GET /v1/trace` | with `may=trace` | finds a text in what the model was trained on; the limits. 404 without the setting `trace` |
| `GET /`, `/chat/…` | none | the page to talk to the model, which asks for the key if there is one |
| `GET /inside`, `/page/…` | none | the x-ray page, which does too |
| `GET`, `HEAD` `/health`, `/ready` | none | the process answers; the engine runs and has passed its self-test, with the number of `replicas` that do so, and `min_replicas` |
| `GET /-/healthz` | none | Ray Serve's own, which Kubernetes asks for |
| `POST /admin/promote`, `/finish`, `/rollback`, `/drain` | admin | see [Delivery](../explanation/delivery.md) |
| `GET /admin/status`, `/admin/audit` | admin | the endpoint's versions and history; its last 1,000 orders |

A key is sent as `Authorization: Bearer KEY`. Each answer carries `x-request-id` (the client's own if it is 1 to 64 of
`A-Za-z0-9-`), and each answer of a replica `x-model-version`, which is also the `system_fingerprint` of a completion, a chat or
a response.

"""
_WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}


def words() -> dict[str, dict[str, str]]:
    """Returns the meaning of each field, by the request's name; `all` has what requests share."""
    known: dict[str, Any] = read_table(protocol.__file__, "fields")
    return known


def meaning(request: str, field: str) -> str:
    """Raises `KeyError` for a field that serving/protocol/fields.toml has no words for."""
    known = words()
    return known.get(request, {}).get(field) or known["all"][field]


def _type(kind: Any) -> str:
    if kind in _WORDS:
        return _WORDS[kind]
    if get_origin(kind) is Literal:
        words = [word if isinstance(word, str) else json.dumps(word) for word in get_args(kind)]
        return ", ".join(map(code, words))
    if getattr(kind, "__metadata__", None) is not None:
        return _type(get_args(kind)[0])
    if get_origin(kind) in (list, tuple):
        return "list"
    if get_origin(kind) is dict or (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return "object"
    inner = [_type(part) for part in get_args(kind) if part is not type(None)]
    return " or ".join(dict.fromkeys(inner))


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    default = info.get_default(call_default_factory=True)
    return code(json.dumps(default)) if default not in (None, (), {}, []) else ""


def _rows(request: str, model: type[Request]) -> list[list[str]]:
    return [
        [
            code(info.alias or name),
            cell(sentence(meaning(request, name))),
            listed(_type(info.annotation), bounds_of(info)),
            _default(info),
        ]
        for name, info in model.model_fields.items()
    ]


def _harmless(known: dict[str, Any]) -> list[list[str]]:
    by_values: dict[str, list[str]] = {}
    for name, values in known.items():
        shown = ", ".join(_harmless_value(value) for value in values) or "null only"
        by_values.setdefault(shown, []).append(name)
    return [[", ".join(map(code, names)), shown] for shown, names in by_values.items()]


def _harmless_value(value: Any) -> str:
    return KINDS[value] if isinstance(value, type) else code(json.dumps(value))


def page() -> str:
    text = MADE + _INTRODUCTION
    for title, (request, model, about) in BODIES.items():
        text += f"## {title}\n\n{about}\n\n"
        text += table(("field", "meaning", "type, bounds", "default"), _rows(request, model))
    text += "## Fields that are accepted with harmless values\n\n"
    text += "Nothing is stored, billed, padded or cut because of them.\n\n"
    text += table(("fields of a request", "values"), _harmless(dict(FIELDS)))
    text += table(("fields of a message", "values"), _harmless(dict(MESSAGE_FIELDS)))
    text += table(
        ("fields of a request for a response", "values"), _harmless(dict(RESPONSE_FIELDS))
    )
    text += table(
        ("fields of an item, a part or a function", "values"), _harmless(dict(ITEM_FIELDS))
    )
    return text

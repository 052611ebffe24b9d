"""The input of a response: its items, and the messages of a chat that they are."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from model.files.strict_json import shown
from serving.api.chat import MAX_MESSAGES
from serving.protocol.errors import ApiError
from serving.protocol.harmless_fields import ITEM_FIELDS, is_harmless
from serving.protocol.request import Request
from serving.protocol.tool_fields import FunctionName

MAX_ITEMS = 2 * MAX_MESSAGES  # several calls are one message, and thoughts are none
CallId = Annotated[str, Field(min_length=1, max_length=256)]
_TEXT_PARTS = {"input_text": "text", "output_text": "text", "refusal": "refusal"}
"""The kinds of parts that are text, and the field that has it."""


def _text(value: Any) -> Any:
    """Accepts a text, or a list of parts that are texts."""
    return "".join(map(_text_of, value)) if isinstance(value, list) else value


def _text_of(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        kinds = ", ".join(_TEXT_PARTS)
        raise ValueError(
            f"this model reads text only: expected parts of the types {kinds}, got {_named(kind)}"
        )
    field = _TEXT_PARTS[kind]
    for name, value in part.items():
        if name not in ("type", field) and not is_harmless(name, value, ITEM_FIELDS):
            raise ValueError(f"a part of the type {kind} has no {shown(name)}; leave it out")
    text = part.get(field)
    if not isinstance(text, str):
        raise ValueError(f"a part of the type {kind} has its text under {field}")
    return text


def _named(kind: Any) -> str:
    return shown(kind) if isinstance(kind, str) else "a part without a type"


class Item(Request):
    """The base of items, and of a response's fields about functions: null counts as missing."""

    @model_validator(mode="before")
    @classmethod
    def _without_harmless(cls, fields: Any) -> Any:
        """Removes harmless fields, so that an answer can be sent back as it came."""
        if not isinstance(fields, dict):
            return fields
        known = {info.alias or name for name, info in cls.model_fields.items()}
        return {
            name: value
            for name, value in fields.items()
            if (name in known and value is not None)
            or (name not in known and not is_harmless(name, value, ITEM_FIELDS))
        }


class MessageItem(Item):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[str, BeforeValidator(_text)]


class CallItem(Item):
    """A call in an earlier answer."""

    type: Literal["function_call"]
    call_id: CallId
    name: FunctionName
    arguments: str


class OutputItem(Item):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: Annotated[str, BeforeValidator(_text)]


class ReasoningItem(Request):
    """A thought of another endpoint's model, which is left out."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["reasoning"]


_KINDS = ("message", "function_call", "function_call_output", "reasoning")


def _kind(item: Any) -> str:
    """Returns an item's type. What has none is a message, but for a mere reference."""
    if not isinstance(item, Mapping):
        return "message"
    default = "item_reference" if item.keys() == {"id"} else "message"
    kind = item.get("type")
    return default if kind is None else str(kind)


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


def _items(value: Any) -> Any:
    """Accepts a text, which is a user's. Raises `ApiError` (400) for an item that is not read."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise ValueError("expected a text or a list of items")
    for place, item in enumerate(value):
        kind = _kind(item)
        if kind in _KINDS:
            continue
        problem = f"items of the type {shown(kind)} are not supported; expected {', '.join(_KINDS)}"
        if kind == "item_reference":
            problem = (
                "nothing is stored here that an item could refer to; send the item itself, as clients do that are told "
                "store: false"
            )
        param = f"input.{place}"
        raise ApiError(f"{param}: {problem}", param=param, code="unsupported_parameter")
    return value


Input = Annotated[list[InputItem], BeforeValidator(_items), Field(max_length=MAX_ITEMS)]


def messages_of(items: Sequence[Any], *, instructions: str | None) -> list[dict[str, Any]]:
    """Returns the chat's messages. What an assistant says and calls in one turn is one message, as
    it was one answer."""
    messages = list[dict[str, Any]]()
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        last = messages[-1] if messages else {}
        match item:
            case MessageItem(role="assistant") if last.get("tool_calls"):
                last["content"] += item.content
            case MessageItem():
                messages.append({"role": item.role, "content": item.content})
            case CallItem():
                if last.get("role") != "assistant":
                    last = {"role": "assistant", "content": ""}
                    messages.append(last)
                function = {"name": item.name, "arguments": item.arguments}
                last.setdefault("tool_calls", []).append(
                    {"id": item.call_id, "type": "function", "function": function}
                )
            case OutputItem():
                messages.append(
                    {"role": "tool", "tool_call_id": item.call_id, "content": item.output}
                )
    return messages

"""Reads untrusted JSON strictly: one object, UTF-8, no duplicate keys, only finite numbers, not too deep."""

import asyncio
import json
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from fastapi import Request

from serving.protocol.errors import invalid_request

MAX_BODY_BYTES = 1 << 20
PARSED_AT_ONCE_BYTES = 16 << 10  # takes at most 2 to 5 ms; a megabyte takes up to 0.25 s
Parsed = TypeVar("Parsed")


async def read_request(request: Request, parse: Callable[[bytes], Parsed]) -> Parsed:
    """Returns the body as read by `parse`, which runs in a thread if the body is large. Raises `ApiError`."""
    body = await read_json_body(request)
    return parse(body) if len(body) <= PARSED_AT_ONCE_BYTES else await asyncio.to_thread(parse, body)


async def read_json_body(request: Request) -> bytes:
    """Returns the raw body. Raises `ApiError` if its headers do not declare plain JSON, or if it is too large."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise invalid_request(
            "The body must be declared as JSON: send the header -H 'Content-Type: application/json'", status=415
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise invalid_request("A compressed body is not supported; send it plain", status=415)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise invalid_request(f"The body exceeds {MAX_BODY_BYTES} bytes; send less", status=413)
    return bytes(body)


MAX_DEPTH = 32
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # UTF-8 has none


def parse_json_object(body: bytes) -> dict[str, Any]:
    """Parses a body. Raises `ApiError` (400), also for text that cannot be encoded (half of a surrogate pair)."""
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
    _require_shallow(fields)
    if _ESCAPED_SURROGATE.search(body) is None:
        return fields
    for name, value in fields.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise invalid_request(
                f"{shown(name)} contains half of a surrogate pair, which is no character", param=shown(name)
            ) from None
    return fields


def shown(name: str) -> str:
    """Returns a client's text for a message: short, and without control characters."""
    return ascii(name[:64])[1:-1]


def _require_shallow(fields: dict[str, Any]) -> None:
    level: list[Any] = [fields]
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise invalid_request(
                f"The body is not valid JSON: it is nested too deeply; at most {MAX_DEPTH} levels are read",
                code="invalid_json",
            )
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the key {shown(name)} occurs twice")
        fields[name] = value
    return fields


def _refuse_constant(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not a JSON number")


def _finite_float(literal: str) -> float:
    if not math.isfinite(value := float(literal)):
        raise ValueError(f"{literal[:32]} is too large a number")
    return value

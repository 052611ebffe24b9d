"""Reads untrusted JSON strictly: one object, UTF-8, no duplicate keys, only finite numbers, not too deep."""

import json
import math
import re
from typing import Any, NoReturn

from fastapi import Request

from serving.protocol.errors import invalid_request

MAX_BODY_BYTES = 1 << 20


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
        if not isinstance(fields, dict):
            raise invalid_request("The body must be a JSON object", code="invalid_json")
        if _depth(fields) > MAX_DEPTH:
            raise RecursionError
    except (ValueError, RecursionError) as error:
        is_deep = isinstance(error, RecursionError)
        problem = (
            f"it is nested too deeply; at most {MAX_DEPTH} levels are read" if is_deep else ascii(str(error))[1:-1]
        )
        raise invalid_request(f"The body is not valid JSON: {problem}", code="invalid_json") from None
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


def _depth(value: dict[str, Any] | list[Any]) -> int:
    """Returns how many objects and lists are within each other."""
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max((_depth(v) for v in inner if isinstance(v, dict | list)), default=0)


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

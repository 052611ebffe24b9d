"""Reads untrusted JSON strictly: one object, UTF-8, no duplicate keys, only finite numbers, not too
deep."""

import json
import re
from typing import Any

import orjson
from fastapi import Request

from serving.protocol.errors import ApiError

MAX_BODY_BYTES = 1 << 20
MAX_DEPTH = 32
# Lists and objects in a body: half a second of Python's lock for 350,000, which fit into one
MAX_CONTAINERS = 20_000
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


async def read_json_body(request: Request) -> bytes:
    """Returns the raw body. Raises `ApiError` if its headers do not declare plain JSON, or if it is
    too large."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(
            "The body must be declared as JSON: send the header -H 'Content-Type: application/json'",
            status=415,
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError("A compressed body is not supported; send it plain", status=415)
    body = await request.body()  # the front door discards the rest of one that is too large
    if len(body) > MAX_BODY_BYTES:
        raise ApiError(f"The body exceeds {MAX_BODY_BYTES} bytes; send less", status=413)
    return body


def parse_json_object(body: bytes) -> dict[str, Any]:
    """Parses a body. Raises `ApiError` (400)."""
    if _num_containers(body) > MAX_CONTAINERS:
        raise ApiError(
            f"The body has more than {MAX_CONTAINERS} lists and objects; send less at once",
            code="invalid_json",
        )
    try:
        # It refuses what `json` takes: NaN, 1e999, half of a surrogate pair, UTF-16. But it takes a
        # key twice.
        orjson.loads(body)
        fields = json.loads(body, object_pairs_hook=_unique_keys)
        if not isinstance(fields, dict):
            raise ApiError("The body must be a JSON object", code="invalid_json")
        if _depth(fields) > MAX_DEPTH:
            raise RecursionError
        return fields
    except RecursionError:
        problem = f"it is nested too deeply; at most {MAX_DEPTH} levels are read"
    except ValueError as error:
        problem = str(error)
    raise ApiError(f"The body is not valid JSON: {problem}", code="invalid_json")


def _num_containers(body: bytes) -> int:
    """Returns how many lists and objects begin in a body, without parsing it. Those in texts do not
    count, but are looked at only where there are many."""
    count = body.count(b"[") + body.count(b"{")
    if count <= MAX_CONTAINERS:
        return count
    structure = _STRING.sub(b"", body)
    return structure.count(b"[") + structure.count(b"{")


def shown(name: str) -> str:
    """Returns a client's text for a message: short, and without control characters."""
    return ascii(name[:64])[1:-1]


def _depth(value: dict[str, Any] | list[Any]) -> int:
    """Returns how many objects and lists are within each other."""
    inner = value.values() if isinstance(value, dict) else value
    if {dict, list}.isdisjoint(map(type, inner)):  # as in a long list of token ids
        return 1
    return 1 + max(_depth(v) for v in inner if isinstance(v, dict | list))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the key {shown(name)} occurs twice")
        fields[name] = value
    return fields

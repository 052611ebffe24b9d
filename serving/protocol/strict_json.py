"""Reads the bodies of requests: declared as JSON, small, and one object of strict JSON."""

import re
from typing import Any

from fastapi import Request

from model.files.strict_json import strict_json
from serving.protocol.errors import ApiError

MAX_BODY_BYTES = 1 << 20
# Lists and objects in a body: half a second of Python's lock for 350,000, which fit into one
MAX_CONTAINERS = 20_000
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


async def read_json_body(request: Request) -> bytes:
    """Returns the raw body. Raises `ApiError` if its headers do not declare plain JSON, or if it is
    too large."""
    headers = dict(reversed(request.scope["headers"]))  # of several alike the first
    media_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if media_type != b"application/json":
        raise ApiError(
            "The body must be declared as JSON: send the header -H 'Content-Type: application/json'",
            status=415,
        )
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
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
        fields = strict_json(body)
    except ValueError as error:
        raise ApiError(f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError("The body must be a JSON object", code="invalid_json")
    return fields


def _num_containers(body: bytes) -> int:
    """Returns how many lists and objects begin in a body, without parsing it. Those in texts do not
    count, but are looked at only where there are many."""
    count = body.count(b"[") + body.count(b"{")
    if count <= MAX_CONTAINERS:
        return count
    structure = _STRING.sub(b"", body)
    return structure.count(b"[") + structure.count(b"{")

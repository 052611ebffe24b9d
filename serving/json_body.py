"""The JSON body of a request, as bytes within bounds."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from fastapi import Request

from serving.errors import invalid_request
from serving.protocol import MAX_BODY_BYTES

PARSED_AT_ONCE_BYTES = 16 << 10  # in 2 to 5 ms at most; a megabyte takes up to 0.25 s
Parsed = TypeVar("Parsed")


async def read_request(request: Request, parse: Callable[[bytes], Parsed]) -> Parsed:
    """The body as `parse` reads it, which goes to a thread for a large one. Raises `ApiError`."""
    body = await read_json_body(request)
    return parse(body) if len(body) <= PARSED_AT_ONCE_BYTES else await asyncio.to_thread(parse, body)


async def read_json_body(request: Request) -> bytes:
    """The raw body, refused before it is read where its headers say that it is too large or not plain JSON."""
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

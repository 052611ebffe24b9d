"""The JSON body of a request, as bytes within bounds."""

from fastapi import Request

from serving.errors import invalid_request
from serving.protocol import MAX_BODY_BYTES


async def read_json_body(request: Request) -> bytes:
    """The raw body, refused before it is read where its headers say that it is too large or not plain JSON."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise invalid_request("The header Content-Type must be application/json", status=415)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise invalid_request("A compressed body is not supported; send it plain", status=415)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise invalid_request(f"The body exceeds {MAX_BODY_BYTES} bytes; send less", status=413)
    return bytes(body)

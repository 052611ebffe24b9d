"""The errors of the HTTP interface: one exception, its OpenAI-shaped body, and what constructs
it."""

import json
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from starlette.responses import JSONResponse

from model.tables import read_table

DRAINING_HEADER = "x-raymill-draining"  # by which the front door recognizes a planned drain

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


@dataclass(eq=False)
class ApiError(Exception):
    """An answer other than 200. `message` tells the client what was wrong and what was expected,
    with the numbers."""

    message: str
    _: KW_ONLY
    status: int = 400
    param: str | None = None
    code: str | None = None
    kind: str | None = None  # OpenAI's `type`, where it does not follow from the status
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        of_status = _TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        kind = self.kind or of_status
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        }

    def response(self, *, request_id: bytes | None = None) -> JSONResponse:
        headers = (
            self.headers
            if request_id is None
            else self.headers | {"x-request-id": request_id.decode()}
        )
        return JSONResponse(self.body(), status_code=self.status, headers=headers)

    def event(self) -> str:
        """Returns a server-sent event, for a failure after the status has gone out."""
        return f"data: {json.dumps(self.body())}\n\n"

    def response_event(self, number: int) -> str:
        """Returns the same for the stream of a response, in which it is the event of this number,
        for clients that look for either shape."""
        told = {"code": self.code, "message": self.message, "param": self.param}
        event = {"type": "error", **told, "sequence_number": number, **self.body()}
        return f"event: error\ndata: {json.dumps(event)}\n\n"


def error_of(name: str, /, *, param: str | None = None, **values: Any) -> ApiError:
    """Returns the error of that name in errors.toml, with the values in its message."""
    known = read_table(__file__, "errors")[name]
    code, headers = known.get("code", name), dict(known.get("headers", {}))
    message = known["message"].format(**values)
    kind = known.get("type")
    return ApiError(
        message, status=known["status"], param=param, code=code, kind=kind, headers=headers
    )


def overloaded(message: str, *, retry_after_s: int = 1) -> ApiError:
    return ApiError(
        message, status=429, code="overloaded", headers={"Retry-After": str(retry_after_s)}
    )

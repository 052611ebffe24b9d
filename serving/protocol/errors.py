"""The errors of the HTTP interface: one exception, its OpenAI-shaped body, and a constructor for each common kind."""

import json
from datetime import UTC, datetime
from typing import Any

DRAINING_HEADER = "x-raymill-draining"  # by which the front door recognizes a planned drain

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than 200. `message` tells the client what was wrong and what was expected, with the numbers."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def event(self) -> str:
        """Returns a server-sent event, for a failure after the status has gone out."""
        return f"data: {json.dumps(self.body())}\n\n"


def invalid_request(message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> ApiError:
    return ApiError(status, message, param=param, code=code)


def context_length_exceeded(
    *, num_prompt_tokens: int, max_tokens: int, context_tokens: int, prompt_field: str
) -> ApiError:
    return invalid_request(
        f"This model's maximum context length is {context_tokens} tokens, but {num_prompt_tokens + max_tokens} were "
        f"requested ({num_prompt_tokens} in {prompt_field}, {max_tokens} in max_tokens); shorten one of them.",
        param="max_tokens" if num_prompt_tokens < context_tokens else prompt_field,
        code="context_length_exceeded",
    )


def unauthorized() -> ApiError:
    """Returns the same error whatever was wrong with the key."""
    return ApiError(
        401,
        "A valid API key is required, as the header `Authorization: Bearer KEY`.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def expired_key(name: str, expires_s: float) -> ApiError:
    since = datetime.fromtimestamp(expires_s, UTC).isoformat(timespec="seconds")
    return ApiError(
        401,
        f"The API key {name} has expired ({since}); ask for a new one.",
        code="expired_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def not_found(path: str) -> ApiError:
    return ApiError(404, f"There is nothing at {path[:64]!a}.", code="not_found")


def model_not_found(name: str, *, served: str) -> ApiError:
    return ApiError(
        404,
        f"The model {name[:64]!a} does not exist; this endpoint serves {served!r}.",
        param="model",
        code="model_not_found",
    )


def overloaded(message: str, *, retry_after_s: int = 1) -> ApiError:
    return ApiError(429, message, code="overloaded", headers={"Retry-After": str(retry_after_s)})


def closing(status: int, message: str, *, code: str) -> ApiError:
    """Returns an error that ends the connection, for a request whose rest is not read."""
    return ApiError(status, message, code=code, headers={"Connection": "close"})


def unavailable(message: str, *, code: str, retry_after_s: int) -> ApiError:
    return ApiError(503, message, code=code, headers={"Retry-After": str(retry_after_s)})


def interrupted() -> ApiError:
    message = "The replica that worked on this request went away or ran out of time; try again."
    return unavailable(message, code="interrupted", retry_after_s=1)


def ended_replicas(count: int) -> ApiError:
    """Returns the error for a request under which one replica after the other has ended. OpenAI's clients would repeat
    it by themselves without the header."""
    return ApiError(
        500,
        f"{count} replicas ended while they worked on this request, the last one after a retry, so it is not tried "
        "again. Either the request ends them or they ended by chance: look into their logs before you repeat it.",
        code="replicas_ended",
        headers={"x-should-retry": "false"},
    )


def engine_unavailable() -> ApiError:
    message = "The engine of this replica has stopped and is being replaced; try again."
    return unavailable(message, code="engine_unavailable", retry_after_s=5)


def draining() -> ApiError:
    error = unavailable(
        "The endpoint is draining: it finishes what runs and takes nothing new until an operator ends that by "
        'POST /admin/drain with {"drain": false}.',
        code="draining",
        retry_after_s=30,
    )
    error.headers[DRAINING_HEADER] = "1"
    return error


def internal_error(message: str = "The server failed to handle the request.") -> ApiError:
    return ApiError(500, message, code="internal_error")

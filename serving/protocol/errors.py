"""Errors of the HTTP interface: one exception, its OpenAI-shaped body, and a constructor for each kind."""

import json
from typing import Any

DRAINING_HEADER = "x-raymill-draining"  # what the front door counts a planned drain by

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than 200. `message` is for the client: what was wrong, what was expected, with the numbers."""

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
        """As a server-sent event, for a failure after the status has gone out."""
        return f"data: {json.dumps(self.body())}\n\n"


def invalid_request(message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> ApiError:
    return ApiError(status, message, param=param, code=code)


def context_length_exceeded(*, num_prompt_tokens: int, max_tokens: int, context_tokens: int) -> ApiError:
    return invalid_request(
        f"This model's maximum context length is {context_tokens} tokens, but {num_prompt_tokens + max_tokens} were "
        f"requested ({num_prompt_tokens} in the prompt, {max_tokens} in max_tokens); shorten the prompt or max_tokens.",
        param="max_tokens" if num_prompt_tokens < context_tokens else "prompt",
        code="context_length_exceeded",
    )


def unauthorized() -> ApiError:
    """Says the same whatever was wrong with the key."""
    return ApiError(
        401,
        "A valid API key is required, as the header `Authorization: Bearer KEY`.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def forbidden() -> ApiError:
    return ApiError(403, "This key does not open /admin; use a key of admin_key_file.", code="admin_key_required")


def not_found(path: str) -> ApiError:
    return ApiError(404, f"There is nothing at {path[:64]!a}.", code="not_found")


def model_not_found(name: str, *, served: str) -> ApiError:
    return ApiError(
        404,
        f"The model {name[:64]!a} does not exist; this endpoint serves {served!r}.",
        param="model",
        code="model_not_found",
    )


def step_not_found(step: int, *, known: str) -> ApiError:
    return ApiError(
        404, f"No checkpoint of step {step} is here; those are: {known}", param="step", code="step_not_found"
    )


def overloaded(message: str, *, retry_after_s: int = 1) -> ApiError:
    headers = {"Retry-After": str(retry_after_s)}
    return ApiError(429, message, code="overloaded", headers=headers)


def too_many_requests(limit: int) -> ApiError:
    return ApiError(
        429,
        f"This key has its limit of {limit} requests in flight; wait for one to end",
        code="rate_limit_exceeded",
        headers={"Retry-After": "1"},
    )


def closing(status: int, message: str, *, code: str) -> ApiError:
    """For a request of which the rest is not read: the connection ends with this answer."""
    return ApiError(status, message, code=code, headers={"Connection": "close"})


def interrupted() -> ApiError:
    return ApiError(
        503,
        "The replica that worked on this request went away or ran out of time; try again.",
        code="interrupted",
        headers={"Retry-After": "1"},
    )


def engine_unavailable() -> ApiError:
    return ApiError(
        503,
        "The engine of this replica has stopped and is being replaced; try again.",
        code="engine_unavailable",
        headers={"Retry-After": "5"},
    )


def draining() -> ApiError:
    return ApiError(
        503,
        "The endpoint is draining: it finishes what runs and takes nothing new, until an operator ends that by "
        'POST /admin/drain with {"drain": false}.',
        code="draining",
        headers={"Retry-After": "30", DRAINING_HEADER: "1"},
    )


def internal_error(message: str = "The server failed to handle the request.") -> ApiError:
    return ApiError(500, message, code="internal_error")

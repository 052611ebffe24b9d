"""The routes that ask the model, beside FastAPI's.

FastAPI and Starlette have nine layers around a route, for parameters, dependencies and contexts
that these routes do not have: a tenth of what a short answer takes.
"""

from collections.abc import Awaitable, Callable
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import Receive, Scope, Send

from serving.api.key_limits import KeyLimits, key_of
from serving.api.key_metrics import KeyRefusal
from serving.api.route_facts import RouteFacts, declares
from serving.delivery.routed_request import RoutedRequest
from serving.protocol.errors import ApiError, error_of
from serving.protocol.strict_json import MAX_BODY_BYTES

Answering = Callable[[Request], Awaitable[Response]]


class AskedRoutes:
    """An application's routes. The routes that are added here are answered at once if they are
    asked by POST; the application, which knows them too, answers for all else."""

    def __init__(self, app: FastAPI, limits: KeyLimits) -> None:
        self._app = app
        self._limits = limits
        self._by_path: dict[str, Answering] = {}
        self._guarded = ServerErrorMiddleware(self._answer, handler=answer_of_bug)

    def add(self, path: str, answer: Answering, facts: RouteFacts) -> None:
        self._app.add_route(path, declares(facts)(answer), methods=["POST"])
        self._by_path[path] = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_asked = scope["type"] == "http" and scope["path"] in self._by_path
        if not is_asked or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        await self._guarded(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            response = await self._by_path[scope["path"]](request)
        except ApiError as error:
            response = refusal(request, error, self._limits)
        await response(scope, receive, send)


def refusal(request: Request, error: ApiError, limits: KeyLimits) -> Response:
    """Returns an error in OpenAI's shape, and counts what was read in vain and what found no
    room."""
    RoutedRequest.of(request).facts.reason = error.code
    if error.status == HTTPStatus.BAD_REQUEST:
        length = request.headers.get("content-length", "0")
        limits.charge_invalid(
            key_of(request), int(length) if length.isdecimal() else MAX_BODY_BYTES
        )
    if error.code == "overloaded":
        limits.count_refusal(key_of(request), KeyRefusal.OVERLOADED)
    return error.response()


async def answer_of_bug(request: Request, bug: Exception) -> Response:
    """Answers for a bug. The traceback is in the replica's log, not in the answer."""
    RoutedRequest.of(request).facts.reason = "internal_error"
    return error_of("internal_error").response()

"""Guards Ray Serve in each proxy process: reads a whole request within bounds or refuses it, and
lets exchange.py get its answer.

Ray Serve calls `middlewares` in every proxy that was started with `proxy_environment`. The bounds
on connections and headers are in http_bounds.py, since only a connection's protocol sees them.
"""

import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from http import HTTPStatus

from opentelemetry.trace import Tracer
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.endpoint.local_end import door_of
from cluster.metrics.metric_export import Metrics, by_version
from cluster.metrics.metric_table import Exporter
from cluster.settings.serve import HttpConfig
from serving.delivery.route import ROUTE_HEADER
from serving.delivery.routed_request import RETRY_HEADER, NewestRoutes
from serving.protocol.errors import DRAINING_HEADER, ApiError, error_of
from serving.protocol.json_log import CURRENT_REQUEST, Process, log_in
from serving.protocol.request_facts import timestamp
from serving.protocol.tracing import NO_TRACER, RequestSpan, tracer_from_environment
from serving.proxy.doorkeeper import Doorkeeper
from serving.proxy.ending import (
    CLIENT_LEFT,
    REPLICAS_ENDED,
    AnswerEnding,
    AnswerOutcome,
    outcome_of,
)
from serving.proxy.exchange import MAX_ATTEMPTS, RESPONSES_PATH, HttpExchange, for_clients
from serving.proxy.host_check import require_host
from serving.proxy.http_bounds import PROBED_PATHS, install_bounds
from serving.proxy.key_check import KeyCheck, Refusal
from serving.proxy.quarantine import Quarantine
from serving.proxy.request_body import Bodies
from serving.proxy.request_log import LogRequest, RequestLog, no_log
from serving.proxy.token_relay import ASK_HEADER, Relay

SETTINGS_VARIABLE = "RAYMILL_HTTP"
# Where it takes the order to end; unset where a cluster ends its pods
ENTRANCE_VARIABLE = "RAYMILL_ENTRANCE"
# Set where nobody needs a key, which takes a loopback address: foreign names are refused there
KEYLESS_VARIABLE = "RAYMILL_KEYLESS"
HIDDEN_PATHS = ("/-/routes",)  # Ray Serve's own; it keeps /-/healthz, which Kubernetes asks for
# Ray Serve acts on these: one keeps a request running for a client that has gone, the others choose
# a replica.
_OF_RAY_SERVE = (
    b"x-request-disconnect-disabled",
    b"serve_multiplexed_model_id",
    b"serve-multiplexed-model-id",
)
# And these are set anew
DROPPED_HEADERS = frozenset(
    (*_OF_RAY_SERVE, ASK_HEADER, RETRY_HEADER, ROUTE_HEADER.encode(), b"x-request-id")
)
REQUEST_ID = re.compile(rb"[A-Za-z0-9-]{1,64}")
COUNTED_PATHS = ("/v1/completions", "/v1/chat/completions", RESPONSES_PATH, "/v1/embeddings")
MAX_LOGGED_PATH = 128  # characters


def proxy_environment(config: HttpConfig) -> dict[str, str]:
    """Returns the environment variables with which a proxy process runs the front door."""
    return {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.proxy.front_door:middlewares",
        SETTINGS_VARIABLE: config.model_dump_json(),
    }


def middlewares() -> list[Middleware]:
    """Returns the front door; Ray Serve calls this before its HTTP server starts."""
    log_in(None, Process.PROXY)
    config = HttpConfig.model_validate_json(os.environ.get(SETTINGS_VARIABLE, "{}"))
    log = no_log if config.request_log is None else RequestLog(config.request_log).add
    install_bounds(config, log)
    metrics = Metrics(Exporter.PROXY)
    answers = {
        outcome: metrics.of("raymill:http_answers", outcome=outcome) for outcome in AnswerOutcome
    }
    of_version = by_version(
        metrics,
        lambda version: {
            o: metrics.of("raymill:version_answers", version=version, outcome=o)
            for o in AnswerOutcome
        },
    )
    threading.Thread(target=metrics.keep_published, name="metrics", daemon=True).start()

    def count(outcome: AnswerOutcome, version: str) -> None:
        answers[outcome].inc()
        if version:
            of_version(version)[outcome].inc()

    doorkeeper = Doorkeeper()
    if entrance := os.environ.get(ENTRANCE_VARIABLE):
        doorkeeper.listen(door_of(entrance, os.getpid()))
    tracer = tracer_from_environment("raymill-proxy")
    front_door = Middleware(
        FrontDoor,
        config=config,
        count=count,
        log=log,
        tracer=tracer,
        doorkeeper=doorkeeper,
        only_loopback=KEYLESS_VARIABLE in os.environ,
    )
    # Lets the pages of other origins read all answers, refusals too, and answers what their
    # browsers ask beforehand, which has no key.
    cors = Middleware(
        CORSMiddleware,
        allow_origins=config.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],  # OpenAI's client sends some of its own
        expose_headers=["x-request-id", "x-model-version", "x-model-note", "retry-after"],
    )
    # Ray Serve puts each around those before it. Without origins there is nothing before the front
    # door.
    return [front_door, *([cors] if config.cors_origins else [])]


@dataclass(eq=False)
class FrontDoor:
    app: ASGIApp
    _: KW_ONLY
    config: HttpConfig
    # With each completion's outcome, and the version that answered or nothing
    count: Callable[[AnswerOutcome, str], None]
    log: LogRequest
    tracer: Tracer
    doorkeeper: Doorkeeper = field(default_factory=Doorkeeper)
    only_loopback: bool = False  # whether a `Host` has to name the loopback interface

    def __post_init__(self) -> None:
        self._relay, self._routes = Relay(), NewestRoutes()
        self._keys, self._bodies, self._quarantine = KeyCheck(self.app), Bodies(), Quarantine()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began_s, clock_s = time.time(), time.monotonic()
        request_id, path = clean_request_id(scope["headers"]), scope["path"]
        CURRENT_REQUEST.set(request_id.decode())
        is_post = scope["method"] == "POST"
        tracer = self.tracer if is_post else NO_TRACER
        span = RequestSpan.of_request(tracer, f"POST {path[:MAX_LOGGED_PATH]}", scope["headers"])
        ending = AnswerEnding(AnswerOutcome.FAILED, reason="internal_error")
        try:
            ending = await self._answer(scope, receive, send, request_id, span)
        finally:
            if path in COUNTED_PATHS:
                self.count(ending.outcome, ending.facts.get("model_version") or "")
            is_failure = ending.outcome in (AnswerOutcome.FAILED, AnswerOutcome.CUT)
            span.end(
                {
                    "http.response.status_code": ending.status,
                    "raymill.request_id": request_id.decode(),
                },
                error=ending.reason if is_failure else None,
            )
            is_logged = is_post or is_failure or (ending.status or 0) >= 400
            if is_logged and self.log is not no_log and path not in PROBED_PATHS:
                seen_here = {
                    "time": timestamp(began_s),
                    "request_id": request_id.decode(),
                    "route": path[:MAX_LOGGED_PATH],
                    "status": ending.status,
                    "reason": ending.reason,
                    "total_s": round(time.monotonic() - clock_s, 4),
                    "attempts": ending.num_attempts,
                    "trace_id": span.trace_id,
                }
                self.log(**(ending.facts | seen_here))

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, request_id: bytes, span: RequestSpan
    ) -> AnswerEnding:
        # Ray Serve reads further headers as UTF-8 and fails on others; only Authorization is ours
        # to judge.
        kept = [
            (n, v)
            for n, v in scope["headers"]
            if n not in DROPPED_HEADERS and (v.isascii() or n == b"authorization")
        ]
        scope = {**scope, "headers": [*kept, *self._routes.headers, (b"x-request-id", request_id)]}
        try:
            require_host(scope, only_loopback=self.only_loopback)
            if scope["path"] in HIDDEN_PATHS:
                raise error_of("not_found", path=scope["path"][:64])
            if self.doorkeeper.is_ending and (
                scope["method"] == "POST" or scope["path"] == "/ready"
            ):
                raise error_of("ending")
            if scope["method"] == "POST" and not scope["path"].startswith("/admin"):
                refusal = await self._keys.refusal(scope)
                if refusal is not None:
                    return await self._send_refusal(refusal, receive, send, request_id)
            body = await self._bodies.read(scope, receive, timeout_s=self.config.body_timeout_s)
        except ApiError as error:
            await error.response(request_id=request_id)(scope, receive, send)
            outcome = (
                AnswerOutcome.DRAINED
                if DRAINING_HEADER in error.headers
                else outcome_of(error.status)
            )
            return AnswerEnding(outcome, error.status, error.code)
        if body is None:
            return AnswerEnding(AnswerOutcome.LEFT, reason=CLIENT_LEFT)
        if (scope["path"], body) in self._quarantine:
            quarantined = error_of("quarantined", count=MAX_ATTEMPTS)
            await quarantined.response(request_id=request_id)(scope, receive, send)
            return AnswerEnding(AnswerOutcome.FAILED, quarantined.status, quarantined.code)
        exchange = HttpExchange(
            self.app, scope, body, receive, send, request_id, span, self._routes
        )
        self.doorkeeper.enter(exchange)
        try:
            ending = await exchange.run(self._relay)
            if ending.reason == REPLICAS_ENDED:
                self._quarantine.add(scope["path"], body)
            return ending
        finally:
            self.doorkeeper.leave(exchange)

    async def _send_refusal(
        self, refusal: Refusal, receive: Receive, send: Send, request_id: bytes
    ) -> AnswerEnding:
        """Passes on a replica's refusal of a key, without the request's body."""
        await self._bodies.discard(receive)
        own = (b"x-request-id", b"connection")
        shown = for_clients(refusal.headers.items())
        headers = [(name, value) for name, value in shown if name not in own]
        headers += [(b"x-request-id", request_id), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await send({"type": "http.response.body", "body": refusal.body})
        reason = refusal.facts.get("reason") or HTTPStatus(refusal.status).name.lower()
        return AnswerEnding(
            outcome_of(refusal.status), refusal.status, reason, facts=dict(refusal.facts)
        )


def clean_request_id(headers: list[tuple[bytes, bytes]]) -> bytes:
    """Returns the client's request id, or a new one if it has none or one that is unsafe in a
    log."""
    values = [value for name, value in headers if name == b"x-request-id"]
    return (
        values[0]
        if len(values) == 1 and REQUEST_ID.fullmatch(values[0])
        else os.urandom(16).hex().encode()
    )

"""Guards Ray Serve in each proxy process: reads a whole request within bounds or refuses it, asks another replica where
one dies, and ends every broken stream with an error event.

Ray Serve calls `middlewares` in every proxy that was started with `proxy_environment`. The bounds on connections and
headers are in http_bounds.py, since only a connection's protocol sees them.
"""

import asyncio
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from enum import StrEnum
from http import HTTPStatus
from typing import Any

from opentelemetry.trace import Tracer
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.endpoint.local_end import door_of
from cluster.monitoring.metric_export import Metrics, by_version
from cluster.monitoring.metric_table import Exporter
from cluster.settings.serve import HttpConfig
from serving.delivery.promotion import ROUTE_HEADER
from serving.delivery.routed_request import RETRY_HEADER, NewestRoutes
from serving.protocol.errors import DRAINING_HEADER, ApiError, error_of
from serving.protocol.json_log import CURRENT_REQUEST, Process, log_in
from serving.protocol.request_facts import FACTS, timestamp
from serving.protocol.tracing import NO_TRACER, Span, tracer_from_environment
from serving.proxy.doorkeeper import Doorkeeper
from serving.proxy.http_bounds import PROBED_PATHS, install_bounds
from serving.proxy.key_check import KeyCheck, Refusal
from serving.proxy.quarantine import Quarantine
from serving.proxy.request_body import Bodies
from serving.proxy.request_log import LogRequest, RequestLog, no_log
from serving.proxy.token_relay import ASK_HEADER, YES_HEADER, Relay, RelayedAnswer

SETTINGS_VARIABLE = "RAYMILL_HTTP"
ENTRANCE_VARIABLE = "RAYMILL_ENTRANCE"  # where it takes the order to end; unset where a cluster ends its pods
HIDDEN_PATHS = ("/-/routes",)  # Ray Serve's own; it keeps /-/healthz, which Kubernetes asks for
# Ray Serve acts on these: one keeps a request running for a client that has gone, the others choose a replica.
DROPPED_HEADERS = (b"x-request-disconnect-disabled", b"serve_multiplexed_model_id", b"serve-multiplexed-model-id")
REQUEST_ID = re.compile(rb"[A-Za-z0-9-]{1,64}")
MAX_ATTEMPTS = 2  # a request may be what ends its replicas: one that ended a third would end them all
COUNTED_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")
CLIENT_LEFT, REPLICAS_ENDED = "client_left", "replicas_ended"  # reasons in the request log
MAX_LOGGED_PATH = 128  # characters
ROUTE_TIMEOUT_S = 10.0  # for a proxy that has just started to hear of the application
ROUTE_POLL_S = 0.05


class Outcome(StrEnum):
    """The end of a completion as its client saw it. The endpoint's service objective is measured by it."""

    OK = "ok"
    INVALID = "invalid"  # any other 4xx: the request cannot be answered
    REFUSED = "refused"  # 429: more than the endpoint takes on
    DRAINED = "drained"  # 503 while an operator drains the endpoint, which is not a failure
    FAILED = "failed"  # any other 5xx
    CUT = "cut"  # the front door ended a stream with an error, or the answer is incomplete
    LEFT = "left"  # the client went away first


@dataclass(frozen=True)
class Ending:
    """The end of a request, for counts, the request log and traces."""

    outcome: Outcome
    status: int | None = None  # None if none has gone out
    reason: str | None = None
    num_attempts: int = 0  # replicas that were asked
    facts: dict[str, Any] = field(default_factory=dict)  # from the replica


def outcome_of(status: int) -> Outcome:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return Outcome.REFUSED
    return Outcome.FAILED if status >= 500 else Outcome.INVALID if status >= 400 else Outcome.OK


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
    answers = {outcome: metrics.of("raymill:http_answers", outcome=outcome) for outcome in Outcome}
    of_version = by_version(
        metrics,
        lambda version: {o: metrics.of("raymill:version_answers", version=version, outcome=o) for o in Outcome},
    )
    threading.Thread(target=metrics.keep_published, name="metrics", daemon=True).start()

    def count(outcome: Outcome, version: str) -> None:
        answers[outcome].inc()
        if version:
            of_version(version)[outcome].inc()

    doorkeeper = Doorkeeper()
    if entrance := os.environ.get(ENTRANCE_VARIABLE):
        doorkeeper.listen(door_of(entrance, os.getpid()))
    tracer = tracer_from_environment("raymill-proxy")
    front_door = Middleware(FrontDoor, config=config, count=count, log=log, tracer=tracer, doorkeeper=doorkeeper)
    # Lets the pages of other origins read all answers, refusals too, and answers what their browsers ask beforehand,
    # which has no key.
    cors = Middleware(
        CORSMiddleware,
        allow_origins=config.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],  # OpenAI's client sends some of its own
        expose_headers=["x-request-id", "x-model-version", "x-model-note", "retry-after"],
    )
    # Ray Serve puts each around those before it. Without origins there is nothing before the front door.
    return [front_door, *([cors] if config.cors_origins else [])]


@dataclass(eq=False)
class FrontDoor:
    app: ASGIApp
    _: KW_ONLY
    config: HttpConfig
    count: Callable[[Outcome, str], None]  # with each completion's outcome, and the version that answered or nothing
    log: LogRequest
    tracer: Tracer
    doorkeeper: Doorkeeper = field(default_factory=Doorkeeper)

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
        span = Span.of_request(tracer, f"POST {path[:MAX_LOGGED_PATH]}", scope["headers"])
        ending = Ending(Outcome.FAILED, reason="internal_error")
        try:
            ending = await self._answer(scope, receive, send, request_id, span)
        finally:
            if path in COUNTED_PATHS:
                self.count(ending.outcome, ending.facts.get("model_version") or "")
            is_failure = ending.outcome in (Outcome.FAILED, Outcome.CUT)
            span.end(
                {"http.response.status_code": ending.status, "raymill.request_id": request_id.decode()},
                error=ending.reason if is_failure else None,
            )
            if (is_post or is_failure or (ending.status or 0) >= 400) and path not in PROBED_PATHS:
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

    async def _answer(self, scope: Scope, receive: Receive, send: Send, request_id: bytes, span: Span) -> Ending:
        dropped = (*DROPPED_HEADERS, ASK_HEADER, RETRY_HEADER, ROUTE_HEADER.encode(), b"x-request-id")
        # Ray Serve reads further headers as UTF-8 and fails on others; only Authorization is ours to judge.
        kept = [(n, v) for n, v in scope["headers"] if n not in dropped and (v.isascii() or n == b"authorization")]
        scope = {**scope, "headers": [*kept, *self._routes.headers, (b"x-request-id", request_id)]}
        try:
            num_hosts = sum(name == b"host" for name, _ in scope["headers"])
            if num_hosts > 1 or (num_hosts == 0 and scope["http_version"] != "1.0"):
                message = f"The request has {num_hosts} Host headers; expected one"
                raise ApiError(message, code="invalid_host", headers={"Connection": "close"})  # its body is not read
            if scope["path"] in HIDDEN_PATHS:
                raise error_of("not_found", path=scope["path"][:64])
            if self.doorkeeper.is_ending and (scope["method"] == "POST" or scope["path"] == "/ready"):
                raise error_of("ending")
            if scope["method"] == "POST" and not scope["path"].startswith("/admin"):
                refusal = await self._keys.refusal(scope)
                if refusal is not None:
                    return await self._send_refusal(refusal, receive, send, request_id)
            body = await self._bodies.read(scope, receive, timeout_s=self.config.body_timeout_s)
        except ApiError as error:
            await error.response(request_id=request_id)(scope, receive, send)
            outcome = Outcome.DRAINED if DRAINING_HEADER in error.headers else outcome_of(error.status)
            return Ending(outcome, error.status, error.code)
        if body is None:
            return Ending(Outcome.LEFT, reason=CLIENT_LEFT)
        if (scope["path"], body) in self._quarantine:
            quarantined = error_of("quarantined", count=MAX_ATTEMPTS)
            await quarantined.response(request_id=request_id)(scope, receive, send)
            return Ending(Outcome.FAILED, quarantined.status, quarantined.code)
        exchange = Exchange(self.app, scope, body, receive, send, request_id, span, self._routes)
        self.doorkeeper.enter(exchange)
        try:
            ending = await exchange.run(self._relay)
            if ending.reason == REPLICAS_ENDED:
                self._quarantine.add(scope["path"], body)
            return ending
        finally:
            self.doorkeeper.leave(exchange)

    async def _send_refusal(self, refusal: Refusal, receive: Receive, send: Send, request_id: bytes) -> Ending:
        """Passes on a replica's refusal of a key, without the request's body."""
        await self._bodies.discard(receive)
        own = (b"x-request-id", b"connection")
        headers = [(name, value) for name, value in refusal.headers.items() if name not in own]
        headers += [(b"x-request-id", request_id), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await send({"type": "http.response.body", "body": refusal.body})
        reason = refusal.facts.get("reason") or HTTPStatus(refusal.status).name.lower()
        return Ending(outcome_of(refusal.status), refusal.status, reason, facts=dict(refusal.facts))


@dataclass(eq=False)
class Exchange:
    """One request and its answer. If a replica dies before the first byte has gone out, another one gets the request,
    once, unless it is an operator's order."""

    app: ASGIApp
    scope: Scope
    body: bytes
    receive: Receive
    send: Send
    request_id: bytes
    span: Span
    routes: NewestRoutes  # of all answers
    _relayed: RelayedAnswer = field(init=False)
    _body_given = _client_gone = _finished = False
    _has_no_route = _may_wait = False  # Ray Serve's own 404: this proxy does not know the application yet
    _status = 0  # of the answer, once it has started
    _headers: Mapping[bytes, bytes] = field(default_factory=dict)  # of the answer
    _facts: dict[str, Any] = field(default_factory=dict)
    _num_attempts = 0
    _num_events = 0  # of a stream that have gone out
    _is_cut = False
    _is_contradicted = False  # Ray Serve has begun another answer than the one that goes out
    _bound: asyncio.Timeout | None = None  # of the attempt that runs

    @property
    def _is_order(self) -> bool:
        """Whether it changes the endpoint. An order is given once: carried out twice, a rollback would undo itself."""
        is_admin = self.scope["path"].startswith("/admin/")
        return bool(is_admin and self.scope["method"] not in ("GET", "HEAD"))

    def _no_answer(self) -> ApiError:
        """Returns what a client hears whose request no replica has answered."""
        if self._is_cut:
            return error_of("ending")
        return error_of("order_interrupted") if self._is_order else error_of("replicas_ended", count=MAX_ATTEMPTS)

    def cut(self) -> None:
        """Ends the answer now, with an error."""
        self._is_cut = True
        if self._bound is not None:
            self._bound.reschedule(0.0)

    async def run(self, relay: Relay) -> Ending:
        outcome, reason = await self._run(relay)
        facts = self._facts
        if facts.get("stream") and facts["completion_tokens"] is None:
            facts["completion_tokens"] = self._num_events  # one for each token, as far as the client got
        return Ending(outcome, self._status or None, reason, self._num_attempts, facts)

    async def _run(self, relay: Relay) -> tuple[Outcome, str]:
        most = 1 if self._is_order else MAX_ATTEMPTS
        for attempt in range(most):
            self._num_attempts = attempt + 1
            self._relayed = await relay.open(on_start=self._start_relayed)
            retry = [(RETRY_HEADER, b"1")] if attempt else []
            span = self.span.child("attempt", {"raymill.attempt": self._num_attempts})
            headers = span.forward([*self.scope["headers"], self._relayed.header, *retry])
            scope = {**self.scope, "headers": headers}
            try:
                async with asyncio.timeout(0.0 if self._is_cut else None) as self._bound:
                    await self._ask(scope)
                    await self._finish_relayed()
            except TimeoutError:
                if not self._is_cut:
                    raise
            finally:
                self._bound = None
                span.end({}, error=None if self._status or self._client_gone else "the replica ended")
                await self._relayed.close()
            if self._status or self._client_gone or self._is_cut:
                break
        if self._finished:
            is_drained = DRAINING_HEADER.encode() in self._headers
            reason = self._facts.get("reason") or HTTPStatus(self._status).name.lower()
            return Outcome.DRAINED if is_drained else outcome_of(self._status), reason
        if self._client_gone:
            return Outcome.LEFT, CLIENT_LEFT
        if not self._status:
            error = self._no_answer()
            self._status = error.status
            await self._refuse(error)
            return Outcome.FAILED, str(error.code)
        if self._headers.get(b"content-type", b"").startswith(b"text/event-stream"):
            # Without it the stream would just stop. In any other answer the missing bytes show.
            await self.send({"type": "http.response.body", "body": error_of("interrupted").event().encode()})
        return Outcome.CUT, "interrupted"

    async def _ask(self, scope: Scope) -> None:
        """Hands the request to Ray Serve, again while this proxy does not know the application. A proxy that replaces
        another one listens a moment before it does, beside others of the same port that do."""
        is_of_application = self.scope["path"].startswith("/")  # as every path below its route
        deadline_s = time.monotonic() + (ROUTE_TIMEOUT_S if is_of_application else 0.0)
        while True:
            self._body_given = self._has_no_route = False
            self._may_wait = time.monotonic() < deadline_s
            await self.app({**scope}, self._next_message, self._pass_on)  # a copy: Ray Serve writes into the scope
            if not self._has_no_route:
                return
            await asyncio.sleep(ROUTE_POLL_S)

    async def _finish_relayed(self) -> None:
        """Ends an answer that has arrived whole although its replica died before it could end it through Ray Serve."""
        if self._relayed.has_ended and not self._finished and not self._client_gone:
            await self._relayed.end()
            self._finished = True
            await self.send({"type": "http.response.body", "body": b""})

    async def _next_message(self) -> Message:
        if not self._body_given:
            self._body_given = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        message = await self.receive()
        self._client_gone = message["type"] == "http.disconnect" and not self._finished
        return message

    def _start_relayed(self, message: Message) -> None:
        """Starts an answer whose parts come over the relay, with its start from there or from Ray Serve, which is later
        by milliseconds."""
        if self._status:
            return
        self._facts = message.pop(FACTS, self._facts)
        self._status, self._headers = message["status"], dict(message["headers"])
        self.routes.learn(message["headers"])
        kept = [(name, value) for name, value in message["headers"] if name not in (YES_HEADER, b"x-request-id")]
        headers = [*kept, (b"x-request-id", self.request_id)]
        self._relayed.start({**message, "headers": headers}, self._send_on)

    async def _pass_on(self, message: Message) -> None:
        if self._finished or self._is_contradicted or self._has_no_route:
            return  # by our own error, its replica ended after it had begun, or the rest of Ray Serve's
        self._facts = message.pop(FACTS, self._facts)
        if message["type"] == "http.response.start":
            headers = dict(message["headers"])
            is_from_replica = b"x-model-version" in headers
            if self._may_wait and message["status"] == 404 and not is_from_replica:
                self._has_no_route = True
                return
            if YES_HEADER in headers:
                self._start_relayed(message)
                return
            if self._relayed.started:
                self._is_contradicted = True
                return
            self._status, self._headers = message["status"], headers
            self.routes.learn(message["headers"])
            if self._status >= 400 and not is_from_replica:
                error = of_proxy(self._status, self._headers)
                await self._refuse(error)
                self._finished, self._facts = True, {"reason": error.code}
                return
        if message["type"] == "http.response.body":
            last = not message.get("more_body", False)
            if last and self._relayed.started and not await self._relayed.end():
                return
            self._finished = last
        await self._send_on(message)

    async def _refuse(self, error: ApiError) -> None:
        await error.response(request_id=self.request_id)(self.scope, self.receive, self.send)

    async def _send_on(self, message: Message) -> None:
        self._num_events += message.get("body", b"").count(b"\n\n")
        await self.send(message)


def clean_request_id(headers: list[tuple[bytes, bytes]]) -> bytes:
    """Returns the client's request id, or a new one if it has none or one that is unsafe in a log."""
    values = [value for name, value in headers if name == b"x-request-id"]
    return values[0] if len(values) == 1 and REQUEST_ID.fullmatch(values[0]) else uuid.uuid4().hex.encode()


def of_proxy(status: int, headers: Mapping[bytes, bytes]) -> ApiError:
    """Translates Ray Serve's own refusal: no replica took the request, or none had time for it."""
    retry_after = headers.get(b"retry-after", b"1").decode("ascii")
    phrase = "No replica is free" if status == 429 else HTTPStatus(status).phrase
    return ApiError(
        f"{phrase}; try again later",
        status=status,
        code="overloaded" if status == 429 else HTTPStatus(status).name.lower(),
        headers={"Retry-After": retry_after} if status in (429, 503) else {},
    )

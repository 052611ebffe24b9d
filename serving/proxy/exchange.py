"""One request and its answer, as a proxy sees them: asks another replica where one dies, and ends
every broken stream with an error event."""

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.delivery.route import ROUTE_HEADER
from serving.delivery.routed_request import RETRY_HEADER, NewestRoutes
from serving.protocol.errors import DRAINING_HEADER, ApiError, error_of
from serving.protocol.request_facts import FACTS
from serving.protocol.tracing import RequestSpan
from serving.proxy.ending import CLIENT_LEFT, AnswerEnding, AnswerOutcome, outcome_of
from serving.proxy.token_relay import YES_HEADER, Relay, RelayedAnswer

# A request may be what ends its replicas: one that ended a third would end them all.
MAX_ATTEMPTS = 2
ROUTE_TIMEOUT_S = 10.0  # for a proxy that has just started to hear of the application
ROUTE_POLL_S = 0.05
RESPONSES_PATH = "/v1/responses"  # whose streams have numbered events of many kinds
INTERNAL_HEADERS = (ROUTE_HEADER.encode(), YES_HEADER)  # between replicas and proxies


@dataclass(eq=False)
class HttpExchange:
    """One request and its answer. If a replica dies before the first byte has gone out, another one
    gets the request, once, unless it is an operator's order."""

    app: ASGIApp
    scope: Scope
    body: bytes
    receive: Receive
    send: Send
    request_id: bytes
    span: RequestSpan
    routes: NewestRoutes  # of all answers
    _relayed: RelayedAnswer = field(init=False)
    _body_given = _client_gone = _finished = False
    # Ray Serve's own 404: this proxy does not know the application yet
    _has_no_route = _may_wait = False
    _status = 0  # of the answer, once it has started
    _headers: Mapping[bytes, bytes] = field(default_factory=dict)  # of the answer
    _facts: dict[str, Any] = field(default_factory=dict)
    _num_attempts = 0
    _num_events = 0  # of a stream that have gone out
    _num_deltas = 0  # those of them that are text of a response
    _is_cut = False
    _is_contradicted = False  # Ray Serve has begun another answer than the one that goes out
    _attempt: asyncio.Task[Any] | None = None  # this one, while a replica is asked

    @property
    def _is_order(self) -> bool:
        """Whether it changes the endpoint. An order is given once: carried out twice, a rollback
        would undo itself."""
        is_admin = self.scope["path"].startswith("/admin/")
        return bool(is_admin and self.scope["method"] not in ("GET", "HEAD"))

    @property
    def _is_response(self) -> bool:
        return bool(self.scope["path"] == RESPONSES_PATH)

    def _no_answer(self) -> ApiError:
        """Returns what a client hears whose request no replica has answered."""
        if self._is_cut:
            return error_of("ending")
        return (
            error_of("order_interrupted")
            if self._is_order
            else error_of("replicas_ended", count=MAX_ATTEMPTS)
        )

    def cut(self) -> None:
        """Ends the answer now, with an error."""
        self._is_cut = True
        if self._attempt is not None:
            self._attempt.cancel()

    async def run(self, relay: Relay) -> AnswerEnding:
        outcome, reason = await self._run(relay)
        facts = self._facts
        if facts.get("stream") and facts["completion_tokens"] is None:
            # One for each token, as far as the client got
            facts["completion_tokens"] = self._num_deltas if self._is_response else self._num_events
        return AnswerEnding(outcome, self._status or None, reason, self._num_attempts, facts)

    async def _run(self, relay: Relay) -> tuple[AnswerOutcome, str]:
        most = 1 if self._is_order else MAX_ATTEMPTS
        for attempt in range(most):
            self._num_attempts = attempt + 1
            self._relayed = await relay.open(on_start=self._start_relayed)
            retry = [(RETRY_HEADER, b"1")] if attempt else []
            span = self.span.child("attempt", {"raymill.attempt": self._num_attempts})
            headers = span.forward([*self.scope["headers"], self._relayed.header, *retry])
            scope = {**self.scope, "headers": headers}
            self._attempt = task = asyncio.current_task()
            try:
                if not self._is_cut:
                    await self._ask(scope)
                    await self._finish_relayed()
            except asyncio.CancelledError:
                assert task is not None
                if not self._is_cut or task.uncancel() > 0:  # by another than `cut`
                    raise
            finally:
                self._attempt = None
                span.end(
                    {}, error=None if self._status or self._client_gone else "the replica ended"
                )
                await self._relayed.close()
            if self._status or self._client_gone or self._is_cut:
                break
        if self._finished:
            is_drained = DRAINING_HEADER.encode() in self._headers
            reason = self._facts.get("reason") or HTTPStatus(self._status).name.lower()
            return AnswerOutcome.DRAINED if is_drained else outcome_of(self._status), reason
        if self._client_gone:
            return AnswerOutcome.LEFT, CLIENT_LEFT
        if not self._status:
            error = self._no_answer()
            self._status = error.status
            await self._refuse(error)
            return AnswerOutcome.FAILED, str(error.code)
        if self._headers.get(b"content-type", b"").startswith(b"text/event-stream"):
            # Without it the stream would just stop. In any other answer the missing bytes show.
            error = error_of("interrupted")
            number = self._num_events
            event = error.response_event(number) if self._is_response else error.event()
            await self.send({"type": "http.response.body", "body": event.encode()})
        return AnswerOutcome.CUT, "interrupted"

    async def _ask(self, scope: Scope) -> None:
        """Hands the request to Ray Serve, again while this proxy does not know the application. A
        proxy that replaces another one listens a moment before it does, beside others of the same
        port that do."""
        is_of_application = self.scope["path"].startswith("/")  # as every path below its route
        deadline_s = time.monotonic() + (ROUTE_TIMEOUT_S if is_of_application else 0.0)
        while True:
            self._body_given = self._has_no_route = False
            self._may_wait = time.monotonic() < deadline_s
            # A copy: Ray Serve writes into the scope
            await self.app({**scope}, self._next_message, self._pass_on)
            if not self._has_no_route:
                return
            await asyncio.sleep(ROUTE_POLL_S)

    async def _finish_relayed(self) -> None:
        """Ends an answer that has arrived whole although its replica died before it could end it
        through Ray Serve."""
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
        """Starts an answer whose parts come over the relay, with its start from there or from Ray
        Serve, which is later by milliseconds."""
        if self._status:
            return
        self._facts = message.pop(FACTS, self._facts)
        self._status, self._headers = message["status"], dict(message["headers"])
        self.routes.learn(message["headers"])
        shown = for_clients(message["headers"])
        kept = [(name, value) for name, value in shown if name != b"x-request-id"]
        headers = [*kept, (b"x-request-id", self.request_id)]
        self._relayed.start({**message, "headers": headers}, self._send_on)

    async def _pass_on(self, message: Message) -> None:
        if self._finished or self._is_contradicted or self._has_no_route:
            # By our own error, its replica ended after it had begun, or the rest of Ray Serve's
            return
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
            message = {**message, "headers": for_clients(message["headers"])}
        if message["type"] == "http.response.body":
            last = not message.get("more_body", False)
            if last and self._relayed.started and not await self._relayed.end():
                return
            self._finished = last
        await self._send_on(message)

    async def _refuse(self, error: ApiError) -> None:
        await error.response(request_id=self.request_id)(self.scope, self.receive, self.send)

    async def _send_on(self, message: Message) -> None:
        body = message.get("body", b"")
        self._num_events += body.count(b"\n\n")
        if self._is_response:
            self._num_deltas += body.count(b".delta\n")
        await self.send(message)


def for_clients(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Returns an answer's headers without the ones that only proxies read."""
    return [(name, value) for name, value in headers if name not in INTERNAL_HEADERS]


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

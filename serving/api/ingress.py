"""The HTTP routes of a replica. Each reads its request strictly and answers in OpenAI's shape,
errors too."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.settings.code_folders import code_version
from cluster.settings.serve import ServeConfig
from model.files.bounded_text import TextError
from model.text.chat import ChatError
from serving.api.access import CurrentAccess, authorize, may_look_inside
from serving.api.admission import start_completion
from serving.api.asked_routes import AskedRoutes, answer_of_bug, refusal
from serving.api.chat import NOTE_HEADER, ChatAnswer, ChatRequest, as_completion
from serving.api.completions import Completion
from serving.api.key_limits import KEY_IN_SCOPE, KeyLimits, key_of
from serving.api.metrics import ReplicaMetrics, SeriesFor
from serving.api.route_facts import OTHER, Opens, RouteFacts, declares, facts_by_path
from serving.api.tool_routes import add_tool_routes
from serving.delivery.loaded_version import LoadedVersion
from serving.delivery.routed_request import RoutedRequest
from serving.delivery.versions import Versions
from serving.limits.asker import CURRENT_ASKER
from serving.limits.key_usage import KeyUsage
from serving.output.answers import Answer, EmbeddingAnswer, TextAnswer
from serving.protocol.errors import ApiError, error_of
from serving.protocol.json_log import CURRENT_REQUEST
from serving.protocol.protocol import CompletionRequest, EmbeddingRequest, read_request
from serving.protocol.receipts import Receipts
from serving.protocol.request_facts import FACTS
from serving.protocol.served_model import ServedModel
from serving.protocol.tracing import NO_TRACER, RequestSpan, tracer_from_environment
from serving.proxy.token_relay import YES_HEADER, RelayClient

_PROBE = RouteFacts(Opens.TO_ALL, is_metered=False)
STATE_METHODS = ["GET", "HEAD"]  # monitors ask with HEAD, to which uvicorn sends no body


def build_http_app(
    *,
    versions: Versions,
    metrics: ReplicaMetrics,
    access: CurrentAccess,
    usage: KeyUsage,
    others: Iterable["AddRoutes"] = (),
) -> ASGIApp:
    """Builds the application of all routes, behind `access` and the limits of keys."""
    most = versions.config.replicas.max_requests_per_key
    limits = KeyLimits(usage, metrics.by_key, max_requests=most)
    app, asked = all_routes(versions, metrics, limits, others=others)
    facts = facts_by_path(app.routes)
    return Gate(asked, facts, access=access, versions=versions, limits=limits)


def all_routes(
    versions: Versions,
    metrics: ReplicaMetrics,
    limits: KeyLimits,
    *,
    others: Iterable["AddRoutes"],
) -> tuple[FastAPI, AskedRoutes]:
    """Returns an application with all routes, and the routes that ask the model. `others` add
    theirs, and are called last."""
    config = versions.config
    # Interactive documentation and a schema would show strangers what this endpoint can do.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    add_error_handlers(app, limits)
    # The routes that most requests ask for come first: they are tried in this order.
    service = CompletionService(config, metrics, limits)
    asked = AskedRoutes(app, limits)
    add_completion_routes(asked, service)
    add_model_routes(app)
    add_tool_routes(app, max_waiting=config.max_ongoing_requests)
    add_state_routes(app, versions=versions, metrics=metrics)
    for add in others:
        add(app, asked, service)
    return app, asked


class CompletionService:
    """Answers completions by the version that a request takes, or by the version before."""

    def __init__(self, config: ServeConfig, metrics: ReplicaMetrics, limits: KeyLimits) -> None:
        self.config = config
        self.metrics = metrics
        self._limits = limits
        self._relay = RelayClient()
        self._receipts = Receipts(config)

    async def answer(
        self,
        parsed: CompletionRequest,
        shape: Callable[[ServedModel], Answer],
        request: Request,
        *,
        version: LoadedVersion,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        routed = RoutedRequest.of(request)
        self._receipts.require_possible(parsed)
        try:
            completion = await start_completion(
                parsed,
                answer=shape(version.model),
                version=version,
                metrics=self.metrics,
                config=self.config,
                facts=routed.facts,
                reserve=partial(self._limits.reserve, key_of(request)),
            )
            if parsed.stream:
                return EventStream(completion, headers=headers or {}, relay=self._relay)
            try:
                body = await completion.respond()
            finally:
                completion.close()
        except ApiError as error:
            # Nothing has gone out yet, so the version before can answer what a new version fails to
            # answer.
            other = routed.take_other() if error.status >= 500 else None
            if other is None:
                raise
            return await self.answer(parsed, shape, request, version=other, headers=headers)
        if parsed.raymill and parsed.raymill.receipt:
            engine = version.engine.facts
            body = await self._receipts.added(
                body,
                await request.body(),
                version.model,
                dtype=engine.dtype,
                is_portable=engine.is_portable,
            )
        return Response(body, media_type="application/json", headers=headers)

    async def answer_chat(
        self, parsed: ChatRequest, shape: Callable[[ServedModel], ChatAnswer], request: Request
    ) -> Response:
        routed = RoutedRequest.of(request)
        taken_version = routed.take(parsed.model, user=parsed.user)
        completion, version = await written_chat(
            parsed,
            taken_version,
            routed,
            metrics=self.metrics,
            clips=self.config.engine.clip_max_tokens,
        )
        note = None if version.model.is_chat_tuned else NOTE_HEADER
        return await self.answer(completion, shape, request, version=version, headers=note)


AddRoutes = Callable[[FastAPI, AskedRoutes, CompletionService], None]


def add_completion_routes(asked: AskedRoutes, service: CompletionService) -> None:
    """Adds the routes on which the model reads and writes."""

    async def completions(request: Request) -> Response:
        parsed = await read_request(request, CompletionRequest)
        version = RoutedRequest.of(request).take(parsed.model, user=parsed.user)
        return await service.answer(parsed, TextAnswer, request, version=version)

    async def chat(request: Request) -> Response:
        parsed = await read_request(request, ChatRequest)
        return await service.answer_chat(parsed, partial(ChatAnswer, **parsed.reading), request)

    async def embeddings(request: Request) -> Response:
        parsed = await read_request(request, EmbeddingRequest)
        version = RoutedRequest.of(request).take(parsed.model, user=parsed.user)
        shape = partial(EmbeddingAnswer, encoding=parsed.encoding_format)
        # The completion that reads the texts and draws no token.
        reading = CompletionRequest.model_construct(
            model=parsed.model,
            prompt=parsed.input,
            max_tokens=0,
            temperature=0.0,
            add_special_tokens=parsed.add_special_tokens,
        )
        return await service.answer(reading, shape, request, version=version)

    facts = RouteFacts(Opens.TO_USERS, is_metered=True)
    asked.add("/v1/completions", completions, replace(facts, is_read_by_pages=True))
    asked.add("/v1/chat/completions", chat, replace(facts, is_read_by_pages=True))
    asked.add("/v1/embeddings", embeddings, facts)


def add_model_routes(app: FastAPI) -> None:
    """Adds the routes that list the served model."""

    @app.api_route("/v1/models", methods=STATE_METHODS)
    @declares(replace(OTHER, is_read_by_pages=True))
    async def list_models(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": RoutedRequest.of(request).cards()}

    @app.get("/v1/models/{name:path}")
    @declares(OTHER)
    async def get_model(request: Request, name: str) -> dict[str, Any]:
        return RoutedRequest.of(request).card(name)


def add_state_routes(app: FastAPI, *, versions: Versions, metrics: ReplicaMetrics) -> None:
    """Adds the routes that show the replica's state."""

    @app.api_route("/health", methods=STATE_METHODS)
    @declares(_PROBE)
    async def health() -> dict[str, str]:
        """Answers if the replica's process does."""
        return {"status": "ok"}

    @app.api_route("/ready", methods=STATE_METHODS)
    @declares(_PROBE)
    async def ready() -> dict[str, Any]:
        """Answers 200 if the engine runs, has passed its self-test, and takes requests. Says how
        many replicas do, as of some seconds ago, and how many there are at least once all have
        started."""
        live = versions.live
        if not live.engine.alive:
            raise error_of("engine_unavailable")
        if versions.delivery.draining:
            raise error_of("draining")
        return {
            "status": "ready",
            "model": live.model.name,
            "version": live.model.version,
            "replicas": max(1, versions.num_ready_replicas),  # this one at least
            "min_replicas": versions.config.replicas.min_replicas,
        }

    @app.get("/version")
    # Where the proxy asks whether a key is known (key_check.py), before it takes a body
    @declares(replace(OTHER, is_read_by_pages=True))
    async def version() -> dict[str, str]:
        """Returns the code's version. The model's is in /ready and on each answer."""
        return {"version": code_version()}

    @app.get("/metrics")
    @declares(OTHER)
    async def render_metrics(request: Request) -> Response:
        """Returns the metrics. Of those by key a client sees its own only."""
        shown = SeriesFor(RoutedRequest.of(request).facts.key, metrics.exported.collectors)
        return Response(generate_latest(shown), media_type="text/plain; version=0.0.4")


def add_error_handlers(app: FastAPI, limits: KeyLimits) -> None:
    """Gives every error OpenAI's shape, and counts what was read in vain and what found no room."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return refusal(request, error, limits)

    @app.exception_handler(HTTPException)
    async def routing_error(request: Request, error: HTTPException) -> Response:
        """Answers 404 for an unknown path, and 405 with its Allow header."""
        path, headers = request.url.path[:64], dict(error.headers or {})
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            method, allowed = request.method[:16], headers.get("Allow", "others")
            refusal = error_of("method_not_allowed", path=path, method=method, allowed=allowed)
            refusal.headers |= headers
            return refusal.response()
        assert error.status_code == HTTPStatus.NOT_FOUND
        return error_of("not_found", path=path).response()

    app.add_exception_handler(Exception, answer_of_bug)


async def written_chat(
    request: ChatRequest,
    version: LoadedVersion,
    routed: RoutedRequest,
    *,
    metrics: ReplicaMetrics,
    clips: bool,
) -> tuple[CompletionRequest, LoadedVersion]:
    """Returns the completion that answers a chat, and the version that does. What a new version's
    template cannot write and the version before can is the new one's failure. Raises `ApiError`
    (400) for what no template writes."""
    try:
        return await as_completion(request, version, clips=clips), version
    except (ChatError, TextError) as error:
        metrics.of(version.model.version).chats_refused.inc()
        refusal = ApiError(str(error), param=ChatAnswer.PROMPT_FIELD, code="invalid_value")
    other = routed.take_other()
    if other is None:
        raise refusal
    try:
        completion = await as_completion(request, other, clips=clips)
    except (ChatError, TextError):
        raise refusal from None
    if not request.template_kwargs:  # a client's settings could make any new template fail
        version.stats.sequences += 1
        version.stats.errors += 1
    return completion, other


class Gate:
    """Wraps all routes: requires a key, keeps the version that answers a request loaded until the
    answer has ended, and names it in the answer."""

    def __init__(
        self,
        app: ASGIApp,
        facts: Mapping[str, RouteFacts],
        *,
        access: CurrentAccess,
        versions: Versions,
        limits: KeyLimits,
    ) -> None:
        """`facts` are those of the routes, by path."""
        self._app = app
        self._facts = facts
        self._access = access
        self._limits = limits
        self._versions = versions
        self._tracer = tracer_from_environment("raymill-replica")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = dict(reversed(scope["headers"])).get(b"x-request-id")
        CURRENT_REQUEST.set(None if request_id is None else request_id.decode("latin-1"))
        routed = RoutedRequest(self._versions, scope)
        facts = routed.facts
        tracer = self._tracer if scope["method"] == "POST" else NO_TRACER
        span = RequestSpan.of_request(tracer, "replica", scope["headers"])

        async def send_with_version(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_encoded(routed.headers)]
            # In the start too, for answers whose end does not arrive
            if not message.get("more_body", False):
                message[FACTS] = facts.shown()
            await send(message)

        declared = self._facts.get(scope["path"], OTHER)
        is_metered = declared.is_metered
        try:
            key = authorize(scope["path"], declared, scope["headers"], self._access.rules)
            scope[KEY_IN_SCOPE] = key
            CURRENT_ASKER.set(self._limits.asker(key, connection=scope.get("client")))
            if key is not None:
                routed.key, facts.key = key.hash, key.name
            routed.may_name_versions = may_look_inside(key, self._access.rules)
            if is_metered:
                self._limits.count_request(key)
                if self._versions.delivery.draining:
                    raise error_of("draining")
                self._limits.require_few_invalid(key)
            if key is None or not is_metered:
                await self._app(scope, receive, send_with_version)
            else:
                async with self._limits.running(key):
                    await self._app(scope, receive, send_with_version)
        except ApiError as error:
            facts.reason = error.code
            await error.response()(scope, receive, send_with_version)
        finally:
            routed.close()
            facts.trace(span)


class EventStream(StreamingResponse):
    """A streamed completion. It is closed however the response ends, so that a client that leaves
    frees its slots."""

    def __init__(
        self, completion: Completion, *, headers: Mapping[str, str], relay: RelayClient
    ) -> None:
        headers = {"Cache-Control": "no-cache"} | dict(headers)
        super().__init__(self._pieces(), media_type="text/event-stream", headers=headers)
        self._completion = completion
        self._relay = relay

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            writer = await self._relay.open(scope["headers"])
            if writer is None:
                await super().__call__(scope, receive, send)
                return
            routed = RoutedRequest.of(Request(scope))
            shown = [*self.raw_headers, *_encoded(routed.headers)]
            writer.start(self.status_code, shown, **{FACTS: routed.facts.shown()})
            headers = [*self.raw_headers, (YES_HEADER, b"1")]
            start = {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": headers,
            }
            await self._completion.stream_to(writer.write, on_first=lambda: send(start))
            writer.end()
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._completion.close()

    async def _pieces(self) -> AsyncIterator[bytes]:
        """Yields what goes through Ray Serve."""
        written: asyncio.Queue[bytes] = asyncio.Queue()
        writing = asyncio.create_task(self._completion.stream_to(written.put_nowait))
        writing.add_done_callback(lambda _: written.put_nowait(b""))
        try:
            while piece := await written.get():
                yield piece
            await writing
        finally:
            writing.cancel()


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]

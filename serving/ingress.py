"""The HTTP routes of a replica: each reads its request strictly and answers in OpenAI's shape, errors too."""

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.stage import code_version
from serving.access import AccessRules, RequestsInFlight, authorize
from serving.answers import Answer, AnswerHead, TextAnswer
from serving.chat import NOTE_HEADER, ChatAnswer, as_completion, parse_chat
from serving.completions import AdmissionLimits, Completion, start_completion
from serving.engine_client import EngineClient
from serving.errors import ApiError, engine_unavailable, internal_error, invalid_request, model_not_found
from serving.metrics import ReplicaMetrics
from serving.page_routes import page_router
from serving.protocol import (
    MAX_BODY_BYTES,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    parse_completion,
    parse_request,
)
from serving.relay import YES_HEADER, RelayClient
from serving.served_model import ServedModel
from serving.xray import Xray, XrayRequest

METERED_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/xray")  # count against a key's limit


def build_http_app(
    *,
    model: ServedModel,
    engine: EngineClient,
    metrics: ReplicaMetrics,
    limits: AdmissionLimits,
    access: AccessRules,
    xray: Xray,
) -> ASGIApp:
    """All routes, behind `access`."""
    # The interactive documentation and the schema would tell strangers what this endpoint can do.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.include_router(page_router())
    add_state_routes(app, model=model, engine=engine, metrics=metrics)
    add_error_handlers(app)
    relay = RelayClient()

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        parsed = parse_completion(await read_json_body(request))
        require_model(parsed.model)
        head = AnswerHead.new("cmpl", model=model.name, version=model.version)
        return await answer(parsed, TextAnswer(head))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        parsed = parse_chat(await read_json_body(request))
        require_model(parsed.model)
        completion = await asyncio.to_thread(as_completion, parsed, model)  # tokenizes
        head = AnswerHead.new("chatcmpl", model=model.name, version=model.version)
        return await answer(completion, ChatAnswer(head, num_top=parsed.top_logprobs), headers=NOTE_HEADER)

    async def answer(
        request: CompletionRequest, shape: Answer, *, headers: Mapping[str, str] | None = None
    ) -> Response:
        completion = await start_completion(
            request, answer=shape, model=model, engine=engine, metrics=metrics, limits=limits
        )
        if request.stream:
            return EventStream(completion, headers=headers or {}, relay=relay)
        try:
            body = await completion.respond()
        finally:
            completion.close()
        return Response(body, media_type="application/json", headers=headers)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model.card()]}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        require_model(name)
        return model.card()

    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        parsed = parse_request(await read_json_body(request), TokenizeRequest)
        require_model(parsed.model)
        tokens = model.require_tokenizer().encode(parsed.prompt)
        names = [model.token_name(token_id) for token_id in tokens] if parsed.return_token_strs else None
        max_model_len = model.config.n_positions
        return {"count": len(tokens), "max_model_len": max_model_len, "tokens": tokens, "token_strs": names}

    @app.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, str]:
        parsed = parse_request(await read_json_body(request), DetokenizeRequest)
        require_model(parsed.model)
        model.require_tokenizer()
        tokens = b"".join(model.token_bytes(i) for i in model.checked_ids(parsed.tokens, param="tokens"))
        return {"prompt": tokens.decode("utf-8", errors="replace")}

    @app.get("/v1/xray")
    async def xray_limits() -> dict[str, Any]:
        return await xray.card()

    @app.post("/v1/xray")
    async def look_inside(request: Request) -> Response:
        parsed = parse_request(await read_json_body(request), XrayRequest)
        require_model(parsed.model)
        status, body = await xray.answer(parsed)
        return Response(body, status_code=status, media_type="application/json")

    def require_model(name: str | None) -> None:
        if name is not None and name != model.name:
            raise model_not_found(name, served=model.name)

    return Gate(app, access=access, model_version=model.version)


def add_state_routes(app: FastAPI, *, model: ServedModel, engine: EngineClient, metrics: ReplicaMetrics) -> None:
    """How the replica is doing."""

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The replica's process answers."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """The engine has passed its self-test and runs."""
        if not engine.alive:
            raise engine_unavailable()
        return {"status": "ready", "model": model.name, "version": model.version}

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Of the code; the model's is in /ready and on each answer."""
        return {"version": code_version()}

    @app.get("/metrics")
    async def render_metrics() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4")


def add_error_handlers(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def api_error(_request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def routing_error(_request: Request, error: HTTPException) -> Response:
        """404 of an unknown path, 405 with its Allow header."""
        return error_response(
            ApiError(
                error.status_code,
                str(error.detail),
                error_type="not_found_error" if error.status_code == 404 else "invalid_request_error",
                headers=dict(error.headers or {}),
            )
        )

    @app.exception_handler(Exception)
    async def unexpected_error(_request: Request, _error: Exception) -> Response:
        """A defect of ours: the traceback is in the replica's log, not in the answer."""
        return error_response(internal_error())


class Gate:
    """Around all routes: lets no request without its key through, and names the model's version on each answer."""

    def __init__(self, app: ASGIApp, *, access: AccessRules, model_version: str) -> None:
        self._app = app
        self._access = access
        self._in_flight = RequestsInFlight(access.max_requests_per_key)
        self._model_version = model_version

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_version(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-model-version"] = self._model_version
            await send(message)

        try:
            key = authorize(scope["path"], scope["headers"], self._access)
            with self._in_flight.of(key if scope["path"] in METERED_PATHS else None):
                await self._app(scope, receive, send_with_version)
        except ApiError as error:
            await error_response(error)(scope, receive, send_with_version)


class EventStream(StreamingResponse):
    """A streamed completion, closed however the response ends: a client that goes away frees its slots."""

    def __init__(self, completion: Completion, *, headers: Mapping[str, str], relay: RelayClient) -> None:
        headers = {"Cache-Control": "no-cache"} | dict(headers)
        self._events = completion.stream()
        super().__init__(self._events, media_type="text/event-stream", headers=headers)
        self._completion = completion
        self._relay = relay

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            writer = await self._relay.open(scope["headers"])
            if writer is None:
                await super().__call__(scope, receive, send)
                return
            headers = [*self.raw_headers, (YES_HEADER, b"1")]
            await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
            async for event in self._events:
                writer.write(event)
            writer.end()
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._completion.close()


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


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

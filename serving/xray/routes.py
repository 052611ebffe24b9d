"""The routes that show how a model computes and has learned: /v1/xray, /v1/trace, and the page of
both."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from cluster.settings.serve import ServeConfig
from serving.api.asked_routes import AskedRoutes
from serving.api.ingress import CompletionService
from serving.api.route_facts import Opens, RouteFacts, declares
from serving.delivery.loaded_version import LoadedVersion
from serving.delivery.routed_request import RoutedRequest
from serving.pages.page_files import add_page
from serving.protocol.errors import error_of
from serving.protocol.protocol import read_request
from serving.xray.trace import Traced, TraceRequest, VersionTrace, card
from serving.xray.xray import Xray, XrayRequest

_PAGE_FOLDER = Path(__file__).with_name("page")
_MODULES = ("page", "attention", "timing", "tokens", "trace")
INSIDE_FILES = {"/inside": "index.html", **{f"/page/{name}.js": f"{name}.js" for name in _MODULES}}

_INSIDE = RouteFacts(Opens.INSIDE, is_metered=True)
_TRACE = RouteFacts(Opens.TO_TRACERS, is_metered=True)


def add_xray_routes(app: FastAPI, asked: AskedRoutes, service: CompletionService) -> None:
    """Adds the routes of the x-ray, of the trace, and of their page."""
    config = service.config
    add_page(app, _PAGE_FOLDER, INSIDE_FILES, Opens.INSIDE_PAGE)

    @app.get("/v1/xray")
    @declares(_INSIDE)
    async def xray_limits(request: Request) -> dict[str, Any]:
        routed = RoutedRequest.of(request)
        limits = await xray_of(routed.take()).card(withdrawn=routed.withdrawn)
        return limits | {"traces": config.trace is not None}

    @app.post("/v1/xray")
    @declares(_INSIDE)
    async def look_inside(request: Request) -> Response:
        parsed = await read_request(request, XrayRequest)
        routed = RoutedRequest.of(request)
        xray = xray_of(routed.take(parsed.model))
        status, body = await xray.answer(parsed, withdrawn=routed.withdrawn)
        return Response(body, status_code=status, media_type="application/json")

    if config.trace is None:
        _add_no_trace(app)
    else:
        _add_trace(app, config)


def _add_no_trace(app: FastAPI) -> None:
    @app.api_route("/v1/trace", methods=["GET", "POST"])
    @declares(_TRACE)
    async def no_trace() -> Response:
        raise error_of("no_trace")


def _add_trace(app: FastAPI, config: ServeConfig) -> None:
    @app.get("/v1/trace")
    @declares(_TRACE)
    async def trace_limits() -> dict[str, Any]:
        return card()

    @app.post("/v1/trace")
    @declares(_TRACE)
    async def trace(request: Request) -> Response:
        parsed = await read_request(request, TraceRequest)
        version = RoutedRequest.of(request).take(parsed.model)
        body = await trace_of(version, config).answer(parsed, version.model)
        return Response(body, media_type="application/json")


def xray_of(version: LoadedVersion) -> Xray:
    """Returns the x-ray of a version."""
    name, dtype = version.model.name, version.engine.facts.dtype
    return version.beside(Xray, lambda: Xray(version.folder, name=name, dtype=dtype))


def trace_of(version: LoadedVersion, config: ServeConfig) -> VersionTrace:
    """Returns the trace of a version, of an endpoint with an index. Raises `ApiError` (409) for a
    checkpoint that does not say what it was trained on."""
    metadata, index = version.model.metadata, config.trace
    assert index is not None
    if metadata is None:
        raise error_of("trace_other_data", problem="it does not say what it was trained on")
    traced = Traced(version.checkpoint, metadata, index, config.storage.uri)
    return version.beside(VersionTrace, lambda: VersionTrace(traced))

"""Serves the files of the x-ray page. They are open to everybody, as they hold no data; the data
needs the key."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response
from starlette.routing import Route

_FOLDER = Path(__file__).with_name("page")
_MEDIA_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}
# No foreign or inline script, no request to another host, no form, no frame
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_SCRIPTS = ("page", "api", "attention", "elements", "timing", "tokens", "trace")
_FILES = ("style.css", *(f"{name}.js" for name in _SCRIPTS))
PAGE_PATHS = ("/", *(f"/page/{name}" for name in _FILES))


def page_router() -> APIRouter:
    router = APIRouter()
    for path in PAGE_PATHS:
        file = _FOLDER / (path.removeprefix("/page/").removeprefix("/") or "index.html")
        answer = Response(file.read_bytes(), media_type=_MEDIA_TYPES[file.suffix], headers=_HEADERS)
        router.routes.append(Route(path, answer, methods=["GET"]))
    return router

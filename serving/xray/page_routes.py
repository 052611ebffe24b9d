"""Serves the files of the x-ray page. They are open to everybody, as they hold no data; the data needs the key."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

_FOLDER = Path(__file__).with_name("page")
_MEDIA_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    # `none` by default: no foreign or inline script, no request to another host, no form, no frame.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_FILES = ("style.css", "page.js", "api.js", "attention.js", "elements.js", "timing.js", "tokens.js")
PAGE_PATHS = ("/", *(f"/page/{name}" for name in _FILES))


def page_router() -> APIRouter:
    router = APIRouter()
    for path in PAGE_PATHS:
        file = _FOLDER / (path.removeprefix("/page/").removeprefix("/") or "index.html")
        router.add_api_route(path, _sender(file), methods=["GET", "HEAD"])
    return router


def _sender(file: Path) -> Callable[[], Awaitable[Response]]:
    content = file.read_bytes()

    async def send() -> Response:
        return Response(content, media_type=_MEDIA_TYPES[file.suffix], headers=_HEADERS)

    return send

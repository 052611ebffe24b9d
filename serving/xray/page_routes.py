"""Serves the files of the x-ray page. They are open to everybody, as they hold no data; the data needs the key."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

from model.tables import read_table

_FOLDER = Path(__file__).with_name("page")
_MEDIA_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}
_HEADERS: dict[str, str] = read_table(__file__, "page_headers")
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

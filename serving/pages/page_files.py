"""Serves the files of a page under a strict Content-Security-Policy. They are open to everybody, as
they hold no data; the data needs the key."""

from collections.abc import Mapping
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.routing import Route

from serving.api.route_facts import Opens, RouteFacts, declares

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


def add_page(
    app: FastAPI, folder: Path, files: Mapping[str, str], opens: Opens = Opens.TO_ALL
) -> None:
    """Adds the routes that answer each path of `files` with its file in `folder`."""
    facts = RouteFacts(opens, is_metered=False)
    for path, name in files.items():
        file = folder / name
        answer = Response(file.read_bytes(), media_type=_MEDIA_TYPES[file.suffix], headers=_HEADERS)
        app.router.routes.append(Route(path, declares(facts)(answer), methods=["GET"]))

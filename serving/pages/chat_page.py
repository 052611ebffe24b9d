"""Serves the page to talk to the model, and the files that it shares with other pages."""

from pathlib import Path

from fastapi import FastAPI

from serving.api.asked_routes import AskedRoutes
from serving.api.ingress import CompletionService
from serving.pages.page_files import add_page

_CHAT_FOLDER = Path(__file__).with_name("chat")
_SHARED_FOLDER = Path(__file__).with_name("shared")
_MODULES = (
    "announcer",
    "answer",
    "chat",
    "conversations",
    "inside",
    "models",
    "settings",
    "sidebar",
    "transcript",
)
CHAT_FILES = {
    "/": "index.html",
    "/chat/chat.css": "chat.css",
    **{f"/chat/{name}.js": f"{name}.js" for name in _MODULES},
}
SHARED_FILES = {f"/page/{name}": name for name in ("style.css", "api.js", "elements.js")}


def add_chat_page(app: FastAPI, asked: AskedRoutes, service: CompletionService) -> None:
    """Adds the routes of the page's files."""
    add_page(app, _CHAT_FOLDER, CHAT_FILES)
    add_page(app, _SHARED_FOLDER, SHARED_FILES)

"""Names the files of the page to talk to the model; two of its modules come from the page of the
inside of a query (serving/xray)."""

from pathlib import Path

CHAT_FOLDER = Path(__file__).with_name("chat")
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

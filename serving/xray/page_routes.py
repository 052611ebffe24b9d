"""Names the files of the x-ray page. Three of them serve the page to talk to the model too."""

from pathlib import Path

XRAY_FOLDER = Path(__file__).with_name("page")
_SHARED = ("style.css", "api.js", "elements.js")
_ONLY_HERE = ("page.js", "attention.js", "timing.js", "tokens.js", "trace.js")
# Which nobody gets where the setting `xray` is off
INSIDE_FILES = {"/inside": "index.html", **{f"/page/{name}": name for name in _ONLY_HERE}}
XRAY_FILES = INSIDE_FILES | {f"/page/{name}": name for name in _SHARED}

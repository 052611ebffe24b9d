"""The settings of the site, which `make docs` builds from these pages."""

import re
from pathlib import Path
from typing import Any

project = "raymill"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
root_doc = "index"
html_theme = "furo"
html_title = "raymill"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
myst_heading_anchors = 4  # as the repository's page names them, so that links work in both

_DOCS = Path(__file__).parent.resolve()
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)[^)]*\)")


def without_links_out(app: Any, docname: str, source: list[str]) -> None:
    """Has a link to a file of the repository outside these pages say where that is, since the site
    does not have it."""
    folder = (_DOCS / docname).parent

    def words(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if target.is_relative_to(_DOCS):
            return match[0]
        return f"{match[1]} (`{target.relative_to(_DOCS.parent).as_posix()}` in the repository)"

    source[0] = _LINK.sub(words, source[0])


def setup(app: Any) -> None:
    app.connect("source-read", without_links_out)

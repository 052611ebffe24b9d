"""The parts of a page: one HTML file with its figures inside, which asks no server for anything."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template


def document(title: str, body: str) -> str:
    """Returns a page that asks no server for anything, in the colors that the reader's system prefers."""
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return Template(page).substitute(title=escape(title), body=body)


def grid(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table whose first column names its rows."""
    return table(caption, heads, [f'<th scope="row">{escape(name)}</th>{cells(values)}' for name, *values in rows])


def picture(description: str, png: bytes) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{escape(description)}">\n'


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>\n' for name, value in rows)
    return f"<table><tbody>{body}</tbody></table>"


def cells(values: Iterable[str]) -> str:
    return "".join(f"<td>{escape(value)}</td>" for value in values)


def table(caption: str, heads: Sequence[str], rows: Iterable[str]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    # It takes the focus, so that it scrolls by keyboard too.
    return (
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )

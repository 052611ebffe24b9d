"""The parts of a page: one HTML file with its figures inside, which asks no server for anything."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --text: #222; --background: #fff; --line: #ddd; --quiet: #595959 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --background: #16181c; --line: #3a3d44; --quiet: #a8a8a8 }
  img { filter: invert(.91) hue-rotate(180deg) }
}
body { margin: 2rem auto; padding: 0 1rem; max-width: 62rem; color: var(--text); background: var(--background);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
img { display: block; width: 100%; height: auto; margin: 1rem 0 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere }
thead th, tbody th { font-weight: 600 } tbody th { width: 32% }
.scroll td:not(:last-child) { overflow-wrap: normal }
.scroll { overflow: auto; max-height: 32rem } .scroll:focus { outline: 2px solid var(--quiet) }
td.text { white-space: pre-wrap; font-family: ui-monospace, monospace; font-size: .875rem }
td.text b { font-weight: 400; color: var(--quiet) }
summary { cursor: pointer; font-size: 1.2rem; font-weight: 700; margin-top: 2.5rem }
"""


def document(title: str, body: str) -> str:
    """Returns a page that asks no server for anything, in the colors that the reader's system prefers."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{body}</main>
</body>
</html>
"""


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

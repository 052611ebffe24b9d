"""The look of reports: the parts of a page, which is one HTML file with its figures inside, and the
style of figures.

The colors are Okabe and Ito's, which color-blind people can tell apart; what differs in color
differs in shape or line too.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_WIDTH_INCHES = 9.0
_DOTS_PER_INCH = 150

TEXT = "#222222"
SERIES, ACCENT = "#0072b2", "#d55e00"
RESTART, RESIZE = "#d55e00", "#7a3b69"
PHASES = ("#56b4e9", "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#999999", "#f0e442")


def document(title: str, body: str) -> str:
    """Returns a page that asks no server for anything, in the colors that the reader's system
    prefers."""
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return Template(page).substitute(title=escape(title), body=body)


def grid(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table whose first column names its rows."""
    lines = [f'<th scope="row">{escape(name)}</th>{cells(values)}' for name, *values in rows]
    return table(caption, heads, lines)


def picture(description: str, png: bytes) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{escape(description)}">\n'


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    lines = [
        f'<tr><th scope="row">{escape(name)}</th>{cells([value])}</tr>\n' for name, value in rows
    ]
    return f"<table><tbody>{''.join(lines)}</tbody></table>"


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


def new_figure(*, height_inches: float = 3.8) -> Figure:
    return Figure((_WIDTH_INCHES, height_inches), _DOTS_PER_INCH, layout="constrained")


def titled(figure: Figure, title: str, *, x: str, y: str) -> Axes:
    """Returns the figure's only axes, styled, with a title and labels."""
    axes = figure.subplots()
    style(axes)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return axes


def style(axes: Axes) -> None:
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def png(figure: Figure, *, columns: int = 4) -> bytes:
    """Renders the figure, with the legend of all axes below them, where it hides nothing."""
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        drawn, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, drawn, strict=True))
    if handles:
        place: dict[str, Any] = {"ncols": columns, "frameon": False, "fontsize": "small"}
        figure.legend(list(handles.values()), list(handles), loc="outside lower left", **place)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()

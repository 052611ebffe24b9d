"""The look of figures, for light and for dark pages.

The colors are Okabe and Ito's, which color-blind people can tell apart; what differs in color differs in shape or line
too.
"""

import io
from dataclasses import dataclass
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_SIZE_INCHES = (9.0, 3.8)
_DOTS_PER_INCH = 150
_PHASES = ("#56b4e9", "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#999999", "#f0e442")


@dataclass(frozen=True)
class Theme:
    background: str
    text: str
    grid: str
    series: str
    accent: str
    restart: str
    resize: str
    phases: tuple[str, ...] = _PHASES


LIGHT = Theme("#ffffff", "#222222", "#dddddd", "#0072b2", "#d55e00", "#d55e00", "#7a3b69")
DARK = Theme("#16181c", "#e6e6e6", "#3a3d44", "#56b4e9", "#e69f00", "#e69f00", "#cc79a7")


def new_figure(theme: Theme, *, height_inches: float = _SIZE_INCHES[1]) -> Figure:
    figure = Figure((_SIZE_INCHES[0], height_inches), _DOTS_PER_INCH, layout="constrained", facecolor=theme.background)
    FigureCanvasAgg(figure)
    return figure


def titled(figure: Figure, theme: Theme, title: str, *, x: str, y: str) -> Axes:
    """Returns the figure's only axes, styled, with a title and labels."""
    axes = figure.subplots()
    style(axes, theme)
    axes.set_title(title, loc="left", color=theme.text, fontweight="bold")
    axes.set_xlabel(x, color=theme.text)
    axes.set_ylabel(y, color=theme.text)
    return axes


def style(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.background)
    axes.grid(color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.text)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.text)


def png(figure: Figure, theme: Theme, *, columns: int = 4) -> bytes:
    """Renders the figure, with the legend of all axes below them, where it hides nothing."""
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        drawn, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, drawn, strict=True))
    if handles:
        place: dict[str, Any] = {"ncols": columns, "frameon": False, "labelcolor": theme.text, "fontsize": "small"}
        figure.legend(list(handles.values()), list(handles), loc="outside lower left", **place)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=theme.background)
    return buffer.getvalue()

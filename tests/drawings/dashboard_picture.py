"""Draws a dashboard as Grafana would, from its JSON and the answers of a real Prometheus: titles,
units, legends, colors, stacking and annotations as they stand there. No Grafana can be installed
here."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, PercentFormatter

Json = dict[str, Any]
History = Callable[[str], list[Any]]
"""Returns the series of a query over the picture's time."""

COLUMNS = 3


def draw(
    dashboard: Json,
    *,
    history: History,
    annotations: Sequence[Json],
    since_s: float,
    until_s: float,
) -> bytes:
    """Returns the panels below each other, three in a row, as PNG."""
    panels = [panel for panel in dashboard["panels"] if panel["type"] == "timeseries"]
    num_rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(12.5, 2.7 * num_rows), layout="constrained", facecolor="white")
    places = figure.subplots(num_rows, COLUMNS, squeeze=False).flat
    for panel, axes in zip(panels, places, strict=False):
        _draw_panel(axes, panel, history)
        for note in annotations:
            axes.axvline(note["time"] / 1000, color="#7F7F7F", linewidth=1, linestyle=":")
        axes.set_xlim(since_s, until_s)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda time_s, _: f"{time_s - since_s:.0f} s"))
    for axes in list(figure.axes)[len(panels) :]:
        axes.remove()
    output = io.BytesIO()
    figure.savefig(output, format="png", dpi=80)
    return output.getvalue()


def _draw_panel(axes: Axes, panel: Json, history: History) -> None:
    field = panel["fieldConfig"]
    lines: list[tuple[str, str, list[tuple[float, float]]]] = []  # legend, color, points
    for target in panel["targets"]:
        for series in history(target["expr"]):
            legend = re.sub(
                r"{{(\w+)}}",
                lambda found, labels=series["metric"]: labels[found[1]],
                target["legendFormat"],
            )
            points = [
                (float(time_s), float(value))
                for time_s, value in series["values"]
                if value != "NaN"
            ]
            if points:
                lines.append((legend, _color(field, legend, target["refId"]), points))
    if field["defaults"]["custom"]["stacking"]["mode"] == "normal":
        times_s = sorted({time_s for *_, points in lines for time_s, _ in points})
        values = [[dict(points).get(time_s, 0.0) for time_s in times_s] for *_, points in lines]
        labels, colors = [legend for legend, *_ in lines], [color for _, color, _ in lines]
        axes.stackplot(times_s, values, labels=labels, colors=colors, alpha=0.7, linewidth=0)
    else:
        for legend, color, points in lines:
            axes.plot(*zip(*points, strict=True), color=color, label=legend, linewidth=2)
    axes.set_title(panel["title"], loc="left", fontsize=11, fontweight="bold")
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.set_ylim(bottom=0)
    if (top := field["defaults"].get("max")) is not None:
        axes.set_ylim(top=top)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    _set_unit(axes, field["defaults"]["unit"])
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.1),
        ncols=2,
        fontsize=8,
        frameon=False,
        handlelength=1,
    )


def _color(field: Json, legend: str, ref_id: str) -> str:
    for rule in field["overrides"]:
        if rule["matcher"]["options"] in (legend, ref_id):
            return str(rule["properties"][0]["value"]["fixedColor"])
    return str(field["defaults"]["color"]["fixedColor"])


def _set_unit(axes: Axes, unit: str) -> None:
    match unit:
        case "percentunit":
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        case "s":
            axes.yaxis.set_major_formatter(EngFormatter("s"))
        case _:
            axes.set_ylabel(unit.removeprefix("suffix: ") if unit != "short" else "", fontsize=9)

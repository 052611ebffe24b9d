"""Draws the explanation of a step: the loss and the gradient norm of each lane, and the rows that
are to blame, as a page and its figure."""

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from cluster.output.json_result import finite
from cluster.output.result_text import text_of
from cluster.storage.uris import Storage, join_uri
from jobs.proof.explain.explanation import Explanation, StepWithout, WorstRow, shortened
from jobs.report.page import (
    ACCENT,
    SERIES,
    TEXT,
    document,
    grid,
    new_figure,
    picture,
    png,
    style,
)

_LANE_HEADS = ("Lane", "Loss", "Part of the loss", "Gradient norm", "Tokens")
_WORST_HEADS = (
    *("Lane", "Row", "Sample", "What", "Loss", "Gradient norm"),
    *("Change of the update", "Cosine of the two", "Document"),
)
_PANELS = (("loss", "loss (nats/token)"), ("grad_norm", "gradient norm"))


def write_page(run: Storage, explanation: Explanation) -> Explanation:
    """Writes the page and the figure of a step into the run's folder. Returns the explanation with
    their URIs."""
    image = draw(explanation)
    name = f"report/explain-{explanation.step}"
    run.write_bytes(f"{name}.png", image)
    run.write_bytes(f"{name}.html", _page(explanation, image).encode())
    html, figure = (join_uri(run.uri, name + ending) for ending in (".html", ".png"))
    return replace(explanation, html=html, figure=figure)


def draw(explanation: Explanation) -> bytes:
    """Returns the losses and the gradient norms of a step's lanes as PNG, the worst marked."""
    figure = new_figure(height_inches=5.0)
    panels = figure.subplots(2, sharex=True)
    title = f"Step {explanation.step}, lane by lane"
    panels[0].set_title(title, loc="left", fontweight="bold")
    for axes, (name, label) in zip(panels, _PANELS, strict=True):
        values = [finite(getattr(lane, name)) for lane in explanation.lanes]
        worst = [row.lane for row in explanation.worst if name in row.highest]
        _bars(axes, values, worst=worst, whole=finite(getattr(explanation, name)))
        axes.set_ylabel(label)
    panels[1].set_xlabel("lane")
    panels[1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return png(figure)


def _bars(
    axes: Axes, values: Sequence[float | None], *, worst: Sequence[int], whole: float | None
) -> None:
    """Draws a bar for each lane. One that is not finite is a cross at the top."""
    style(axes)
    heights = np.array([np.nan if value is None else value for value in values])
    lanes = np.arange(len(heights))
    axes.bar(lanes, heights, color=SERIES, label="lane")
    marked = np.isin(lanes, worst)
    axes.bar(lanes[marked], heights[marked], color=ACCENT, hatch="////", label="worst row is here")
    missing = lanes[np.isnan(heights)]
    if len(missing):
        top = [0.95] * len(missing)
        whole_axes = axes.get_xaxis_transform()  # y in shares of the axes
        axes.plot(missing, top, "x", color=ACCENT, transform=whole_axes, label="not finite")
    if whole is not None:
        axes.axhline(whole, color=TEXT, ls="--", lw=1.2, label="whole step")


def _page(explanation: Explanation, image: bytes) -> str:
    title = f"Step {explanation.step} of the run"
    notes = [note for note in (explanation.note, explanation.no_documents) if note]
    lanes = [[text_of(value) for value in lane.json().values()] for lane in explanation.lanes]
    rows = [[text_of(value) for value in row.values()] for row in worst_rows(explanation)]
    body = f"""<h1>{escape(title)}</h1>
<p>{escape(explanation.verdict)}</p>
{"".join(f"<p>{escape(note)}</p>" for note in notes)}
{picture(explanation.verdict, image)}
<h2>The worst rows, and the step without them</h2>
{grid("Worst rows", _WORST_HEADS, rows)}
{"".join(map(_row_text, explanation.worst))}
<h2>Lanes</h2>
{grid("Lanes of the step", _LANE_HEADS, lanes)}
"""
    return document(title, body)


def _row_text(worst: WorstRow) -> str:
    head = f"Text of lane {worst.lane}, row {worst.row}"
    return f"<h2>{head}</h2>\n<pre>{escape(worst.text)}</pre>\n"


def worst_rows(explanation: Explanation) -> list[dict[str, Any]]:
    """Returns a table of the worst rows: of each its own figures, then the figures of the step
    without it, without its lane, and without all rows of its document if there are more."""
    table: list[dict[str, Any]] = []
    for worst in explanation.worst:
        names = ", ".join(dict.fromkeys(document.name for document in worst.documents))
        parts: dict[str, tuple[WorstRow | StepWithout | None, str]] = {
            "the row": (worst, names or shortened(worst.text)),
            "the step without the row": (worst.without_row, ""),
            "the step without the lane": (worst.without_lane, ""),
        }
        if worst.document_rows > 1:
            name = f"the step without {worst.document_rows} rows of the document"
            parts[name] = (worst.without_document, "")
        for what, (measured, documents) in parts.items():
            figures = measured.json() if measured else {}
            table.append(
                {
                    **{name: getattr(worst, name) for name in ("lane", "row", "sample")},
                    "what": what,
                    "loss": figures.get("loss"),
                    "grad_norm": figures.get("grad_norm"),
                    "update_change": figures.get("update_change", ""),
                    "update_cosine": figures.get("update_cosine", ""),
                    "document": documents,
                }
            )
    return table

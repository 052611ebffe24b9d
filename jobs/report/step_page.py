"""Draws the explanation of a step: the loss and the gradient norm of each lane, and the rows that
are to blame, as a page and its figure."""

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from cluster.output.result_text import text_of
from cluster.storage.uris import Storage, join_uri
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

_FIRST_CHARS = 60
_LANE_HEADS = ("Lane", "Loss", "Part of the loss", "Gradient norm", "Tokens")
_WORST_HEADS = (
    *("Lane", "Row", "Sample", "What", "Loss", "Gradient norm"),
    *("Change of the update", "Cosine of the two", "Document"),
)
_PANELS = (("loss", "loss (nats/token)"), ("grad_norm", "gradient norm"))


def write_page(run: Storage, result: dict[str, Any]) -> dict[str, str]:
    """Writes the page and the figure of what `raymill explain` has found into the run's folder.
    Returns their URIs."""
    step = result["step"]
    image = draw(result)
    names = {"html": f"report/explain-{step}.html", "figure": f"report/explain-{step}.png"}
    run.write_bytes(names["figure"], image)
    run.write_bytes(names["html"], _page(result, image).encode())
    return {kind: join_uri(run.uri, name) for kind, name in names.items()}


def draw(result: dict[str, Any]) -> bytes:
    """Returns the losses and the gradient norms of a step's lanes as PNG, the worst marked."""
    figure = new_figure(height_inches=5.0)
    panels = figure.subplots(2, sharex=True)
    panels[0].set_title(f"Step {result['step']}, lane by lane", loc="left", fontweight="bold")
    for axes, (name, label) in zip(panels, _PANELS, strict=True):
        values = [lane[name] for lane in result["lanes"]]
        worst = [row["lane"] for row in result["worst"] if name in row["highest"]]
        _bars(axes, values, worst=worst, whole=result[name])
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


def _page(result: dict[str, Any], image: bytes) -> str:
    title = f"Step {result['step']} of the run"
    notes = [result[name] for name in ("note", "no_documents") if result[name]]
    lanes = [
        [text_of(lane[name]) for name in ("lane", "loss", "part", "grad_norm", "tokens")]
        for lane in result["lanes"]
    ]
    rows = [[text_of(value) for value in row.values()] for row in worst_rows(result)]
    body = f"""<h1>{escape(title)}</h1>
<p>{escape(result["verdict"])}</p>
{"".join(f"<p>{escape(note)}</p>" for note in notes)}
{picture(result["verdict"], image)}
<h2>The worst rows, and the step without them</h2>
{grid("Worst rows", _WORST_HEADS, rows)}
{"".join(_row_text(row) for row in result["worst"])}
<h2>Lanes</h2>
{grid("Lanes of the step", _LANE_HEADS, lanes)}
"""
    return document(title, body)


def _row_text(row: dict[str, Any]) -> str:
    head = f"Text of lane {row['lane']}, row {row['row']}"
    return f"<h2>{head}</h2>\n<pre>{escape(row['text'])}</pre>\n"


def worst_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a table of the worst rows: of each its own figures, then those of the step without it,
    without its lane, and without all rows of its document if there are more."""
    table: list[dict[str, Any]] = []
    for row in result["worst"]:
        names = ", ".join(dict.fromkeys(document_name(one) for one in row["documents"]))
        place = {name: row[name] for name in ("lane", "row", "sample")}
        parts = {
            "the row": row,
            "the step without the row": row["without_row"] or {},
            "the step without the lane": row["without_lane"] or {},
        }
        if row["document_rows"] > 1:
            name = f"the step without {row['document_rows']} rows of the document"
            parts[name] = row["without_document"] or {}
        for what, figures in parts.items():
            table.append(
                {
                    **place,
                    "what": what,
                    "loss": figures.get("loss"),
                    "grad_norm": figures.get("grad_norm"),
                    "update_change": figures.get("update_change", ""),
                    "update_cosine": figures.get("update_cosine", ""),
                    "document": names or shortened(row["text"]) if figures is row else "",
                }
            )
    return table


def document_name(document: dict[str, Any]) -> str:
    """Returns FILE:PLACE of a document of a step."""
    if document["file"] is None:
        return f"unknown, in {document['shard']}"
    return f"{document['file']}:{document['place']}"


def shortened(text: str) -> str:
    """Returns the front of a text in one line."""
    words = " ".join(text.split())
    return f"{words[:_FIRST_CHARS]}…" if len(words) > _FIRST_CHARS else words

"""Writes a run's page: one HTML file with its figures inside, which asks no server for anything."""

import base64
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from jobs.run.history import event_rows
from jobs.run.ledger import Ledger, Line

_STYLE = """
:root { color-scheme: light dark; --text: #222; --background: #fff; --line: #ddd; --quiet: #595959 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --background: #16181c; --line: #3a3d44; --quiet: #a8a8a8 }
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


@dataclass(frozen=True)
class Figure:
    """One figure in both themes."""

    description: str
    light: bytes  # PNG
    dark: bytes


def page(
    run_id: str,
    ledger: Ledger,
    *,
    figures: Sequence[Figure],
    verdict: str,
    statistics: Sequence[tuple[str, str]],
    plan: Sequence[tuple[str, str, str]],
    drops: Sequence[tuple[str, str, str]],
    settings: Sequence[tuple[str, str]],
) -> str:
    samples = _samples(ledger)
    body = f"""<h1>Run {escape(run_id)}</h1>
<p>{escape(verdict)}</p>
{_pairs(statistics)}
<h2>Plan and actual</h2>
{grid("Plan and actual", ("", "Planned", "Actual"), plan)}
<h2>Curves</h2>
{"".join(map(picture, figures))}
{f"<h2>Samples</h2>{samples}" if samples else ""}
{f"<h2>Documents</h2>{grid('Documents', ('', 'Number', 'Share'), drops)}" if drops else ""}
<h2>Events</h2>
{_events(ledger)}
<details><summary>Settings</summary>{_pairs(settings)}</details>
"""
    return document(f"Run {run_id}", body)


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
    cells = [f'<th scope="row">{escape(name)}</th>{_cells(values)}' for name, *values in rows]
    return _table(caption, heads, cells)


def picture(figure: Figure) -> str:
    light, dark = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (figure.light, figure.dark))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(figure.description)}"></picture>\n'
    )


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>\n' for name, value in pairs)
    return f"<table><tbody>{rows}</tbody></table>"


def _events(ledger: Ledger) -> str:
    rows = [_cells([_clock(line), str(line.get("step", "")), name, text]) for line, name, text in event_rows(ledger)]
    return _table("Events of the run", ("Time (UTC)", "Step", "Event", "What it says"), rows)


def _samples(ledger: Ledger) -> str:
    """Returns a table of the prompts' continuations by step; nothing where the run has no prompts."""
    rows = [
        _cells([f"{line['step']:,}", f"{line['val_loss']:.4f}", f"{line['val_bits_per_byte']:.4f}"])
        + f'<td class="text"><b>{escape(sample["prompt"])}</b>{escape(sample["text"])}</td>'
        for line in {line["step"]: line for line in ledger.events("validation")}.values()
        for sample in line["samples"]
    ]
    heads = ("Step", "Loss (nats/token)", "Bits per byte", "Prompt and continuation")
    return _table("Samples by step", heads, rows) if rows else ""


def _cells(values: Iterable[str]) -> str:
    return "".join(f"<td>{escape(value)}</td>" for value in values)


def _table(caption: str, heads: Sequence[str], rows: Iterable[str]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    # It takes the focus, so that it scrolls by keyboard too.
    return (
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _clock(line: Line) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(line["time"]))

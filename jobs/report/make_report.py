"""Draws a run from its ledger: figures as PNG, and a page with them, its statistics, events and
samples."""

import time
from html import escape
from typing import Any

from cluster.storage.uris import Storage, join_uri
from jobs.report.audits import audit_rows, findings
from jobs.report.figures import draw, pictures
from jobs.report.page import cells, document, grid, pairs, picture, table
from jobs.report.why_slow import why_slow
from jobs.run.costs.cost_rows import cost_rows
from jobs.run.find_run import begun_ledger, data_identity, find_tokens
from jobs.run.history import event_rows, flattened, recorded_config, statistics
from jobs.run.ledger import Ledger
from jobs.tokens.token_store import TokenStoreError, read_manifest


def make_report(run: Storage, *, price: float | None = None) -> dict[str, Any]:
    """Writes `report/` into the run's folder and returns the URIs of the page and of each figure.

    `price` is for an hour of a GPU, or of a CPU where workers have none.
    """
    ledger, config = begun_ledger(run), recorded_config(run)
    figures, uris = "", {}
    for name, drawn in pictures(ledger).items():
        image = draw(drawn, ledger)
        run.write_bytes(f"report/{name}.png", image)
        figures += picture(drawn.description, image)
        uris[name] = join_uri(run.uri, f"report/{name}.png")
    samples, drops, audits = _samples(ledger), _drops(run, ledger), _audits(ledger)
    title = f"Run {run.uri.rpartition('/')[2]}"
    body = f"""<h1>{escape(title)}</h1>
<p>{escape(why_slow(ledger).verdict)}</p>
{pairs([*statistics(ledger, config), *cost_rows(ledger, config, price=price)])}
<h2>Curves</h2>
{figures}{f"<h2>Samples</h2>{samples}" if samples else ""}
{f"<h2>Documents</h2>{drops}" if drops else ""}
{f"<h2>Audits</h2>{audits}" if audits else ""}
<h2>Events</h2>
{_events(ledger)}
<details><summary>Settings</summary>{pairs(flattened(config.model_dump(mode="json")))}</details>
"""
    run.write_bytes("report/index.html", document(title, body).encode())
    return {"html": join_uri(run.uri, "report/index.html"), "figures": uris}


def _events(ledger: Ledger) -> str:
    rows = []
    for line, name, text in event_rows(ledger):
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(line["time"]))
        rows.append(cells([at, str(line.get("step", "")), name, text]))
    return table("Events of the run", ("Time (UTC)", "Step", "Event", "What it says"), rows)


def _audits(ledger: Ledger) -> str:
    """Returns what audits cost and found; nothing where there were none."""
    rows = audit_rows(ledger)
    if not rows:
        return ""
    told = [cells(finding.cells) for finding in findings(ledger)]
    heads = ("Step", "Verdict", "Who", "What", "Time lost")
    return pairs(rows) + (table("Verdicts", heads, told) if told else "")


def _samples(ledger: Ledger) -> str:
    """Returns a table of the prompts' continuations by step; nothing where the run has no
    prompts."""
    validations = {line["step"]: line for line in ledger.events("validation")}
    rows = []
    for step, line in validations.items():
        measured = [f"{step:,}", f"{line['val_loss']:.4f}", f"{line['val_bits_per_byte']:.4f}"]
        for sample in line["samples"]:
            text = f"<b>{escape(sample['prompt'])}</b>{escape(sample['text'])}"
            rows.append(f'{cells(measured)}<td class="text">{text}</td>')
    heads = ("Step", "Loss (nats/token)", "Bits per byte", "Prompt and continuation")
    return table("Samples by step", heads, rows) if rows else ""


def _drops(run: Storage, ledger: Ledger) -> str:
    """Returns a table of the documents that the run's token store kept and dropped, by reason;
    nothing without one."""
    try:
        manifest = read_manifest(find_tokens(run, data_identity(ledger)))
    except TokenStoreError:
        return ""
    counts = {"kept": manifest.total("documents")}
    counts |= {f"dropped: {reason}": count for reason, count in manifest.dropped.items() if count}
    total = sum(counts.values())
    rows = [(name, f"{count:,}", f"{count / total:.2%}") for name, count in counts.items()]
    return grid("Documents", ("", "Number", "Share"), rows)

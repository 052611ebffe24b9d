"""Draws a run from its ledger: figures as PNG, and a page with them, its statistics, events and samples."""

import json
import time
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig, batch_schedule, max_steps, seq_len
from cluster.storage.uris import Storage, join_uri, open_storage
from jobs.plan.formulas import STATE_BYTES
from jobs.plan.table import size
from jobs.report.figures import draw, pictures
from jobs.report.page import cells, document, grid, pairs, picture, table
from jobs.report.why_slow import why_slow
from jobs.run.find_run import begun_ledger, data_identity, find_tokens
from jobs.run.history import cost_rows, duration, event_rows, flattened, recorded_config, statistics, worker_hours
from jobs.run.ledger import Ledger
from jobs.tokens.token_store import TokenStoreError, read_manifest
from model.config import flops_per_token, num_parameters


def make_report(run: Storage, *, price: float | None = None, plan: Path | None = None) -> dict[str, Any]:
    """Writes `report/` into the run's folder and returns the URIs of the page and of each figure.

    `price` is for an hour of a GPU, or of a CPU where workers have none; `plan` has what `raymill plan --json` printed.
    """
    planned = _read_plan(plan) if plan else None
    ledger, config = begun_ledger(run), recorded_config(run)
    figures, uris = "", {}
    for name, drawn in pictures(ledger).items():
        image = draw(drawn, ledger)
        run.write_bytes(f"report/{name}.png", image)
        figures += picture(drawn.description, image)
        uris[name] = join_uri(run.uri, f"report/{name}.png")
    samples, drops = _samples(ledger), _drops(run, ledger)
    title = f"Run {run.uri.rpartition('/')[2]}"
    body = f"""<h1>{escape(title)}</h1>
<p>{escape(why_slow(ledger)["verdict"])}</p>
{pairs([*statistics(ledger, config), *cost_rows(ledger, config, price=price)])}
<h2>Plan and actual</h2>
{grid("Plan and actual", ("", "Planned", "Actual"), _plan_rows(ledger, config, planned))}
<h2>Curves</h2>
{figures}{f"<h2>Samples</h2>{samples}" if samples else ""}
{f"<h2>Documents</h2>{grid('Documents', ('', 'Number', 'Share'), drops)}" if drops else ""}
<h2>Events</h2>
{_events(ledger)}
<details><summary>Settings</summary>{pairs(flattened(config.model_dump(mode="json")))}</details>
"""
    run.write_bytes("report/index.html", document(title, body).encode())
    return {"html": join_uri(run.uri, "report/index.html"), "figures": uris}


def _read_plan(path: Path) -> dict[str, Any]:
    """Reads what `raymill plan --json` printed. Raises `ConfigError`."""
    try:
        plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
        float(plan["tokens_per_s"])
    except (OSError, ValueError, IndexError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} holds no plan ({error}); expected what `raymill plan --json` prints") from None
    return plan


def _plan_rows(ledger: Ledger, config: RunConfig, plan: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """Returns (figure, planned value, actual one): what the settings alone plan, and what a plan adds for its GPUs
    where there is one."""
    last, taken = ledger.steps[-1], [line for line in ledger.lines if "event" not in line]
    per_token = flops_per_token(config.model, seq_len(config))
    computed = sum(batch_schedule(config).step_tokens(line["step"]) for line in taken)
    rows = [
        ("Tokens", f"{config.train.max_tokens:,}", f"{last['tokens_seen']:,}"),
        ("Steps", f"{max_steps(config):,}", f"{len(ledger.steps):,}, {len(taken):,} with those taken again"),
        ("Operations", f"{per_token * config.train.max_tokens:.4g} FLOPs", f"{per_token * computed:.4g} FLOPs"),
    ]
    if checkpoints := ledger.events("checkpoint"):
        stored = sum(entry.size for entry in open_storage(checkpoints[-1]["checkpoint"]).list())
        planned = STATE_BYTES * num_parameters(config.model)
        rows.append(("A checkpoint", size(planned), size(stored) if stored else "removed since"))
    if plan is None:
        return rows
    wall_s = ledger.wall_s
    useful_s = sum(line["wall_s"] for line in ledger.steps)
    speed = f"{last['tokens_seen'] / useful_s:,.0f} tokens/s"
    kind, hours = worker_hours(ledger, config)
    mfu = [line["mfu"] for line in ledger.steps if line["mfu"] is not None]
    return [
        *rows,
        ("Wall time", duration(plan["days"] * 86_400), duration(wall_s)),
        (f"{kind}-hours", f"{plan['gpu_days'] * 24:,.4g}", f"{hours:,.4g}"),
        ("Throughput", f"{plan['tokens_per_s']:,.0f} tokens/s", speed),
        ("MFU", f"{plan['mfu']:.1%}", f"{sum(mfu) / len(mfu):.1%}" if mfu else "not known on this hardware"),
        ("Cost", f"${plan['cost']:,.2f}", f"${hours * plan['price_per_gpu_hour']:,.2f} at the plan's price"),
    ]


def _events(ledger: Ledger) -> str:
    rows = [
        cells([time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(line["time"])), str(line.get("step", "")), name, text])
        for line, name, text in event_rows(ledger)
    ]
    return table("Events of the run", ("Time (UTC)", "Step", "Event", "What it says"), rows)


def _samples(ledger: Ledger) -> str:
    """Returns a table of the prompts' continuations by step; nothing where the run has no prompts."""
    rows = [
        cells([f"{line['step']:,}", f"{line['val_loss']:.4f}", f"{line['val_bits_per_byte']:.4f}"])
        + f'<td class="text"><b>{escape(sample["prompt"])}</b>{escape(sample["text"])}</td>'
        for line in {line["step"]: line for line in ledger.events("validation")}.values()
        for sample in line["samples"]
    ]
    heads = ("Step", "Loss (nats/token)", "Bits per byte", "Prompt and continuation")
    return table("Samples by step", heads, rows) if rows else ""


def _drops(run: Storage, ledger: Ledger) -> list[tuple[str, str, str]]:
    """Returns (reason, documents, share of all) of what the run's token store kept and dropped."""
    try:
        manifest = read_manifest(find_tokens(run, data_identity(ledger)))
    except TokenStoreError:
        return []
    counts = {"kept": manifest.total("documents")}
    counts |= {f"dropped: {reason}": count for reason, count in manifest.dropped.items() if count}
    return [(name, f"{count:,}", f"{count / sum(counts.values()):.2%}") for name, count in counts.items()]

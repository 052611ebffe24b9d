"""Draws a run from its ledger: figures as PNG, and a page with them, its statistics, events and samples."""

from collections.abc import Mapping
from typing import Any

from cluster.storage.uris import Storage, join_uri
from jobs.report.figures import draw, pictures
from jobs.report.page import Figure, page
from jobs.report.plan_actual import plan_rows
from jobs.report.theme import DARK, LIGHT
from jobs.report.why_slow import why_slow
from jobs.run.find_run import begun_ledger, data_identity, find_tokens
from jobs.run.history import cost_rows, flattened, recorded_config, statistics
from jobs.run.ledger import Ledger
from jobs.tokens.token_store import TokenStoreError, read_manifest


def make_report(run: Storage, *, price: float | None = None, plan: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Writes `report/` into the run's folder and returns the URIs of the page and of each figure.

    `price` is for an hour of a GPU, or of a CPU where workers have none; `plan` is what `raymill plan --json` printed.
    """
    ledger = begun_ledger(run)
    config = recorded_config(run)
    figures, uris = [], {}
    for name, picture in pictures(ledger).items():
        figures.append(Figure(picture.description, draw(picture, ledger, LIGHT), draw(picture, ledger, DARK)))
        run.write_bytes(f"report/{name}.png", figures[-1].light)
        uris[name] = join_uri(run.uri, f"report/{name}.png")
    html = page(
        run.uri.rpartition("/")[2],
        ledger,
        figures=figures,
        verdict=why_slow(ledger)["verdict"],
        statistics=[*statistics(ledger, config), *cost_rows(ledger, config, price=price)],
        plan=plan_rows(ledger, config, plan),
        drops=_drops(run, ledger),
        settings=list(flattened(config.model_dump(mode="json"))),
    )
    run.write_bytes("report/index.html", html.encode())
    return {"html": join_uri(run.uri, "report/index.html"), "figures": uris}


def _drops(run: Storage, ledger: Ledger) -> list[tuple[str, str, str]]:
    """Returns (reason, documents, share of all) of what the run's token store kept and dropped."""
    try:
        manifest = read_manifest(find_tokens(run, data_identity(ledger)))
    except TokenStoreError:
        return []
    kept = manifest.total("documents")
    counts = {"kept": kept} | {f"dropped: {reason}": count for reason, count in manifest.dropped.items() if count}
    return [(name, f"{count:,}", f"{count / sum(counts.values()):.2%}") for name, count in counts.items()]

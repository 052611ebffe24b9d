"""Draws a run from its ledger: figures as PNG, and one page with them, its statistics, events and samples.

python -m jobs.report RUN
"""

import sys
from collections.abc import Iterator
from typing import Any

from cluster.flags import Parser
from cluster.stage import print_result
from cluster.storage import Storage, join_uri, open_storage
from jobs.ledger import LEDGER, Ledger
from jobs.report_figures import DARK, LIGHT, draw, pictures
from jobs.report_page import Figure, page
from jobs.run_history import recorded_config, statistics
from model.errors import UserError


class ReportError(UserError):
    """There is no such run, or nothing to draw of it yet."""


def find_run(reference: str, storage_uri: str) -> Storage:
    """The run's storage, from its id under `storage_uri` or from its folder's path or URI. Raises `ReportError`."""
    runs = open_storage(storage_uri).child("runs")
    candidates = [open_storage(reference)] if "/" in reference else [runs.child(reference), open_storage(reference)]
    for run in candidates:
        if run.exists(LEDGER):
            return run
    known = sorted({entry.key.split("/")[0] for entry in runs.list() if entry.key.endswith(f"/{LEDGER}")})
    raise ReportError(
        f"unknown run {reference!r}: no {LEDGER} in {' or '.join(run.uri for run in candidates)}; "
        + (f"{runs.uri} has {', '.join(known[-8:])}" if known else f"{runs.uri} has no runs")
    )


def make_report(run: Storage) -> dict[str, Any]:
    """Writes `report/` into the run's folder and returns the URIs of the page and of each figure."""
    ledger = Ledger.read(run)
    if not ledger.steps:
        raise ReportError(f"{run.uri} has no completed step yet; make the report once it has one")
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
        statistics=statistics(ledger, config),
        settings=list(_flattened(config.model_dump(mode="json"))),
    )
    run.write_bytes("report/index.html", html.encode())
    return {"html": join_uri(run.uri, "report/index.html"), "figures": uris}


def _flattened(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            shown = "" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield f"{prefix}{name}", shown


def main() -> int:
    def run() -> dict[str, Any]:
        parser = Parser(prog="python -m jobs.report", description=__doc__)
        parser.add_argument("run", metavar="RUN", help="run id, or path or URI of a run's folder")
        parser.add_argument("--storage.uri", dest="storage_uri", default=".raymill", help="root of the runs")
        arguments = parser.parse_args()
        return make_report(find_run(arguments.run, arguments.storage_uri))

    return print_result(run)


if __name__ == "__main__":
    sys.exit(main())

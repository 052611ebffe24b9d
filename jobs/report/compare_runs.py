"""Puts runs side by side: their losses on one axis, the settings in which they differ, and their
final figures."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from matplotlib.ticker import StrMethodFormatter

from cluster.output.json_result import JsonResult
from cluster.output.result_text import counted, table
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig
from cluster.storage.uris import Storage, join_uri, open_storage
from jobs.report.figures import smoothed
from jobs.report.page import document, grid, new_figure, picture, png, titled
from jobs.run.find_run import begun_ledger
from jobs.run.history import flattened, recorded_config, statistics
from jobs.run.ledger import Ledger

_MAX_RUNS = 8
_DASHES = ("-", "--", "-.", ":", "-", "--", "-.", ":")
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#7a3b69")
_UNITS = ((1e9, "billion "), (1e6, "million "), (1.0, ""))
_OF_THE_RUN = ("run_id", "storage.uri", "cluster.address")
"""Settings that say where a run is, not what it is."""
_OF_ONE_RUN = {"Workers, by attempt", "Checkpoint", "Parameter hash", "Time lost"}
"""Final figures that are about one run alone."""


@dataclass(frozen=True)
class Run:
    name: str
    ledger: Ledger
    config: RunConfig


@dataclass(frozen=True)
class ComparedRuns(JsonResult):
    """The addresses of a page and of a figure, and what they show: values by name, one for each
    run."""

    html: str
    figure: str
    runs: list[str]
    settings: dict[str, list[str]]
    figures: dict[str, list[str]]

    def text(self) -> str:
        """Returns it as people read it: a column for each run."""
        names = ("", *self.runs)
        parts = [f"{'page':8}{self.html}\n{'figure':8}{self.figure}\n"]
        titles = {"final figures": self.figures, "settings that differ": self.settings}
        for title, values in titles.items():
            rows = [dict(zip(names, row, strict=True)) for row in _rows(values)]
            parts.append(f"\n{title}{':' if rows else ': none'}\n{table(names, rows)}")
        return "".join(parts)


def compare(*runs: Storage, storage_uri: str) -> ComparedRuns:
    """Writes `comparisons/…/` into the storage.

    Raises `UserError` for a run without a step, `ConfigError` for too few runs or too many.
    """
    if not 2 <= len(runs) <= _MAX_RUNS:
        raise ConfigError(f"{counted(len(runs), 'run')} cannot be compared; name 2 to {_MAX_RUNS}")
    read = []
    for run in runs:
        read.append(Run(run.uri.rpartition("/")[2], begun_ledger(run), recorded_config(run)))
    names = [run.name for run in read]
    settings = differing_settings(read)
    finals = _side_by_side([dict(statistics(run.ledger, run.config)) for run in read])
    rows = {name: values for name, values in finals.items() if name not in _OF_ONE_RUN}
    key = hashlib.sha256(" ".join(run.uri for run in runs).encode()).hexdigest()[:12]
    folder = open_storage(storage_uri).child(f"comparisons/{key}")
    heads = ["", *names]
    final_grid = grid("Final figures", heads, _rows(rows))
    settings_grid = grid("Settings that differ", heads, _rows(settings))
    ends = [f"{run.name} ends at {run.ledger.steps[-1]['loss']:.3f} nats per token" for run in read]
    text = f"Training and validation loss of each run over the tokens seen: {'; '.join(ends)}."
    image = draw(read)
    body = (
        f"<h1>{escape(' and '.join(names))}</h1>{picture(text, image)}"
        f"<h2>Final figures</h2>{final_grid}"
        f"<h2>Settings that differ</h2>{settings_grid if settings else '<p>None.</p>'}"
    )
    folder.write_bytes("loss.png", image)
    folder.write_bytes("index.html", document("Comparison of runs", body).encode())
    return ComparedRuns(
        html=join_uri(folder.uri, "index.html"),
        figure=join_uri(folder.uri, "loss.png"),
        runs=names,
        settings=settings,
        figures=rows,
    )


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Returns each setting that is not the same in all runs, with its value in each."""
    flat = [dict(flattened(run.config.model_dump(mode="json"))) for run in runs]
    differing = {}
    for name, values in _side_by_side(flat).items():
        if name not in _OF_THE_RUN and len(set(values)) > 1:
            differing[name] = values
    return differing


def _side_by_side(runs: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Returns the value of each run by name, empty where a run has none of that name."""
    by_name: dict[str, list[str]] = {}
    for number, values in enumerate(runs):
        for name, value in values.items():
            by_name.setdefault(name, [""] * len(runs))[number] = value
    return by_name


def _rows(values_by_name: Mapping[str, Sequence[str]]) -> list[list[str]]:
    return [[name, *values] for name, values in values_by_name.items()]


def draw(runs: Sequence[Run]) -> bytes:
    """Draws the training loss, smoothed, and the validation loss over the tokens seen."""
    most = max(run.ledger.steps[-1]["tokens_seen"] for run in runs)
    factor, unit = next(row for row in _UNITS if most >= row[0])
    figure = new_figure(height_inches=4.6)
    axes = titled(figure, "Loss of each run", x=f"{unit}tokens seen", y="loss (nats/token)")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    for number, run in enumerate(runs):
        look: dict[str, Any] = {"color": _COLORS[number], "linestyle": _DASHES[number]}
        steps = run.ledger.steps
        seen = {line["step"]: line["tokens_seen"] / factor for line in steps}
        losses = smoothed([line["loss"] for line in steps], run.ledger)
        label = f"{run.name}, training, smoothed"
        axes.plot(list(seen.values()), losses, linewidth=1.6, label=label, **look)
        validations = {line["step"]: line["val_loss"] for line in run.ledger.events("validation")}
        points = [(seen[step], loss) for step, loss in sorted(validations.items()) if step in seen]
        if points:
            look["linestyle"] = "none"
            # None hides another
            look |= {"marker": "osD^vPX*"[number], "markersize": 5 + number, "fillstyle": "none"}
            axes.plot(*zip(*points, strict=True), label=f"{run.name}, validation", **look)
    return png(figure, columns=2)

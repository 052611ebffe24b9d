"""The panels of `dashboards.yaml`, whose units, explanations and queries come from the metric table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.monitoring.metric_table import METRICS, PER_S, Exporter, Kind

RATE = "$__rate_interval"


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    about: str
    queries: Mapping[str, str]  # expressions by legend
    is_stat: bool = False
    is_stacked: bool = False
    names: tuple[str, ...] = ()  # of known series, each with its color
    thresholds: Sequence[float] = ()  # above them a value is doubtful, and bad
    top: float | None = None  # of the axis


def read(fields: dict[str, Any]) -> Panel:
    """Returns a panel of the metrics or the quantiles that its fields name, or else of queries of its own."""
    if "metrics" in fields:
        return _lines(**fields)
    return _quantiles(**fields) if "quantiles" in fields else Panel(**fields)


def _lines(title: str, metrics: Sequence[str], by: str = "", op: str = "max", **options: Any) -> Panel:
    """Returns lines for metrics, or for the values of the label `by`; of counters, their growth per second."""
    shown = [METRICS[name] for name in metrics]
    grouping = f" by ({by})" if by else ""
    legend = " ".join(f"{{{{{label}}}}}" for label in by.split(", ")) if by else title
    queries = {}
    for metric in shown:
        value = series(metric.name)
        is_counter = metric.kind is Kind.COUNTER
        expr = f"sum{grouping} (rate({value}[{RATE}]))" if is_counter else f"{op}{grouping} ({value})"
        queries[metric.help if len(shown) > 1 else legend] = expr
    first = shown[0]
    unit = PER_S[first.unit] if first.kind is Kind.COUNTER else first.unit
    about = ". ".join(metric.help for metric in shown) + "."
    return Panel(title, unit, about, queries, names=first.values if by in first.labels else (), **options)


def _quantiles(title: str, quantiles: str) -> Panel:
    """Returns the quantiles of a histogram."""
    buckets = f"sum by (le) (rate({series(quantiles, '_bucket')}[{RATE}]))"
    queries = {f"p{q}": f"histogram_quantile({q / 100}, {buckets})" for q in (50, 95, 99)}
    return Panel(title, METRICS[quantiles].unit, f"{METRICS[quantiles].help}.", queries)


def series(name: str, suffix: str = "") -> str:
    """Returns the series of a metric that the dashboard's variables choose. `suffix` is one of a histogram's."""
    metric = METRICS[name]
    (full,) = [found for found in metric.series if found.endswith(suffix)]
    if metric.exporter is Exporter.LAUNCHER:
        return full + '{run="$run"}'
    if metric.exporter is Exporter.REPLICA or "application" in metric.labels:
        return full + '{application=~"$application"}'
    return full

"""The panels of `dashboards.yaml`, whose units, explanations and queries come from the metric
table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.metrics.metric_table import Exporter, Metric, MetricKind, metrics
from tests.metric_series import series_of

PER_S = {"short": "cps", "bytes": "Bps", "suffix: tokens": "suffix: tokens/s"}
"""The unit of a counter's growth, by its own; both as Grafana spells them."""

RATE = "$__rate_interval"
ROLES = ("stable", "canary")  # of versions; each has its color


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    about: str
    queries: Mapping[str, str]  # expressions by legend
    is_stat: bool = False
    is_stacked: bool = False
    names: Sequence[str] = ()  # of known series, each with its color
    thresholds: Sequence[float] = ()  # above them a value is doubtful, and bad
    top: float | None = None  # of the axis


def read(fields: dict[str, Any]) -> Panel:
    """Returns a panel of the metrics or the quantiles that its fields name, of one query for the
    versions of each role, or else of queries of its own."""
    match fields:
        case {"of_versions": str(expr), **rest}:
            return Panel(queries=_of_roles(expr), **rest)
        case {"metrics": names, **rest}:
            return _lines([metrics()[name] for name in names], **rest)
        case {"quantiles": name, **rest}:
            return _quantiles(metrics()[name], **rest)
    return Panel(**fields)


def _lines(
    shown: Sequence[Metric], title: str, by: str = "", op: str = "max", **options: Any
) -> Panel:
    """Returns lines for metrics, or for the values of the label `by`; of counters, their growth per
    second."""
    grouping = f" by ({by})" if by else ""
    legend = " ".join(f"{{{{{label}}}}}" for label in by.split(", ")) if by else title
    queries: dict[str, str] = {}
    for metric in shown:
        value = _series(metric)
        is_counter = metric.kind is MetricKind.COUNTER
        expr = (
            f"sum{grouping} (rate({value}[{RATE}]))" if is_counter else f"{op}{grouping} ({value})"
        )
        if by == "version":
            queries |= _of_roles(expr)
        else:
            queries[metric.help if len(shown) > 1 else legend] = expr
    first = shown[0]
    unit = PER_S[first.unit] if first.kind is MetricKind.COUNTER else first.unit
    about = ". ".join(metric.help for metric in shown) + "."
    return Panel(
        title,
        unit,
        about,
        queries,
        names=first.values if by in first.labels[-1:] else (),
        **options,
    )


def _quantiles(histogram: Metric, title: str, of_versions: int | None = None) -> Panel:
    """Returns lines for three quantiles, or for the one `of_versions` of each role's version."""
    grouping = "le" if of_versions is None else "version, le"
    buckets = f"sum by ({grouping}) (rate({_series(histogram, '_bucket')}[{RATE}]))"
    if of_versions is not None:
        queries = _of_roles(f"histogram_quantile({of_versions / 100}, {buckets})")
    else:
        queries = {f"p{q}": f"histogram_quantile({q / 100}, {buckets})" for q in (50, 95, 99)}
    return Panel(title, histogram.unit, f"{histogram.help}.", queries)


def _of_roles(expr: str) -> dict[str, str]:
    """Returns a query for the versions of each role, by `expr`, which has the label `version`. A
    version has its role during a promotion; in a later one it may have another."""
    series = _series(metrics()["raymill:version_role"])
    return {
        f"{role} {{{{version}}}}": f'{expr} and on (version) {series[:-1]},role="{role}"}} == 1'
        for role in ROLES
    }


def _series(metric: Metric, suffix: str = "") -> str:
    """Returns the series of a metric that the dashboard's variables choose. `suffix` is one of a
    histogram's."""
    (full,) = [found for found in series_of(metric) if found.endswith(suffix)]
    if metric.exporter is Exporter.LAUNCHER:
        return full + '{run="$run"}'
    if metric.exporter is Exporter.REPLICA or "application" in metric.labels:
        return full + '{application=~"$application"}'
    return full

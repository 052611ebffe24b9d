"""The metric table as Prometheus and each exporter see it."""

from cluster.metrics.metric_table import Exporter, Metric, MetricKind, metrics

ENDS = {
    MetricKind.COUNTER: ("_total",),
    MetricKind.GAUGE: ("",),
    MetricKind.HISTOGRAM: ("_bucket", "_sum", "_count"),
}
"""Ends of the names by which Prometheus sees a metric."""


def series_of(metric: Metric) -> tuple[str, ...]:
    """Returns the metric's names at a Ray node's metrics port."""
    if metric.exporter is Exporter.RAY:
        return (metric.name,)
    return tuple(f"ray_{metric.name.replace(':', '_')}{end}" for end in ENDS[metric.kind])


SERIES = {series: metric for metric in metrics().values() for series in series_of(metric)}
"""Metrics by their names in Prometheus."""


def metrics_of(exporter: Exporter) -> list[Metric]:
    return [metric for metric in metrics().values() if metric.exporter is exporter]

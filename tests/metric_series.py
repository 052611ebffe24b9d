"""The metric table as Prometheus and each exporter see it."""

from cluster.monitoring.metric_table import Exporter, Metric, metrics

SERIES = {series: metric for metric in metrics().values() for series in metric.series}
"""Metrics by their names in Prometheus."""


def metrics_of(exporter: Exporter) -> list[Metric]:
    return [metric for metric in metrics().values() if metric.exporter is exporter]

"""Exports the metrics of one process: set in a registry of their own, and copied to Ray's metrics
every few seconds.

Ray's own classes would take 4.6 µs for each token where these take 1.3 (a copy is 0.5 ms for a
replica), and know a histogram's sum only by the middle of its buckets. Each series becomes a gauge
of Ray's with its value: so sums are exact, and no series outlives its process for long. `rate` and
`histogram_quantile` ignore a series' type.
"""

import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import prometheus_client as prometheus
from ray.util.metrics import Gauge

from cluster.metrics.histogram import Histogram
from cluster.metrics.metric_table import Exporter, Metric, MetricKind, metrics

PUBLISH_INTERVAL_S = 2.0  # Ray passes values on every 10 s
MAX_VERSIONS = 4  # with series of their own: two that are loaded, and the last ones before

Counted = TypeVar("Counted")


class Metrics:
    """The metrics of one exporter in the table."""

    def __init__(self, exporter: Exporter, **labels: str) -> None:
        """`labels` are the exporter's common ones."""
        self.collectors = prometheus.CollectorRegistry()
        self._labels = labels
        self._metrics = {
            name: self._make(metric)
            for name, metric in metrics().items()
            if metric.exporter is exporter
        }
        self._gauges: dict[str, Gauge] = {}

    def of(self, name: str, **labels: str) -> Any:
        """Returns the counter, gauge or histogram of that name and these labels, which is exported
        from now on."""
        return self._metrics[name].labels(**self._labels, **labels)

    def publish(self, **labels: str) -> None:
        """Gives Ray the values, with `labels` added."""
        for family in self.collectors.collect():
            for sample in family.samples:
                if sample.name.endswith("_created"):
                    continue
                # Ray refuses vLLM's colons
                name, tags = sample.name.replace(":", "_"), {**sample.labels, **labels}
                if name not in self._gauges:
                    self._gauges[name] = Gauge(
                        name, description=family.documentation, tag_keys=tuple(tags)
                    )
                self._gauges[name].set(sample.value, tags=tags)

    def end(self, **labels: str) -> None:
        """Ends the series with these labels. Ray forgets them within some of its reports."""
        for name, metric in self._metrics.items():
            if labels.keys() <= set(metrics()[name].all_labels):
                metric.remove_by_labels(labels)

    def keep_published(self) -> NoReturn:
        """Publishes in a thread of its own while the process lives."""
        while True:
            time.sleep(PUBLISH_INTERVAL_S)
            self.publish()

    def _make(self, metric: Metric) -> Any:
        arguments, registry = (metric.name, metric.help, metric.all_labels), self.collectors
        match metric.kind:
            case MetricKind.HISTOGRAM:
                return Histogram(*arguments, bounds=metric.buckets, registry=registry)
            case MetricKind.COUNTER:
                return prometheus.Counter(*arguments, registry=registry)
            case MetricKind.GAUGE:
                return prometheus.Gauge(*arguments, registry=registry)


def by_version(metrics: Metrics, make: Callable[[str], Counted]) -> Callable[[str], Counted]:
    """Returns a function that gives what is counted for a version of the model, which `make`
    returns for a new one. An endpoint that follows a run sees any number of them; only the
    `MAX_VERSIONS` that were used last have series."""
    kept: dict[str, Counted] = {}  # the one used last is the last one

    def of(version: str) -> Counted:
        counted = kept.pop(version, None)
        kept[version] = counted = make(version) if counted is None else counted
        if len(kept) > MAX_VERSIONS:
            oldest = next(iter(kept))
            del kept[oldest]
            metrics.end(version=oldest)
        return counted

    return of

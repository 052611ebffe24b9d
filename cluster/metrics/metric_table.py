"""The table of all metrics that raymill exports and its dashboards and alerts read: `metrics.yaml`.

There are no others: `metric_export.py` refuses a name that is not there, and no panel or rule reads
one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path

import yaml


class MetricKind(StrEnum):
    COUNTER = "counter"  # only grows while its process lives
    GAUGE = "gauge"  # the value now
    HISTOGRAM = "histogram"


class Exporter(StrEnum):
    """The process that exports a metric, which reaches Prometheus through the metrics port of its
    Ray node."""

    LAUNCHER = "launcher"  # the driver of jobs.pretrain, from the run's ledger
    DATA = "data"  # the driver of a stage that reads a corpus
    REPLICA = "replica"  # each replica of the endpoint
    PROXY = "proxy"  # each HTTP proxy of the endpoint
    RAY = "ray"  # Ray itself: only those that dashboards and alerts read


COMMON_LABELS: dict[Exporter, tuple[str, ...]] = {
    Exporter.LAUNCHER: ("run",),
    Exporter.DATA: ("stage",),
    Exporter.REPLICA: ("model_name", "replica"),  # beside `application`, which Ray Serve knows
    Exporter.PROXY: (),
    Exporter.RAY: (),
}


@dataclass(frozen=True)
class Metric:
    name: str  # as exported, without _total
    kind: MetricKind
    exporter: Exporter
    unit: str
    help: str
    labels: Sequence[str] = ()  # beside the exporter's common ones
    values: Sequence[str] = ()  # of its last label, if they are few and known
    buckets: Sequence[float] = ()  # upper bounds, of a histogram

    @property
    def all_labels(self) -> tuple[str, ...]:
        return (*COMMON_LABELS[self.exporter], *self.labels)


@cache
def metrics() -> dict[str, Metric]:
    """Returns the table, by name."""
    table = yaml.safe_load(Path(__file__).with_name("metrics.yaml").read_text(encoding="utf-8"))
    return {
        name: Metric(name, MetricKind(kind), Exporter(exporter), **fields)
        for exporter, by_kind in table.items()
        for kind, by_name in by_kind.items()
        for name, fields in by_name.items()
    }

"""The page of all metrics."""

from cluster.metrics.metric_table import COMMON_LABELS, Exporter, Metric, metrics
from tests.reference.markdown import MADE, cell, code, listed, sentence, table

_INTRODUCTION = """\
# Metrics

Prometheus finds all of them at the metrics port of each Ray node, and those of a replica also at `GET /metrics` of the
endpoint. There are no others, besides Ray's own and, where vLLM computes, vLLM's own. The names of counters end in `_total`
there. Serving's metrics have vLLM's names; where vLLM counts requests, these count sequences. [The how-to
page](../how-to/monitor.md) says how to collect them, and which dashboards and alerts read them.

"""
_TITLES = {
    Exporter.LAUNCHER: ("Training", "Exported by the launcher of a run, from its ledger."),
    Exporter.DATA: ("Data", "Exported by the driver of a stage that reads a corpus."),
    Exporter.REPLICA: ("Replicas of the endpoint", "Exported by each replica."),
    Exporter.PROXY: ("Proxies of the endpoint", "Exported by each HTTP proxy."),
    Exporter.RAY: ("Ray", "Ray's own metrics that the dashboards and alerts read."),
}


def _row(metric: Metric) -> list[str]:
    labels = ", ".join(map(code, metric.labels))
    if metric.values:
        labels += f" ({', '.join(metric.values)})"
    unit = metric.unit.removeprefix("suffix: ").replace("short", "")
    about = cell(sentence(metric.help))
    return [code(metric.name), about, listed(metric.kind.value, unit), labels]


def page() -> str:
    text = MADE + _INTRODUCTION
    for exporter, (title, about) in _TITLES.items():
        common = ", ".join(map(code, COMMON_LABELS[exporter]))
        every = f" Every one has the labels {common}." if common else ""
        rows = [_row(metric) for metric in metrics().values() if metric.exporter is exporter]
        text += f"## {title}\n\n{about}{every}\n\n"
        text += table(("metric", "meaning", "kind, unit", "labels"), rows)
    return text

"""Every metric of the table goes from a process's registry through Ray's metrics to a real
Prometheus."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray

from cluster.metrics.metric_export import Metrics
from cluster.metrics.metric_table import COMMON_LABELS, Exporter, MetricKind
from tests.local_ray import local_ray
from tests.metric_series import SERIES, metrics_of
from tests.prometheus import needs_prometheus, prometheus
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, needs_prometheus]

OURS = tuple(exporter for exporter in Exporter if exporter is not Exporter.RAY)


@pytest.fixture
def metrics_port() -> Iterator[int]:
    with local_ray(num_cpus=1, _system_config={"metrics_report_interval_ms": 1000}):
        yield ray.nodes()[0]["MetricsExportPort"]


def test_prometheus_gets_every_metric_with_its_value(metrics_port: int, tmp_path: Path) -> None:
    exporters = {of: Metrics(of, **dict.fromkeys(COMMON_LABELS[of], "x")) for of in OURS}
    for exporter, metrics in exporters.items():
        for metric in metrics_of(exporter):
            child = metrics.of(metric.name, **dict.fromkeys(metric.labels, "y"))
            child.observe(0.03) if metric.kind is MetricKind.HISTOGRAM else child.inc(12.5)
    ours = {name for name, metric in SERIES.items() if metric.exporter in OURS}
    targets = tmp_path / "targets.json"
    targets.write_text(json.dumps([{"targets": [f"127.0.0.1:{metrics_port}"]}]))
    with prometheus(tmp_path, scrape_targets=targets) as server:

        def all_have_come() -> bool:
            for metrics in exporters.values():
                metrics.publish()
            return ours <= server.names()

        wait_until(all_have_come, timeout_s=60)
        for name in ours - {name for name in ours if name.endswith(("_bucket", "_count", "_sum"))}:
            # On a busy machine a scrape may be late, after which Prometheus takes a series for
            # stale.
            query = f"last_over_time({name}[1h])"
            wait_until(lambda query=query: server.get("query", query=query)["result"])
            (series,) = server.get("query", query=query)["result"]
            assert float(series["value"][1]) == 12.5
            assert set(SERIES[name].all_labels) <= series["metric"].keys()
        latency = "ray_vllm_inter_token_latency_seconds"
        for query, expected in (
            (f"{latency}_sum[1h]", 0.03),
            (f'{latency}_bucket{{le="0.05"}}[1h]', 1),
            (f"{latency}_count[1h]", 1),
        ):
            (series,) = server.get("query", query=f"last_over_time({query})")["result"]
            assert float(series["value"][1]) == expected


def test_an_ended_version_leaves_the_node_s_metrics(metrics_port: int) -> None:
    exported = Metrics(Exporter.PROXY)
    exported.of("raymill:version_answers", version="old", outcome="ok").inc()
    exported.of("raymill:version_answers", version="new", outcome="ok").inc()

    def versions() -> set[str]:
        exported.publish()
        text = httpx.get(f"http://127.0.0.1:{metrics_port}/metrics", timeout=limit_s(30)).text
        return set(
            re.findall(r'^ray_raymill_version_answers_total{.*version="(\w+)"', text, re.MULTILINE)
        )

    wait_until(lambda: versions() == {"old", "new"}, timeout_s=60)
    exported.end(version="old")
    wait_until(lambda: versions() == {"new"}, timeout_s=60)

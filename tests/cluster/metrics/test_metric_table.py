"""The metric table against the code: every name is exported by one process, and nothing is exported
besides."""

import re
from pathlib import Path
from typing import get_args

import pytest

from cluster.metrics.metric_export import MAX_VERSIONS, Metrics, by_version
from cluster.metrics.metric_table import COMMON_LABELS, Exporter, MetricKind, metrics
from jobs.run.history import UNTIMED
from jobs.workers.failures import Kind as FailureKind
from raymill.phases import REST, Phase
from serving.api.key_metrics import KeyMetrics, KeyRefusal
from serving.api.metrics import ABORTED, Role
from serving.delivery.promotion import Phase as PromotionPhase
from serving.delivery.promotion import Result
from serving.engine.messages import FinishReason
from serving.proxy.ending import AnswerOutcome
from tests.dashboards.panels import ROLES
from tests.metric_series import SERIES, metrics_of, series_of
from tests.repository import REPOSITORY

OURS = tuple(exporter for exporter in Exporter if exporter is not Exporter.RAY)


def test_names_are_there_once() -> None:
    written = (
        (REPOSITORY / "cluster/metrics/metrics.yaml").read_text(encoding="utf-8").count("unit: ")
    )
    assert len(metrics()) == written > 50
    assert len(SERIES) == sum(len(series_of(metric)) for metric in metrics().values())


@pytest.mark.parametrize("exporter", OURS)
def test_what_an_exporter_has_leaves_under_the_names_of_the_table(exporter: Exporter) -> None:
    exported = Metrics(exporter, **dict.fromkeys(COMMON_LABELS[exporter], "x"))
    for metric in metrics_of(exporter):
        child = exported.of(metric.name, **dict.fromkeys(metric.labels, "y"))
        child.observe(1) if metric.kind is MetricKind.HISTOGRAM else child.inc(1)
    samples = [sample for family in exported.collectors.collect() for sample in family.samples]
    names = {
        f"ray_{sample.name.replace(':', '_')}"
        for sample in samples
        if not sample.name.endswith("_created")
    }
    assert names == {name for metric in metrics_of(exporter) for name in series_of(metric)}
    exported.publish()  # Ray takes names, labels and values


def test_a_name_that_is_not_in_the_table_or_not_the_exporters_is_refused() -> None:
    exported = Metrics(Exporter.LAUNCHER, run="x")
    for name in ("raymill_train_nonsense", "vllm:prompt_tokens"):
        with pytest.raises(KeyError):
            exported.of(name)


def test_nothing_else_makes_metrics() -> None:
    makers = {"ray.util.metrics", "ray.serve.metrics", "prometheus_client"}
    making = {
        path.relative_to(REPOSITORY).as_posix()
        for path in sources("cluster", "jobs", "serving")
        if makers & set(re.findall(r"^(?:from|import) ([\w.]+)", path.read_text(), re.MULTILINE))
    }
    passing_on = {
        "serving/api/ingress.py",
        "serving/api/metrics.py",
        "serving/engine_process/run_engine.py",
    }
    # What is made there, and what vLLM makes
    made = {f"cluster/metrics/{name}.py" for name in ("metric_export", "histogram")}
    assert making == made | passing_on


def test_the_endpoints_code_has_each_of_its_metrics() -> None:
    """Those of runs and data: tests/jobs/watching/test_run_metrics.py."""
    text = "".join(path.read_text() for path in sources("serving"))
    for metric in [*metrics_of(Exporter.REPLICA), *metrics_of(Exporter.PROXY)]:
        assert f'.of("{metric.name}"' in text


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")]


def test_the_known_values_of_labels_are_those_of_the_code() -> None:
    assert set(metrics()["raymill_train_phase_seconds"].values) == {*get_args(Phase), REST, UNTIMED}
    assert set(metrics()["raymill_train_failures"].values) == {*FailureKind, "hang"}
    assert set(metrics()["vllm:request_success"].values) == {*FinishReason, ABORTED}
    assert set(metrics()["raymill:http_answers"].values) == set(AnswerOutcome)
    assert set(metrics()["raymill:version_answers"].values) == set(AnswerOutcome)
    assert set(metrics()["raymill:promotion_phase"].values) == set(PromotionPhase)
    assert set(metrics()["raymill:last_promotion"].values) == set(get_args(Result))
    assert set(metrics()["raymill:version_role"].values) == set(Role) == set(ROLES)
    assert set(metrics()["raymill:key_refused"].values) == set(KeyRefusal)


@pytest.mark.parametrize("exporter", [Exporter.REPLICA, Exporter.PROXY])
def test_the_series_of_a_process_are_bounded_however_many_versions_it_serves(
    exporter: Exporter,
) -> None:
    exported = Metrics(exporter, **dict.fromkeys(COMMON_LABELS[exporter], "x"))

    def make(version: str) -> None:
        for metric in (metric for metric in metrics_of(exporter) if "key" not in metric.labels):
            values = metric.values or ("y",)
            for value in values:
                known = dict.fromkeys(metric.labels[-1:], value) if metric.values else {}
                own = {"version": version} if "version" in metric.labels else {}
                exported.of(metric.name, **known, **own)

    of_version = by_version(exported, make)
    for number in range(50):
        of_version("live")
        of_version(str(number))
    samples = [sample for family in exported.collectors.collect() for sample in family.samples]
    versions = {sample.labels["version"] for sample in samples if "version" in sample.labels}
    assert versions == {"live", "47", "48", "49"} and len(versions) == MAX_VERSIONS
    num_series = sum(not sample.name.endswith("_created") for sample in samples)
    comment = (
        (REPOSITORY / "cluster/metrics/metrics.yaml")
        .read_text(encoding="utf-8")
        .partition("\n\n")[0]
    )
    assert re.search(rf"a {exporter}(?: has at most)? {num_series}\b", comment, re.IGNORECASE), (
        num_series
    )


def test_each_name_of_a_key_has_as_many_series_as_the_table_says() -> None:
    exported = Metrics(Exporter.REPLICA, **dict.fromkeys(COMMON_LABELS[Exporter.REPLICA], "x"))
    KeyMetrics(exported).keep({f"key-{number}" for number in range(50)})
    samples = [sample for family in exported.collectors.collect() for sample in family.samples]
    num_series = sum(not sample.name.endswith("_created") for sample in samples)
    comment = (
        (REPOSITORY / "cluster/metrics/metrics.yaml")
        .read_text(encoding="utf-8")
        .partition("\n\n")[0]
    )
    assert f"{num_series // 50} series for each name" in comment and num_series % 50 == 0

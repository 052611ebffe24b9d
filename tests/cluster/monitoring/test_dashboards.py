"""The dashboards and the files made of them: known metrics, valid queries, no overlap, distinct
colors."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import cli
from cluster.metrics.metric_table import Exporter, metrics
from cluster.monitoring.files import IN_CLUSTER_PROMETHEUS, documents
from tests.dashboards.make_dashboards import FEW, MUTED, made
from tests.dashboards.panels import read
from tests.k8s.manifests import K8S, of_kind, render_folder
from tests.metric_series import SERIES, series_of
from tests.prometheus import needs_prometheus, prometheus, promtool

MONITORING = K8S / "monitoring"
UNITS = {"s", "bytes", "Bps", "percentunit", "percent", "short", "cps", "reqps", "decmbytes"}


def panels_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in body["panels"] if panel["type"] != "row"]


def queries() -> list[str]:
    found = [
        target["expr"]
        for body in documents().values()
        for panel in panels_of(body)
        for target in panel["targets"]
    ]
    return [
        re.sub(r"\$__rate_interval", "1m", expr).replace("$run", "r").replace("$application", "a")
        for expr in found
    ]


def test_panels_read_the_metrics_of_the_table_all_of_them_and_no_others() -> None:
    names = {name for expr in queries() for name in re.findall(r"\bray_\w+", expr)}
    assert names <= SERIES.keys()
    shown = {SERIES[name].name for name in names}
    assert shown == metrics().keys()
    with pytest.raises(KeyError):
        read({"title": "Nonsense", "metrics": ["raymill_train_nonsense"]})


@needs_prometheus
def test_prometheus_understands_every_query(tmp_path: Path) -> None:
    with prometheus(tmp_path) as server:
        for expr in queries():
            assert server.format(expr)
        with pytest.raises(AssertionError, match="parse error"):
            server.format("sum by (ray_x")


@pytest.mark.parametrize("uid", documents())
def test_a_dashboard_can_be_read(uid: str) -> None:
    body = documents()[uid]
    assert len({panel["id"] for panel in body["panels"]}) == len(body["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in body["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
    for panel in panels_of(body):
        field = panel["fieldConfig"]
        assert panel["type"] in ("timeseries", "stat")
        assert panel["description"] and panel["title"]
        assert field["defaults"]["unit"] in UNITS or field["defaults"]["unit"].startswith(
            "suffix: "
        )
        assert all(target["legendFormat"] for target in panel["targets"])
        legends = [target["legendFormat"] for target in panel["targets"]]
        assert len(set(legends)) == len(legends)
        colors = re.findall(r"#[0-9A-F]{6}", json.dumps(field))
        assert colors and set(colors) <= {*FEW, *MUTED}
        by_name = [rule["properties"][0]["value"]["fixedColor"] for rule in field["overrides"]]
        assert len(set(by_name)) == min(len(by_name), len(MUTED)), "two series of one color"
    variables = {variable["name"] for variable in body["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(body["panels"] + body["annotations"]["list"])))
    assert used - {"__rate_interval"} <= variables
    assert len(json.dumps(body)) < 256 << 10  # kubectl's bound for what it applies


def test_metrics_of_runs_are_chosen_by_run() -> None:
    for expr in queries():
        for name, chosen in re.findall(r"\b(ray_\w+)({[^}]*})?", expr):
            assert SERIES[name].exporter is not Exporter.LAUNCHER or 'run="r"' in chosen, expr
    assert series_of(metrics()["vllm:prompt_tokens"]) == ("ray_vllm_prompt_tokens_total",)


def test_the_files_in_k8s_are_what_make_dashboards_makes() -> None:
    committed = {path: (MONITORING / path).read_text(encoding="utf-8") for path in made()}
    assert made() == committed, "run: make dashboards"
    assert len(documents()) == sum(path.startswith("dashboards/") for path in committed), (
        "a dashboard that is not made"
    )


@pytest.mark.parametrize("url", [None, "http://here:9090"])
def test_export_copies_the_files_with_the_address_of_prometheus(
    url: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [] if url is None else ["--prometheus-url", url]
    assert cli.main(["dashboards", "export", str(tmp_path), *given]) == 0
    written = {
        path.relative_to(tmp_path): path.read_text()
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    committed = {
        path.relative_to(MONITORING): path.read_text()
        for path in MONITORING.rglob("*")
        if path.is_file()
    }
    changed = [path.as_posix() for path in committed if written.pop(path) != committed[path]]
    assert written == {} and changed == ([] if url is None else ["provisioning/datasource.yaml"])
    (source,) = yaml.safe_load((tmp_path / "provisioning/datasource.yaml").read_text())[
        "datasources"
    ]
    assert source["url"] == (url or IN_CLUSTER_PROMETHEUS)


@needs_prometheus
def test_prometheus_takes_the_files(tmp_path: Path) -> None:
    config = {"scrape_config_files": [str(MONITORING / "prometheus/scrape.yaml")]}
    config |= {"rule_files": [str(MONITORING / "prometheus/rules.yaml")]}  # type: ignore[dict-item]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    promtool(tmp_path, "check", "config", "prometheus.yml")


def test_the_component_makes_what_grafana_s_sidecar_and_the_operator_look_for(
    tmp_path: Path,
) -> None:
    kustomization = {
        "resources": [],
        "namespace": "raymill",
        "components": [
            os.path.relpath(folder, tmp_path) for folder in (MONITORING, MONITORING / "operator")
        ],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    objects = render_folder(tmp_path)
    assert {body["metadata"]["namespace"] for body in objects} == {"raymill"}
    config_maps = {body["metadata"]["name"]: body for body in of_kind(objects, "ConfigMap")}
    dashboards = {
        name
        for name, body in config_maps.items()
        if body["metadata"]["labels"].get("grafana_dashboard") == "1"
    }
    assert dashboards == documents().keys()
    for uid in dashboards:
        assert json.loads(config_maps[uid]["data"][f"{uid}.json"]) == documents()[uid]
    (source,) = yaml.safe_load(
        config_maps["raymill-grafana-datasource"]["data"]["datasource.yaml"]
    )["datasources"]
    assert source["uid"] == "raymill-prometheus"
    (rule,) = of_kind(objects, "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((MONITORING / "prometheus/rules.yaml").read_text())
    (monitor,) = of_kind(objects, "PodMonitor")
    assert monitor["spec"]["selector"]["matchLabels"] == {"raymill/role": "node"}

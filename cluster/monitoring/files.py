"""The files of `raymill dashboards export`: dashboards and alerts for Grafana, Prometheus and kustomize.

`k8s/monitoring` is such a folder. What is made of code is written anew; the rest is copied as it stands there.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from cluster.monitoring.dashboards import documents
from cluster.monitoring.grafana import data_source
from cluster.settings.code_folders import CODE_ROOT

IN_CLUSTER_PROMETHEUS = "http://prometheus-operated.monitoring.svc:9090"
"""The address that Prometheus' operator gives it."""

_FOLDER = CODE_ROOT / "cluster" / "k8s" / "monitoring"  # through a link, so that a wheel has it too
_LABELS = {"app.kubernetes.io/part-of": "raymill", "app.kubernetes.io/component": "monitoring"}


def files(prometheus_url: str = IN_CLUSTER_PROMETHEUS) -> dict[str, str]:
    """Returns the content of each file by its path."""
    texts = {path.relative_to(_FOLDER).as_posix(): path.read_text("utf-8") for path in _FOLDER.rglob("*.yaml")}
    rules = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "raymill", "labels": _LABELS},
        "spec": yaml.safe_load(texts["prometheus/rules.yaml"]),
    }
    source = {"apiVersion": 1, "datasources": [data_source(prometheus_url)]}
    texts["operator/prometheus-rule.yaml"] = _yaml("The alerts, for Prometheus' operator.", rules)
    texts["provisioning/datasource.yaml"] = _yaml("Grafana's data source.", source)
    return texts | {f"dashboards/{uid}.json": _json(body) for uid, body in documents().items()}


def write_files(folder: Path, prometheus_url: str = IN_CLUSTER_PROMETHEUS) -> list[str]:
    """Writes the files and returns their paths."""
    written = files(prometheus_url)
    for path, text in written.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return sorted(written)


def _yaml(about: str, body: dict[str, Any]) -> str:
    text = yaml.safe_dump(body, sort_keys=False, width=120, allow_unicode=True)
    return f"# {about}\n# Made by `raymill dashboards export`: change its source, not this file.\n{text}"


def _json(dashboard: dict[str, Any]) -> str:
    """Returns the dashboard with one panel per line, so that changes are readable."""
    panels = ",\n".join(json.dumps(panel) for panel in dashboard["panels"])
    return json.dumps(dashboard | {"panels": []}, indent=1).replace('"panels": []', f'"panels": [\n{panels}\n]') + "\n"

"""The files of `raymill dashboards export`: dashboards and alerts for Grafana, Prometheus and kustomize.

`k8s/monitoring` is such a folder.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cluster.monitoring.alerts import rules
from cluster.monitoring.dashboards import FOLDER_TITLE, documents
from cluster.monitoring.grafana import data_source

IN_CLUSTER_PROMETHEUS = "http://prometheus-operated.monitoring.svc:9090"
"""The address that Prometheus' operator gives it."""

SCRAPE_INTERVAL = "15s"

_MADE = "# Made by `raymill dashboards export`: change the code, not this file."
_LABELS = {"app.kubernetes.io/part-of": "raymill", "app.kubernetes.io/component": "monitoring"}
_NODES = {"raymill/role": "node"}


def files(prometheus_url: str = IN_CLUSTER_PROMETHEUS) -> dict[str, str]:
    """Returns the content of each file by its path."""
    texts = {f"dashboards/{uid}.json": _json(body) for uid, body in documents().items()}
    parts = {
        "provisioning/dashboards.yaml": ("Grafana's provider of the folder dashboards/.", _provider()),
        "provisioning/datasource.yaml": (
            "Grafana's data source.",
            {"apiVersion": 1, "datasources": [data_source(prometheus_url)]},
        ),
        "prometheus/rules.yaml": ("The alerts, for `rule_files`.", rules()),
        "prometheus/scrape.yaml": ("Every Ray node in Kubernetes, for `scrape_config_files`.", _scrape()),
        "operator/pod-monitor.yaml": ("Every Ray node, for Prometheus' operator.", _pod_monitor()),
        "operator/prometheus-rule.yaml": ("The alerts, for Prometheus' operator.", _object("PrometheusRule", rules())),
        "operator/kustomization.yaml": (
            "For clusters that have Prometheus' operator.",
            _component(resources=["pod-monitor.yaml", "prometheus-rule.yaml"]),
        ),
        "kustomization.yaml": (
            "A component: ConfigMaps that Grafana's sidecar finds by their labels, and Prometheus' files.",
            _component(configMapGenerator=list(_config_maps())),
        ),
    }
    for path, (about, body) in parts.items():
        text = yaml.safe_dump(body, sort_keys=False, width=120, allow_unicode=True)
        texts[path] = f"# {about}\n{_MADE}\n{text}"
    return texts


def write_files(folder: Path, prometheus_url: str = IN_CLUSTER_PROMETHEUS) -> list[str]:
    """Writes the files and returns their paths."""
    written = files(prometheus_url)
    for path, text in written.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return sorted(written)


def _json(dashboard: dict[str, Any]) -> str:
    """Returns the dashboard with one panel per line, so that changes are readable."""
    panels = ",\n".join(json.dumps(panel) for panel in dashboard["panels"])
    return json.dumps(dashboard | {"panels": []}, indent=1).replace('"panels": []', f'"panels": [\n{panels}\n]') + "\n"


def _component(**fields: Any) -> dict[str, Any]:
    return {"apiVersion": "kustomize.config.k8s.io/v1alpha1", "kind": "Component", **fields}


def _config_maps() -> Iterator[dict[str, Any]]:
    def config_map(name: str, *paths: str, **labels: str) -> dict[str, Any]:
        # Sidecars know a ConfigMap by its name, so it has no hash.
        options: dict[str, Any] = {"labels": {**_LABELS, **labels}, "disableNameSuffixHash": True}
        if "grafana_dashboard" in labels:
            options["annotations"] = {"grafana_folder": FOLDER_TITLE}
        return {"name": name, "files": list(paths), "options": options}

    for uid in documents():
        yield config_map(uid, f"dashboards/{uid}.json", grafana_dashboard="1")
    yield config_map("raymill-grafana-datasource", "provisioning/datasource.yaml", grafana_datasource="1")
    yield config_map("raymill-prometheus", "prometheus/rules.yaml", "prometheus/scrape.yaml")


def _provider() -> dict[str, Any]:
    provider: dict[str, Any] = {"name": "raymill", "folder": FOLDER_TITLE, "type": "file", "allowUiUpdates": False}
    provider["options"] = {"path": "/var/lib/grafana/dashboards/raymill"}
    return {"apiVersion": 1, "providers": [provider]}


def _scrape() -> dict[str, Any]:
    relabel = [
        {"source_labels": ["__meta_kubernetes_pod_label_raymill_role"], "regex": "node", "action": "keep"},
        {"source_labels": ["__meta_kubernetes_pod_ip"], "target_label": "__address__", "replacement": "$1:8080"},
        {"source_labels": ["__meta_kubernetes_pod_label_ray_io_cluster"], "target_label": "ray_cluster"},
    ]
    job: dict[str, Any] = {"job_name": "raymill", "scrape_interval": SCRAPE_INTERVAL}
    job |= {"kubernetes_sd_configs": [{"role": "pod"}], "relabel_configs": relabel}
    return {"scrape_configs": [job]}


def _pod_monitor() -> dict[str, Any]:
    relabel = [{"sourceLabels": ["__meta_kubernetes_pod_label_ray_io_cluster"], "targetLabel": "ray_cluster"}]
    endpoint = {"port": "metrics", "interval": SCRAPE_INTERVAL, "relabelings": relabel}  # a name that KubeRay gives
    return _object("PodMonitor", {"selector": {"matchLabels": _NODES}, "podMetricsEndpoints": [endpoint]})


def _object(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": "raymill", "labels": _LABELS}
    return {"apiVersion": "monitoring.coreos.com/v1", "kind": kind, "metadata": metadata, "spec": spec}

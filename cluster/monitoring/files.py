"""The files of `k8s/monitoring`: dashboards, alerts and scrape settings for Grafana, Prometheus and
kustomize.

`make dashboards` makes those that follow from others, such as the dashboards from the metric table.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from cluster.settings.code_folders import CODE_ROOT

IN_CLUSTER_PROMETHEUS = "http://prometheus-operated.monitoring.svc:9090"
"""The address that Prometheus' operator gives it."""

_FOLDER = CODE_ROOT / "cluster" / "k8s" / "monitoring"  # through a link, so that a wheel has it too

Json = dict[str, Any]


def documents() -> dict[str, Json]:
    """Returns each dashboard's JSON by its uid."""
    return {
        path.stem: json.loads(path.read_text("utf-8"))
        for path in sorted(_FOLDER.glob("dashboards/*.json"))
    }


def data_source(prometheus_url: str) -> Json:
    """Returns Grafana's data source for a Prometheus."""
    declared = yaml.safe_load((_FOLDER / "provisioning/datasource.yaml").read_text("utf-8"))
    return dict(declared["datasources"][0], url=prometheus_url)


def write_files(folder: Path, prometheus_url: str) -> list[str]:
    """Copies the files, with the address of Prometheus in them, and returns their paths."""
    texts = {
        path.relative_to(_FOLDER).as_posix(): path.read_text("utf-8")
        for path in _FOLDER.rglob("*.*")
    }
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(
            text.replace(IN_CLUSTER_PROMETHEUS, prometheus_url), encoding="utf-8"
        )
    return sorted(texts)

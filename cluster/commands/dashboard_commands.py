"""`raymill dashboards push|diff|export`."""

import argparse
from pathlib import Path
from typing import Any

from cluster.monitoring.files import IN_CLUSTER_PROMETHEUS, documents, write_files
from cluster.monitoring.grafana import Grafana, differences


def push(arguments: argparse.Namespace) -> dict[str, Any]:
    grafana = Grafana.from_environment()
    result = {"folder": grafana.push_folder()}
    if arguments.prometheus_url:
        result["data source"] = grafana.push_data_source(arguments.prometheus_url)
    return result | {uid: grafana.push_dashboard(document) for uid, document in documents().items()}


def diff(arguments: argparse.Namespace) -> dict[str, Any]:
    grafana, result = Grafana.from_environment(), dict[str, Any]()
    for uid, document in documents().items():
        there = grafana.dashboard(uid)
        result[uid] = ["missing"] if there is None else differences(document, there)
    arguments.is_bad = any(result.values())
    return {"equal": not arguments.is_bad, **result}


def export(arguments: argparse.Namespace) -> dict[str, Any]:
    folder = Path(arguments.folder)
    return {"folder": str(folder), "files": write_files(folder, arguments.prometheus_url or IN_CLUSTER_PROMETHEUS)}

"""`raymill dashboards push|diff|export`: from their parsed arguments to the result that is printed."""

import argparse
from pathlib import Path
from typing import Any

from cluster.monitoring.dashboards import documents
from cluster.monitoring.files import IN_CLUSTER_PROMETHEUS, write_files
from cluster.monitoring.grafana import Grafana, differences
from cluster.stages.stage_module import ShownError


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
    equal = not any(result.values())
    if not equal:
        arguments.show({"equal": equal, **result})
        raise ShownError("Grafana's dashboards differ")
    return {"equal": equal, **result}


def export(arguments: argparse.Namespace) -> dict[str, Any]:
    folder = Path(arguments.folder)
    return {"folder": str(folder), "files": write_files(folder, arguments.prometheus_url or IN_CLUSTER_PROMETHEUS)}

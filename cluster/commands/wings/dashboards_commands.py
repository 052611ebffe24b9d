"""The commands for Grafana's dashboards."""

from pathlib import Path
from typing import Any

from cluster.commands.arguments import PROMETHEUS
from cluster.commands.command import Argument, Arguments, Command, CommandSection, Result

_FOLDER = Argument[Path]("folder", "such as k8s/monitoring", parse=Path)


def dashboards_push(arguments: Arguments) -> Result:
    from cluster.monitoring.files import documents
    from cluster.monitoring.grafana import Grafana

    grafana = Grafana.from_environment()
    pushed = {"folder": grafana.push_folder()}
    if url := arguments[PROMETHEUS]:
        pushed["data source"] = grafana.push_data_source(url)
    return Result(
        pushed | {uid: grafana.push_dashboard(document) for uid, document in documents().items()}
    )


def dashboards_diff(arguments: Arguments) -> Result:
    from cluster.monitoring.files import documents
    from cluster.monitoring.grafana import Grafana, differences

    grafana, result = Grafana.from_environment(), dict[str, Any]()
    for uid, document in documents().items():
        there = grafana.dashboard(uid)
        result[uid] = ["missing"] if there is None else differences(document, there)
    differ = any(result.values())
    return Result({"equal": not differ, **result}, is_bad=differ)


def dashboards_export(arguments: Arguments) -> Result:
    from cluster.monitoring.files import IN_CLUSTER_PROMETHEUS, write_files

    folder = arguments[_FOLDER]
    return Result(
        {
            "folder": str(folder),
            "files": write_files(folder, arguments[PROMETHEUS] or IN_CLUSTER_PROMETHEUS),
        }
    )


DASHBOARDS = CommandSection(
    "jobs, clusters and storage",
    (
        Command(
            "dashboards push",
            "update Grafana to this version's dashboards",
            dashboards_push,
            [PROMETHEUS],
        ),
        Command(
            "dashboards diff", "list where Grafana's differ; exit code 1 if any do", dashboards_diff
        ),
        Command(
            "dashboards export",
            "write them, the alerts and the scrape settings as files for Grafana, Prometheus and kustomize",
            dashboards_export,
            [_FOLDER, PROMETHEUS],
        ),
    ),
    groups={
        "dashboards": (
            "manage dashboards and alerts (GRAFANA_URL, and GRAFANA_TOKEN or GRAFANA_TOKEN_FILE, name Grafana)"
        ),
    },
)

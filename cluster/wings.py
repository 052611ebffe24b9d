"""The wings of raymill: folders that the rest does without.

Training, saving, the engine, the API and the heart import none of them (import-linter holds that).
`WINGS` says of each what it adds: commands, routes, and what watches a run or an endpoint. Without a
wing's folder and its entry here the rest works as before.

What a wing adds is named as `module:name`, and imported where it is wanted: a command line and each
process of an endpoint pay for their own part alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True)
class Wing:
    """A folder, and the names of its parts in the table."""

    folder: str
    needs: tuple[str, ...] = ()
    """Wings that it stands on."""
    commands: str | None = None
    """A `Section`, whose commands are listed in the section of that title."""
    routes: str | None = None
    """Adds routes to a replica: called with its application, its `AskedRoutes` and its
    `CompletionService`."""
    endpoint_check: str | None = None
    """Called with the settings before an endpoint is deployed. Raises `UserError`."""
    run_watcher: str | None = None
    """Watches a run: called with its plan and the time of its last snapshot, and entered for as
    long as the run trains."""
    run_report: str | None = None
    """Reports a run whose pipeline has ended: called with the run's storage. Returns figures."""
    jobs: str | None = None
    """A `JobBackend`: called with the place, None for the usual one, and what it is described by."""
    annotator: str | None = None
    """Returns what annotates the moments of a run or an endpoint, or None where nothing does."""


WINGS = (
    Wing(
        "jobs.report",
        needs=("model.insight",),
        commands="cluster.commands.wings.report_commands:REPORT",
        run_report="jobs.report.make_report:make_report",
    ),
    Wing(
        "jobs.proof", needs=("jobs.report",), commands="cluster.commands.wings.proof_commands:PROOF"
    ),
    Wing(
        "jobs.forgetting",
        needs=("jobs.proof",),
        commands="cluster.commands.wings.forget_commands:FORGET",
    ),
    Wing(
        "jobs.trace", needs=("jobs.proof",), commands="cluster.commands.wings.trace_commands:TRACE"
    ),
    Wing(
        "jobs.watching",
        commands="cluster.commands.wings.track_commands:TRACK",
        run_watcher="jobs.watching.run_watcher:watching",
    ),
    Wing(
        "cluster.kube",
        commands="cluster.commands.wings.kube_commands:KUBE",
        jobs="cluster.kube.kube_jobs:KubeJobs",
    ),
    Wing(
        "cluster.monitoring",
        commands="cluster.commands.wings.dashboards_commands:DASHBOARDS",
        annotator="cluster.monitoring.grafana:Annotator.from_environment",
    ),
    Wing("serving.pages", routes="serving.pages.chat_page:add_chat_page"),
    Wing(
        "serving.xray",
        needs=("serving.pages", "model.insight"),
        routes="serving.xray.routes:add_xray_routes",
        endpoint_check="serving.xray.trace:require_traced",
    ),
    Wing("model.insight"),
)


def added(name_of: Callable[[Wing], str | None]) -> list[Any]:
    """Returns what the wings add of one kind, in the order of the table: `added(lambda wing:
    wing.routes)`."""
    return [resolve_name(name) for wing in WINGS if (name := name_of(wing))]

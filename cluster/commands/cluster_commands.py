"""The commands of `raymill` for jobs, clusters and storage. Each imports what it alone needs."""

import shlex
from pathlib import Path
from typing import Any

from cluster.commands.arguments import (
    ADDRESS,
    ALL_LAUNCHES,
    COMPONENT,
    CONFIG,
    FOLLOW_LOG,
    GROUP,
    KEEPS_ON,
    KUBE_OBJECT,
    KUBE_OBJECTS,
    KUBERAY,
    LEAST_PODS,
    LET_CHECK,
    MOST_PODS,
    NAMESPACE,
    NO_PUBLISH,
    ONLY_CHECK,
    OVERLAY,
    OVERLAYS_NAMESPACE,
    PROMETHEUS,
    RESUME,
    RUN_ID,
    RUN_SETTINGS,
    SHOWS_RAY,
    STAGE,
    STORAGE,
    SUSPEND,
    TOKEN_FILE,
    YES,
)
from cluster.commands.command import Argument, Arguments, Command, OneOf, Result, Section
from cluster.commands.completion import run_ids
from cluster.output.progress import say
from cluster.output.result_text import counted, table
from cluster.storage.uris import Storage, absolute_uri, open_storage
from raymill.errors import UserError

_PLACE = Argument[str]("uri", "a path, file:// or s3://bucket/prefix", metavar="URI")
_NODE = Argument[str | None](
    "node", "its name; without one, those that are left out are listed", nargs="?", metavar="NODE"
)
_DELETED_RUN = Argument[str | None]("run_id", "run id", nargs="?", metavar="RUN", completer=run_ids)
_ENDED = Argument[str | None](
    "--endpoint",
    "forget this endpoint, which has ended: its runs can be deleted then",
    metavar="NAME",
)
_FOLDER = Argument[Path]("folder", "such as k8s/monitoring", parse=Path)


def submit(arguments: Arguments) -> Result:
    from cluster.commands import job_commands

    return job_commands.submit(arguments)


def list_jobs(arguments: Arguments) -> Result:
    from cluster.commands import job_commands

    return job_commands.list_jobs(arguments)


def status(arguments: Arguments) -> Result:
    from cluster.commands import job_commands

    return job_commands.status(arguments)


def logs(arguments: Arguments) -> Result:
    from cluster.commands import job_commands

    return job_commands.logs(arguments)


def stop(arguments: Arguments) -> Result:
    from cluster.commands import job_commands

    return job_commands.stop(arguments)


def cluster_render(arguments: Arguments) -> Result:
    from cluster.commands import kube_commands

    return kube_commands.render(arguments)


def cluster_apply(arguments: Arguments) -> Result:
    from cluster.commands import kube_commands

    return kube_commands.apply(arguments)


def cluster_scale(arguments: Arguments) -> Result:
    from cluster.commands import kube_commands

    return kube_commands.scale(arguments)


def cluster_status(arguments: Arguments) -> Result:
    from cluster.commands import kube_commands

    return kube_commands.status(arguments)


def cluster_why_pending(arguments: Arguments) -> Result:
    from cluster.commands import kube_commands

    return kube_commands.pending(arguments)


def cluster_quarantine(arguments: Arguments) -> Result:
    from cluster.commands import kube_commands

    return kube_commands.quarantine(arguments)


def cluster_release(arguments: Arguments) -> Result:
    from jobs.workers.left_out_nodes import left_out, take_back

    storage = open_storage(arguments[STORAGE])
    node = arguments[_NODE]
    known = {str(place["node"]): place for place in left_out(storage)}
    if node is None:
        text = table(["node", "node_id", "reason"], [*known.values()]) or "no node is left out\n"
        return Result({"left_out": [*known.values()]}, text)
    if not take_back(storage, node):
        names = f"those that are: {', '.join(known)}" if known else "no node is"
        raise UserError(f"node {node!r} is not left out under {storage.uri}; {names}")
    result, text = {"released": node}, f"node {node} gets training workers again"
    if kubernetes_node := known[node].get("kubernetes_node"):
        result["note"] = _taken_from(kubernetes_node, storage)
        text = f"{text}; {result['note']}"
    return Result(result, f"{text}\n")


def _taken_from(kubernetes_node: str, storage: Storage) -> str:
    """Takes the mark from a node of Kubernetes, if that can be done from here. Returns what came
    of it, in words."""
    from cluster.commands import kube_commands

    where = f"the node {kubernetes_node} of Kubernetes"
    try:
        marks = kube_commands.mark_nodes(storage)
    except UserError as error:
        return (
            f"{where} keeps its taint until "
            f"`raymill cluster quarantine` has run where it may change nodes: {error}"
        )
    if kubernetes_node in marks.released:
        return f"so does {where} with pods"
    if kubernetes_node not in marks.here:
        return f"{where} is not in this cluster: no taint was taken away"
    if pods := marks.left_out.get(kubernetes_node):
        return f"{where} is still left out, for {', '.join(pods)}"
    return f"{where} had no taint of this storage"


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


def storage_check(arguments: Arguments) -> Result:
    from cluster.submission.storage_check import check_storage

    uri = absolute_uri(arguments[_PLACE])
    checks, problem = check_storage(uri)
    values = {"storage": uri, "usable": not problem, "passed": checks, "problem": problem}
    return Result(values, is_bad=bool(problem))


def delete(arguments: Arguments) -> Result:
    run_id, storage_uri = arguments[_DELETED_RUN], arguments[STORAGE]
    storage = open_storage(storage_uri)
    if run_id is None:
        return _forgotten(arguments, storage)
    run = storage.child(f"runs/{run_id}")
    if "/" in run_id or not any(run.list()):
        raise UserError(f"no run {run_id} in {storage_uri}; `raymill list` shows which there are")

    from jobs.run.housekeeping import delete_run

    return _housekept(arguments, delete_run(run, storage, yes=arguments[YES]))


def _forgotten(arguments: Arguments, storage: Storage) -> Result:
    from cluster.endpoint.remembered import forget

    name = arguments[_ENDED]
    assert name is not None, "one of the two is given"
    values = forget(storage, name, yes=arguments[YES])
    if not values["checked"]:
        say(f"whether {name} has ended cannot be seen from here: its name is not an address")
    kept = ", ".join(values["kept_for_it"] or []) or "nothing"
    done = "is forgotten; it kept" if values["forgotten"] else "would be forgotten; it keeps"
    text = f"endpoint {name} {done}: {kept}\n"
    after = "" if values["forgotten"] else f"`raymill {shlex.join([*arguments.words, '--yes'])}`"
    return Result(values, text=text, next=after)


def gc(arguments: Arguments) -> Result:
    say(f"gc: looking for what no run in {arguments[STORAGE]} needs")

    from jobs.run.housekeeping import collect

    return _housekept(arguments, collect(open_storage(arguments[STORAGE]), yes=arguments[YES]))


def _housekept(arguments: Arguments, values: dict[str, Any]) -> Result:
    rows = [
        {"files": row["num_files"], "MB": row["num_bytes"] / 1e6, **row}
        for row in values["leftovers"]
    ]
    if not rows:
        return Result(values, text="nothing to delete\n")
    done = "deleted" if values["deleted"] else "would be deleted"
    total = f"{counted(len(rows), 'folder')} of {values['bytes'] / 1e6:,.1f} MB {done}\n"
    after = "" if values["deleted"] else f"`raymill {shlex.join([*arguments.words, '--yes'])}`"
    return Result(values, text=table(("files", "MB", "why", "uri"), rows) + total, next=after)


CLUSTER = Section(
    "jobs, clusters and storage",
    (
        Command(
            "submit",
            "start a stage as a background job; submitting the same run twice starts one job",
            submit,
            [
                STAGE,
                CONFIG,
                OneOf((ADDRESS, KUBERAY)),
                OVERLAYS_NAMESPACE,
                ONLY_CHECK,
                TOKEN_FILE,
                RUN_SETTINGS,
                NO_PUBLISH,
            ],
        ),
        Command(
            "list",
            "list the jobs of a storage's runs, and what they are doing",
            list_jobs,
            [TOKEN_FILE, STORAGE],
        ),
        Command(
            "status",
            "show a run's job; exit code 1 if it failed, was stopped or is lost",
            status,
            [RUN_ID, TOKEN_FILE, STORAGE],
        ),
        Command(
            "logs",
            "print what a run's job and its workers printed, even after the cluster is gone",
            logs,
            [FOLLOW_LOG, ALL_LAUNCHES, SHOWS_RAY, RUN_ID, TOKEN_FILE, STORAGE],
        ),
        Command(
            "stop",
            "save and stop a run, submitted or started by hand; the same run id resumes it",
            stop,
            [RUN_ID, TOKEN_FILE, STORAGE],
        ),
        Command(
            "cluster render",
            "print the objects of an overlay as YAML",
            cluster_render,
            [OVERLAYS_NAMESPACE, OVERLAY, COMPONENT],
        ),
        Command(
            "cluster apply",
            "apply the objects of an overlay (server-side)",
            cluster_apply,
            [OVERLAYS_NAMESPACE, OVERLAY, COMPONENT, LET_CHECK],
        ),
        Command(
            "cluster scale",
            "change how many pods a group may have, or suspend and resume all",
            cluster_scale,
            [NAMESPACE, KUBE_OBJECT, GROUP, LEAST_PODS, MOST_PODS, OneOf((SUSPEND, RESUME))],
        ),
        Command(
            "cluster status",
            "say in a sentence what each cluster, job and service does",
            cluster_status,
            [NAMESPACE, KUBE_OBJECTS],
        ),
        Command(
            "cluster why-pending",
            "say why pods do not run yet",
            cluster_why_pending,
            [NAMESPACE, KUBE_OBJECTS],
        ),
        Command(
            "cluster quarantine",
            "taint the Kubernetes nodes on which a worker was found wrong, and untaint those that were released",
            cluster_quarantine,
            [STORAGE, KEEPS_ON],
        ),
        Command(
            "cluster release",
            "let a node get training workers again that was left out, since a worker there was found wrong",
            cluster_release,
            [_NODE, STORAGE],
        ),
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
        Command(
            "storage check",
            "check that a storage does all that runs need, and say what is wrong if not",
            storage_check,
            [_PLACE],
        ),
        Command(
            "delete",
            "delete a run, or forget an endpoint; says what that is, and does it with --yes",
            delete,
            [OneOf((_DELETED_RUN, _ENDED), required=True), YES, STORAGE],
        ),
        Command(
            "gc",
            "find token stores, checkpoints and runs that nothing needs; deletes them with --yes",
            gc,
            [YES, STORAGE],
        ),
    ),
    groups={
        "cluster": "render and apply the manifests, scale their groups, and say why a pod is pending",
        "dashboards": (
            "manage dashboards and alerts (GRAFANA_URL, and GRAFANA_TOKEN or GRAFANA_TOKEN_FILE, name Grafana)"
        ),
        "storage": "check a storage",
    },
)

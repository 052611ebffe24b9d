"""The commands for clusters on Kubernetes."""

from cluster.commands.arguments import (
    COMPONENT,
    GROUP,
    KEEPS_ON,
    KUBE_OBJECT,
    KUBE_OBJECTS,
    LEAST_PODS,
    LET_CHECK,
    MOST_PODS,
    NAMESPACE,
    OVERLAY,
    OVERLAYS_NAMESPACE,
    RESUME,
    STORAGE,
    SUSPEND,
)
from cluster.commands.command import Argument, Arguments, Command, CommandSection, OneOf, Result
from cluster.output.result_text import table
from cluster.storage.uris import Storage, open_storage
from raymill.errors import UserError

_NODE = Argument[str | None](
    "node", "its name; without one, those that are left out are listed", nargs="?", metavar="NODE"
)


def cluster_render(arguments: Arguments) -> Result:
    from cluster.commands.wings import kube_objects

    return kube_objects.render(arguments)


def cluster_apply(arguments: Arguments) -> Result:
    from cluster.commands.wings import kube_objects

    return kube_objects.apply(arguments)


def cluster_scale(arguments: Arguments) -> Result:
    from cluster.commands.wings import kube_objects

    return kube_objects.scale(arguments)


def cluster_status(arguments: Arguments) -> Result:
    from cluster.commands.wings import kube_objects

    return kube_objects.status(arguments)


def cluster_why_pending(arguments: Arguments) -> Result:
    from cluster.commands.wings import kube_objects

    return kube_objects.pending(arguments)


def cluster_quarantine(arguments: Arguments) -> Result:
    from cluster.commands.wings import kube_objects

    return kube_objects.quarantine(arguments)


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
    from cluster.commands.wings import kube_objects

    where = f"the node {kubernetes_node} of Kubernetes"
    try:
        marks = kube_objects.mark_nodes(storage)
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


KUBE = CommandSection(
    "jobs, clusters and storage",
    (
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
    ),
    groups={
        "cluster": "render and apply the manifests, scale their groups, and say why a pod is pending"
    },
)

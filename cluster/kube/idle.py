"""Says why each pod of a Ray cluster does not go away, from what Ray says about its nodes. Pure."""

from collections import Counter, defaultdict
from typing import Any

from cluster.kube.status import Object, cluster_spec
from cluster.output.result_text import counted

Rows = list[dict[str, Any]]
"""Rows of Ray's state API."""


def held_by_nodes(*, tasks: Rows, actors: Rows, placement_groups: Rows) -> dict[str, list[str]]:
    """Returns in words what each node holds, by its id: running tasks, living actors, reserved resources."""
    held = defaultdict[str, list[str]](list)
    normal = [row for row in tasks if row["type"] == "NORMAL_TASK"]
    for word, rows, key in (("task", normal, "name"), ("actor", actors, "class_name")):
        for node, count in Counter(row["node_id"] for row in rows).items():
            names = sorted({row[key] for row in rows if row["node_id"] == node})
            some = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
            held[node].append(f"{counted(count, word)} ({some})")
    sharers = (node for row in placement_groups for node in {bundle["node_id"] for bundle in row["bundles"]})
    for node, count in Counter(sharers).items():
        held[node].append(f"a share of {counted(count, 'placement group')}")
    return dict(held)


def why_not_idle(cluster: Object, holds: dict[str, dict[str, list[str]]]) -> dict[str, str]:
    """Returns a reason by pod name. `holds` has what each pod of each worker group holds; of a group's pods without
    work, `minReplicas` decides how many stay."""
    reasons, spec = {}, cluster_spec(cluster)
    for group in spec["workerGroupSpecs"]:
        name, lowest = group["groupName"], group.get("minReplicas", 0)
        idle_s = group.get("idleTimeoutSeconds", spec["autoscalerOptions"].get("idleTimeoutSeconds", 60))
        pods = holds.get(name, {})
        num_kept = lowest - sum(map(bool, pods.values()))
        for pod, held in pods.items():
            if held:
                reasons[pod] = f"holds {', '.join(held)}"
            elif num_kept > 0:
                num_kept -= 1
                reasons[pod] = f"has no work, and stays as {name} keeps {lowest} pods (minReplicas)"
            else:
                reasons[pod] = f"has no work, and goes {idle_s} s after its last (idleTimeoutSeconds)"
    return reasons

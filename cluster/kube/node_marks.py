"""Marks a node of Kubernetes on which a worker computed wrong: a taint keeps new pods away, and a
condition says why. Pure.

Node Problem Detector marks nodes by such conditions too, and what repairs nodes reads them.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from cluster.kube.scale import Patch
from cluster.kube.status import Object

TAINT = "raymill/computes-wrong"
CONDITION = "RaymillComputesWrong"

_EFFECT = "NoSchedule"  # pods that run stay: only training has been seen to be wrong there


def owner_of(storage_uri: str) -> str:
    """Returns the taint's value: which storage has the record of the node. Installations that share
    nodes have storages of their own, and each takes back its own marks alone."""
    return hashlib.sha256(storage_uri.rstrip("/").encode()).hexdigest()[:16]


def is_marked(node: Object, owner: str) -> bool:
    return any(_is_ours(taint, owner) for taint in _taints(node))


def tainted(node: Object, owner: str) -> Patch:
    """Returns the patch that taints a node; an empty one if it is tainted, be it by another
    owner."""
    taints = _taints(node)
    if any(taint["key"] == TAINT for taint in taints):
        return []
    ours = {"key": TAINT, "value": owner, "effect": _EFFECT}
    return _replaced(node, "/spec/taints", [*taints, ours])


def untainted(node: Object, owner: str) -> Patch:
    """Returns the patch that takes an owner's taint from a node; an empty one if it has none."""
    if not is_marked(node, owner):
        return []
    kept = [taint for taint in _taints(node) if not _is_ours(taint, owner)]
    return _replaced(node, "/spec/taints", kept)


def conditioned(node: Object, why: str | None, *, now: str) -> Patch:
    """Returns the patch of a node's status that says why a worker there was wrong, or, without a
    reason, that its node gets workers again; an empty one if it says so. `now` is in RFC 3339."""
    conditions = node.get("status", {}).get("conditions", [])
    (before,) = [at for at in conditions if at["type"] == CONDITION] or [{}]
    wanted = {
        "type": CONDITION,
        "status": "True" if why else "False",
        "reason": "SentinelFoundCorruption" if why else "Released",
        "message": why or "it was released, and gets training workers again",
    }
    if wanted.items() <= before.items() or not (why or before):
        return []
    is_same_status = before.get("status") == wanted["status"]
    wanted["lastTransitionTime"] = before["lastTransitionTime"] if is_same_status else now
    wanted["lastHeartbeatTime"] = now
    others = [at for at in conditions if at["type"] != CONDITION]
    return _replaced(node, "/status/conditions", [*others, wanted])


def wanted_marks(records: list[dict[str, Any]]) -> dict[str, str]:
    """Returns, by the name of each node of Kubernetes that is left out, why."""
    reasons: dict[str, list[str]] = {}
    for place in records:
        if node := place.get("kubernetes_node"):
            reasons.setdefault(str(node), []).append(str(place.get("reason", "it was wrong")))
    return {node: "; ".join(why) for node, why in reasons.items()}


def pods_of_marks(records: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Returns, by the name of each node of Kubernetes that is left out, for which pods."""
    pods: dict[str, list[str]] = {}
    for place in records:
        if node := place.get("kubernetes_node"):
            pods.setdefault(str(node), []).append(str(place["node"]))
    return pods


def as_kubectl(wanted: Mapping[str, str], owner: str) -> list[str]:
    """Returns the commands by which somebody with more rights taints the nodes."""
    return [f"kubectl taint nodes {node} {TAINT}={owner}:{_EFFECT}" for node in wanted]


def _taints(node: Object) -> list[Object]:
    return node.get("spec", {}).get("taints") or []


def _is_ours(taint: Object, owner: str) -> bool:
    return (taint["key"], taint.get("value")) == (TAINT, owner)


def _replaced(node: Object, path: str, value: list[Object]) -> Patch:
    """Returns the patch that replaces a list, which fails if the node was changed meanwhile."""
    version = node["metadata"]["resourceVersion"]
    return [
        {"op": "test", "path": "/metadata/resourceVersion", "value": version},
        {"op": "add", "path": path, "value": value},
    ]

"""Hands the fields that `kubectl apply` wrote to the manager of a server-side apply. Pure.

A client-side apply owns its fields as an `Update` of `kubectl-client-side-apply`, and so conflicts
with every later server-side apply, even of the same manifest: a list that is one field also has the
defaults that Kubernetes filled in. kubectl does the same as this module when its user changes to
server-side apply.
"""

import copy

from cluster.kube.scale import Patch
from cluster.kube.status import Object

_CLIENT_SIDE_APPLY = "kubectl-client-side-apply"
_OLD_KUBECTL = "kubectl"  # as versions before 1.18 called themselves in every command
KUBECTL_APPLY = frozenset({_CLIENT_SIDE_APPLY, _OLD_KUBECTL})
"""Names of the managers that may stand for a client-side apply."""

_LAST_APPLIED = "f:kubectl.kubernetes.io/last-applied-configuration"


def taken_over(live: Object, manager: str) -> Patch | None:
    """Returns the JSON patch by which `manager` owns what `kubectl apply` owns of the object: None
    if that is nothing.

    What a person edited stays that person's. The annotation with kubectl's last manifest is taken
    over too, so the next server-side apply removes it with all else that the manifest no longer
    has. The patch fails if the object has been changed since it was read.
    """
    entries = live["metadata"].get("managedFields") or []
    kubectls = [entry for entry in entries if _is_kubectls_apply(entry)]
    if not kubectls:
        return None
    rest = [entry for entry in entries if entry not in kubectls]
    mine = next((entry for entry in rest if _is_apply_of(entry, manager)), None)
    merged = copy.deepcopy(mine or kubectls[0] | {"manager": manager, "operation": "Apply"})
    for entry in kubectls:
        merged["fieldsV1"] = _united(merged["fieldsV1"], entry["fieldsV1"])
    kept = [entry for entry in rest if entry is not mine]
    return [
        {"op": "replace", "path": "/metadata/managedFields", "value": [merged, *kept]},
        {
            "op": "replace",
            "path": "/metadata/resourceVersion",
            "value": live["metadata"]["resourceVersion"],
        },
    ]


def _is_kubectls_apply(entry: Object) -> bool:
    if entry.get("operation") != "Update" or entry.get("subresource"):
        return False
    if entry["manager"] == _CLIENT_SIDE_APPLY:
        return True
    annotations = entry.get("fieldsV1", {}).get("f:metadata", {}).get("f:annotations", {})
    return entry["manager"] == _OLD_KUBECTL and _LAST_APPLIED in annotations


def _is_apply_of(entry: Object, manager: str) -> bool:
    return (
        entry["manager"] == manager
        and entry.get("operation") == "Apply"
        and not entry.get("subresource")
    )


def _united(fields: Object, others: Object) -> Object:
    """Returns the union of two sets of fields in the form of `fieldsV1`: a leaf is an empty object,
    and a field that is in the set together with a part of itself has the key `.`.
    """
    if not fields and not others:
        return {}
    if not fields or not others:
        return {".": {}, **fields, **others}
    united = dict(fields)
    for key, part in others.items():
        united[key] = _united(united[key], part) if key in united else part
    return united

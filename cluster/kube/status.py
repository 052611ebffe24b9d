"""Says in a sentence what a RayCluster, RayJob or RayService does. Pure: objects in, text out."""

from collections.abc import Iterator
from typing import Any

Object = dict[str, Any]

KINDS = ("RayCluster", "RayJob", "RayService")

_JOBS = {
    "Initializing": "is starting its cluster",
    "Waiting": "waits for its job to be submitted",
    "Running": "is running",
    "Complete": "is done",
    "Failed": "has failed",
    "Suspending": "is being suspended",
    "Suspended": "is suspended: it has no pods",
    "Retrying": "failed and is being retried on a new cluster",
    "ValidationFailed": "is refused by KubeRay",
}


def cluster_spec(manifest: Object) -> Object:
    """Returns the spec of a RayCluster, or of the one inside a RayJob or RayService."""
    inside = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(manifest["kind"])
    return manifest["spec"][inside] if inside else manifest["spec"]


def sentence(manifest: Object) -> str:
    """Says what the object is doing, and what keeps it from what it should do."""
    status = manifest.get("status") or {}
    if not status:
        if manifest["spec"].get("suspend"):
            return f"is suspended: it has no pods{_queue(manifest)}"
        return "has not been seen by KubeRay: is the operator running, and does it watch this namespace?"
    kind = manifest["kind"]
    if kind == "RayJob":
        return _job(manifest, status)
    return _service(status) if kind == "RayService" else _cluster(manifest, status)


def groups(manifest: Object) -> Iterator[str]:
    """Yields a line for each worker group: its bounds, or that `raymill cluster scale` suspended it."""
    for group in cluster_spec(manifest).get("workerGroupSpecs", []):
        name, lowest, most = group["groupName"], group.get("minReplicas", 0), group.get("maxReplicas", 0)
        wanted = f", {group['replicas']} wanted now" if "replicas" in group else ""
        if before := suspended_bounds(manifest, name):
            yield f"{name}: suspended, {before[0]} to {before[1]} pods when resumed"
        else:
            yield f"{name}: {lowest} to {most} pods{wanted}"


SUSPENDED = "raymill/suspended."
"""Prefix, before a group's name, of the annotation with the group's bounds before it was suspended."""


def suspended_bounds(manifest: Object, group: str) -> tuple[int, int] | None:
    """Returns (`minReplicas`, `maxReplicas`) from before the group was suspended; None if it is not."""
    kept = manifest["metadata"].get("annotations", {}).get(SUSPENDED + group)
    if kept is None:
        return None
    lowest, _, most = kept.partition("-")
    return int(lowest), int(most)


def _job(manifest: Object, status: Object) -> str:
    state = status.get("jobDeploymentStatus", "")
    text = _JOBS.get(state, "has not been started yet")
    if state == "Suspended":
        text += _queue(manifest)
    if state == "Running" and status.get("jobStatus") == "PENDING":
        text = "has a cluster, on which its job does not run yet"
    if state in ("Failed", "Retrying", "ValidationFailed"):
        text += _why(status)
    cluster = status.get("rayClusterName")
    return text + (f", on the cluster {cluster}" if cluster and state in ("Initializing", "Running") else "")


def _service(status: Object) -> str:
    conditions = _conditions(status)
    ready, upgrade = conditions.get("Ready", {}), conditions.get("UpgradeInProgress", {})
    active, pending = status.get("activeServiceStatus") or {}, status.get("pendingServiceStatus") or {}
    ill = [
        f"{name} is {application.get('status', 'unknown')}{_detail(application.get('message', ''))}"
        for name, application in (active.get("applicationStatuses") or pending.get("applicationStatuses") or {}).items()
        if application.get("status") != "RUNNING"
    ]
    if ready.get("status") == "True":
        text = f"is answering on the cluster {active.get('rayClusterName', '')}".rstrip()
        if upgrade.get("status") == "True":
            text += f" while its successor {pending.get('rayClusterName', '')} starts"
        return text + (f"; {'; '.join(ill)}" if ill else "")
    if ill:
        return f"does not answer: {'; '.join(ill)}"
    return f"does not answer yet{_why(ready)}"


def _cluster(manifest: Object, status: Object) -> str:
    conditions = _conditions(status)
    failure, head = conditions.get("ReplicaFailure", {}), conditions.get("HeadPodReady", {})
    if manifest["spec"].get("suspend") or status.get("state") == "suspended":
        return f"is suspended: it has no pods{_queue(manifest)}"
    if failure.get("status") == "True":
        return f"cannot make its pods{_why(failure)}"
    if head.get("status") == "False":
        return f"waits for its head{_why(head)}"
    ready, desired = status.get("readyWorkerReplicas", 0), status.get("desiredWorkerReplicas", 0)
    return f"is up: its head is ready, and {ready} of {desired} workers"


def _conditions(status: Object) -> dict[str, Object]:
    return {condition["type"]: condition for condition in status.get("conditions") or []}


def _why(status: Object) -> str:
    reason, message = status.get("reason", ""), status.get("message", "")
    return f" ({reason}){_detail(message)}" if reason else _detail(message)


def _detail(message: str) -> str:
    lines = message.strip().splitlines()
    return f": {lines[-1][:300]}" if lines else ""


def _queue(manifest: Object) -> str:
    queue = manifest["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
    if queue:
        return f"; Kueue starts it when the queue {queue} has room"
    return "; `raymill cluster scale` with --resume brings it back"

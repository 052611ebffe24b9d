"""Says in a sentence what a RayCluster, RayJob or RayService does. Pure: objects in, text out."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from model.tables import read_table

Object = dict[str, Any]

RAY = "ray.io/v1"
KINDS = ("RayCluster", "RayJob", "RayService")
RUN_ANNOTATION = "raymill/run-id"
"""Annotation of a RayJob that `raymill submit` made: the run's id."""

WORDS: dict[str, dict[str, str]] = read_table(__file__, "words")


def cluster_spec(manifest: Object) -> Object:
    """Returns the spec of a RayCluster, or of the one inside a RayJob or RayService."""
    inside = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(manifest["kind"])
    return manifest["spec"][inside] if inside else manifest["spec"]


def sentence(manifest: Object) -> str:
    """Says what the object is doing, and what keeps it from what it should do."""
    status, kind = manifest.get("status") or {}, manifest["kind"]
    is_asked = manifest["spec"].get("suspend")
    # Not `state`, which a cluster keeps after it is resumed until all of its pods run.
    told = [
        said["status"] for name, said in conditions(manifest).items() if name.endswith("Suspended")
    ]
    if (
        "True" in told
        or status.get("jobDeploymentStatus") == "Suspended"
        or (is_asked and not status)
    ):
        return f"is suspended: it has no pods{_queue(manifest)}"
    if is_asked and kind != "RayJob":
        return "is being suspended: its pods are being removed"
    if not status:
        return "has not been seen by KubeRay: is the operator running, and does it watch this namespace?"
    if kind == "RayJob":
        return _job(status)
    return _service(manifest, status) if kind == "RayService" else _cluster(manifest, status)


def groups(manifest: Object, pods: list[Object] | None = None) -> Iterator[str]:
    """Yields a line for each worker group: its bounds. A running RayCluster's line also has how
    many pods are wanted and how many of the namespace's `pods` run."""
    is_up = (
        manifest["kind"] == "RayCluster"
        and bool(manifest.get("status"))
        and not manifest["spec"].get("suspend")
    )
    running = Counter(
        (
            pod["metadata"]["labels"].get("ray.io/cluster"),
            pod["metadata"]["labels"].get("ray.io/group"),
        )
        for pod in pods or []
        if pod["status"].get("phase") == "Running"
        and "deletionTimestamp" not in pod["metadata"]
        and not is_cut_off(pod)
    )
    for group in cluster_spec(manifest).get("workerGroupSpecs", []):
        name, lowest, most = (
            group["groupName"],
            group.get("minReplicas", 0),
            group.get("maxReplicas", 0),
        )
        state = f"{lowest} to {most} pods"
        state += f", {_wanted(group)} wanted" if is_up else ""
        state += (
            f", {running[manifest['metadata']['name'], name]} running"
            if is_up and pods is not None
            else ""
        )
        yield f"{name}: {state}"


def cut_off_pods(clusters: list[Object], pods: list[Object]) -> Iterator[str]:
    """Yields a line if nodes with pods of the clusters do not answer."""
    names = {cluster["metadata"]["name"] for cluster in clusters}
    gone = [
        pod["metadata"]["name"]
        for pod in pods
        if pod["metadata"]["labels"].get("ray.io/cluster") in names and is_cut_off(pod)
    ]
    if gone:
        yield f"cut off, as their nodes do not answer: {', '.join(gone)}"


def is_cut_off(pod: Object) -> bool:
    """Says whether the pod's node does not answer: Kubernetes then calls a pod not ready, and
    leaves the state of its containers as it last was."""
    state = conditions(pod)
    return (
        pod["status"].get("phase") == "Running"
        and state.get("Ready", {}).get("status") == "False"
        and state.get("ContainersReady", {}).get("status") == "True"
        and not pod.get("spec", {}).get("readinessGates")  # which may be what keeps it from ready
    )


def has_ended(manifest: Object) -> bool:
    """Says whether the object is a job that KubeRay no longer looks at."""
    return (manifest.get("status") or {}).get("jobDeploymentStatus") in (
        "Complete",
        "Failed",
        "ValidationFailed",
    )


def wanted(manifest: Object) -> int:
    """Returns how many worker pods the object's cluster should have."""
    return sum(_wanted(group) for group in cluster_spec(manifest).get("workerGroupSpecs", []))


def _wanted(group: Object) -> int:
    """Returns the group's number of pods: KubeRay keeps `replicas` within the bounds, and writes
    that nowhere."""
    within = min(
        max(group.get("replicas", 0), group.get("minReplicas", 0)), group.get("maxReplicas", 0)
    )
    return int(within * group.get("numOfHosts", 1))


def lacks_head(cluster: Object) -> bool:
    """Says whether the head of a RayCluster is to be up and is not, nor its autoscaler."""
    is_ready = conditions(cluster).get("HeadPodReady", {}).get("status") == "True"
    return not is_ready and not cluster["spec"].get("suspend")


def is_owned(cluster: Object) -> bool:
    """Says whether a job or a service made the RayCluster."""
    return any(owner["kind"] in KINDS for owner in cluster["metadata"].get("ownerReferences") or [])


def cluster_names(manifest: Object) -> list[str]:
    """Returns the RayClusters' names behind an object: a job's, a service's active and pending
    ones, or its own."""
    if manifest["kind"] == "RayCluster":
        return [manifest["metadata"]["name"]]
    status = manifest.get("status") or {}
    parts = [
        status,
        status.get("activeServiceStatus") or {},
        status.get("pendingServiceStatus") or {},
    ]
    return [part["rayClusterName"] for part in parts if part.get("rayClusterName")]


def component_of(manifest: Object) -> str | None:
    """Returns the component of raymill's manifests that an object belongs to."""
    return manifest["metadata"].get("labels", {}).get("app.kubernetes.io/component")


def run_of(manifest: Object) -> str | None:
    """Returns the id of the run for which `raymill submit` made the object."""
    run_id: str | None = (manifest["metadata"].get("annotations") or {}).get(RUN_ANNOTATION)
    return run_id


def full_name(manifest: Object) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def conditions(manifest: Object) -> dict[str, Object]:
    """Returns the object's conditions by type."""
    return {
        condition["type"]: condition
        for condition in (manifest.get("status") or {}).get("conditions") or []
    }


def _job(status: Object) -> str:
    state = status.get("jobDeploymentStatus", "")
    text = WORDS["job"].get(state, "has not been started yet")
    if state == "Running" and status.get("jobStatus") == "PENDING":
        text = "has a cluster, on which its job does not run yet"
    if state in ("Failed", "Retrying", "ValidationFailed"):
        text += _why(status)
    cluster = status.get("rayClusterName")
    return text + (
        f", on the cluster {cluster}" if cluster and state in ("Initializing", "Running") else ""
    )


def _service(manifest: Object, status: Object) -> str:
    ready, upgrade = (conditions(manifest).get(kind, {}) for kind in ("Ready", "UpgradeInProgress"))
    active = status.get("activeServiceStatus") or {}
    pending = status.get("pendingServiceStatus") or {}
    ill = _not_running(active)
    if ready.get("status") == "True":
        text = f"is answering on the cluster {active.get('rayClusterName', '')}".rstrip()
        text += f"; {'; '.join(ill)}" if ill else ""
        if upgrade.get("status") == "True":
            its = _not_running(pending)
            text += f" while its successor {pending.get('rayClusterName', '')} starts"
            text += f" ({'; '.join(its)})" if its else ""
        return text
    ill = ill or _not_running(pending)
    if not ill:
        return f"does not answer yet{_why(ready)}"
    is_starting = all(" is DEPLOYING" in line or " is NOT_STARTED" in line for line in ill)
    return f"does not answer{' yet' if is_starting else ''}: {'; '.join(ill)}"


def _not_running(part: Object) -> list[str]:
    """Returns a line for each application of a service's cluster that does not run."""
    applications = part.get("applicationStatuses") or {}
    return [
        f"{name} is {application.get('status', 'unknown')}{_detail(application.get('message', ''))}"
        for name, application in applications.items()
        if application.get("status") != "RUNNING"
    ]


def _cluster(manifest: Object, status: Object) -> str:
    failure, head = (
        conditions(manifest).get(kind, {}) for kind in ("ReplicaFailure", "HeadPodReady")
    )
    if failure.get("status") == "True":
        return f"cannot make its pods{_why(failure)}"
    if head.get("status") == "False":
        return f"waits for its head{_why(head)}"
    ready = status.get("readyWorkerReplicas", 0)
    desired = status.get("desiredWorkerReplicas", 0)
    return f"is up: its head is ready, and {ready} of {desired} workers"


def _why(status: Object) -> str:
    reason = status.get("reason", "").replace("Unknown", "")
    message = status.get("message", "")
    return f" ({reason}){_detail(message)}" if reason else _detail(message)


def _detail(message: str) -> str:
    lines = message.strip().splitlines()
    return f": {lines[-1][:300]}" if lines else ""


def _queue(manifest: Object) -> str:
    queue = manifest["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
    if queue:
        return f"; Kueue starts it when the queue {queue} has room"
    return "; `raymill cluster scale` with --resume brings it back"

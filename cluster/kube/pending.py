"""Says in a sentence why a pod does not run yet, from its status and events. Pure."""

import re

from cluster.kube.status import (
    WORDS,
    Object,
    cluster_names,
    cluster_spec,
    conditions,
    full_name,
    has_ended,
    is_cut_off,
    sentence,
    wanted,
)

_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
_CONFIG = ("CreateContainerConfigError", "CreateContainerError")
_PIECES = re.compile(r"0/(\d+) nodes are available: (.*?)(?:\. |\.?$)")
"""Matches the number of nodes and why each is not taken; what preemption would do follows."""
_CLAIM = re.compile(
    r"unbound immediate PersistentVolumeClaims|persistentvolumeclaim \"[^\"]+\" not found"
)
_MOUNT = ("FailedMount", "FailedAttachVolume")
_NOT_MADE = ("FailedToCreate", "FailedCreate")
_OF_REMOVAL = ("TaintManagerEviction", "Killing")
_MADE = ("Created", "SuccessfulCreate")
_NOT_SEEN = "KubeRay has not seen its newest change"
_PARTS = ("Pod", "RayCluster")
"""Ends of the reasons of what a Ray object is there for; its services and roles come before
them."""


def reasons(
    manifest: Object, clusters: list[Object], pods: list[Object], events: list[Object]
) -> dict[str, str]:
    """Returns why parts of a Ray object do not run yet, by the names of the object, its clusters
    and its pods: nothing if all run. `clusters` are those behind it; `pods` and `events` are all of
    the namespace."""
    if manifest["spec"].get("suspend") or not manifest.get("status"):
        told = None if manifest["spec"].get("suspend") else warning(manifest, events)
        return {full_name(manifest): told or sentence(manifest)}
    owners = {owner["metadata"]["uid"]: owner for owner in (manifest, *clusters)}
    why = {
        full_name(owner): why_not_made(owner, _events(owner, events)) for owner in owners.values()
    }
    reasons = {name: reason for name, reason in why.items() if reason is not None}
    name, names = manifest["metadata"]["name"], cluster_names(manifest)
    born = manifest["metadata"]["creationTimestamp"]
    is_job = manifest["kind"] == "RayJob"
    has_redis = "gcsFaultToleranceOptions" in cluster_spec(manifest)
    submitters = [pod for pod in pods if is_job and _label(pod, "job-name") == name]
    redis = [pod for pod in pods if has_redis and _label(pod, "raymill/role") == "redis"]
    nodes = [
        pod
        for pod in pods
        if _label(pod, "ray.io/cluster") in names and _label(pod, "ray.io/is-ray-node")
    ]
    if not clusters and not has_ended(manifest) and full_name(manifest) not in reasons:
        reasons[full_name(manifest)] = (
            warning(manifest, events)
            or f"has no cluster; KubeRay says that it {sentence(manifest)}"
        )
    for cluster in owners.values():
        its_pods = [
            pod for pod in nodes if _label(pod, "ray.io/cluster") == cluster["metadata"]["name"]
        ]
        if cluster["kind"] == "RayCluster" and full_name(cluster) not in reasons:
            reasons |= _missing(cluster, its_pods, events)
    for pod in (*redis, *nodes, *submitters):
        if told := _why_cut_off(pod, events):
            reasons[pod["metadata"]["name"]] = told
        elif is_pending(pod):
            reasons[pod["metadata"]["name"]] = why_pending(pod, events)
    # A controller of Kubernetes that cannot make its pod names itself in the event; an operator may
    # not read its uid.
    makers = [("Job", name, submitters)] * is_job + [("StatefulSet", "redis", redis)] * has_redis
    for kind, its_name, made in makers:
        about = [
            event for event in events if _about(event) == (kind, its_name) and _time(event) >= born
        ]
        if not made and (reason := _last_failure(about)):
            reasons[f"{kind}/{its_name}"] = reason
    return reasons


def _missing(cluster: Object, pods: list[Object], events: list[Object]) -> dict[str, str]:
    """Returns why pods that a RayCluster should have do not exist, as far as a condition has not
    told it."""
    if cluster["spec"].get("suspend"):
        return {}
    kept = [
        pod for pod in pods if "deletionTimestamp" not in pod["metadata"] and not _has_ended(pod)
    ]
    heads = [pod for pod in kept if _label(pod, "ray.io/node-type") == "head"]
    wanted_workers, num_workers = wanted(cluster), len(kept) - len(heads)
    if heads and num_workers >= wanted_workers:
        return {}
    if any(_why_cut_off(pod, events) for pod in pods if pod not in kept):
        return {}  # which KubeRay waits for
    if (told := warning(cluster, events)) is not None:
        return {full_name(cluster): told}
    what = (
        f"{num_workers} of {wanted_workers} worker pods exist"
        if heads
        else "its head's pod does not exist"
    )
    who = "KubeRay has made no more" if _is_seen(cluster) else _NOT_SEEN
    return {full_name(cluster): f"{what}, and {who}: is the operator running?"}


def _is_seen(owner: Object) -> bool:
    """Says whether KubeRay has looked at the object since it was last changed."""
    seen = (owner.get("status") or {}).get("observedGeneration", 0)
    return bool(seen >= owner["metadata"].get("generation", 0))


def warning(owner: Object, events: list[Object]) -> str | None:
    """Returns what KubeRay last warned of about a Ray object, unless it made a pod or a cluster
    since."""
    about = [event for event in _events(owner, events) if "already exists" not in event["message"]]
    newest = _newest([event for event in about if event.get("type") == "Warning"])
    made = [
        event
        for event in about
        if event.get("reason", "").startswith(_MADE) and event["reason"].endswith(_PARTS)
    ]
    if not newest or _time(_newest(made)) > _time(newest):
        return None
    reason, message = newest["reason"], newest["message"]
    if reason.startswith(_NOT_MADE):
        return _not_made(message)
    return f"KubeRay {'refuses it' if reason.startswith('Invalid') else 'cannot go on'}: {message[:300]}"


def _events(of: Object, events: list[Object]) -> list[Object]:
    """Returns the events of one object, by its uid: an object of the same name may have been there
    before."""
    return [
        event for event in events if event["involvedObject"].get("uid") == of["metadata"]["uid"]
    ]


def _about(event: Object) -> tuple[str, str]:
    return event["involvedObject"].get("kind", ""), event["involvedObject"].get("name", "")


def _label(pod: Object, key: str) -> str:
    return str(pod["metadata"].get("labels", {}).get(key, ""))


def _has_ended(pod: Object) -> bool:
    return pod["status"].get("phase") in ("Succeeded", "Failed")


def is_pending(pod: Object) -> bool:
    """Says whether a container that should run does not; a pod that is leaving or done is not
    pending."""
    if "deletionTimestamp" in pod["metadata"] or _has_ended(pod):
        return False
    if pod["status"].get("phase") == "Pending":
        return True
    return any(
        "waiting" in status.get("state", {})
        for status in pod["status"].get("containerStatuses", [])
    )


def _why_cut_off(pod: Object, events: list[Object]) -> str | None:
    """Says that the pod's node does not answer, and what becomes of the pod, if it is so. An event
    says it for an hour, the pod's state for as long as it lasts."""
    is_ready = conditions(pod).get("Ready", {}).get("status") != "False"
    if _has_ended(pod) or is_ready:
        return None
    newest = _newest([it for it in _events(pod, events) if it.get("reason") not in _OF_REMOVAL])
    if newest.get("reason") != "NodeNotReady" and not is_cut_off(pod):
        return None
    node = pod.get("spec", {}).get("nodeName", "")
    told = f"its node {node} does not answer".replace("  ", " ")
    if "deletionTimestamp" in pod["metadata"]:
        return f"{told}, so it cannot end: delete the node if its machine is gone"
    return f"{told}; Kubernetes removes the pod after five minutes of that"


def why_pending(pod: Object, events: list[Object]) -> str:
    """Returns the reason; `events` are all of the namespace, in any order."""
    own = _events(pod, events)
    scheduled = conditions(pod).get("PodScheduled", {})
    if scheduled.get("reason") == "SchedulingGated":
        gates = ", ".join(gate["name"] for gate in pod["spec"].get("schedulingGates", []))
        return f"is held back by {gates or 'a scheduling gate'}: a queue has not admitted it yet"
    if scheduled.get("status") == "False":
        if _CLAIM.search(message := scheduled.get("message", "")):
            return f"its volume is not there yet{_why_unbound(pod, events)}"
        return _unscheduled(message, own)
    for status in pod["status"].get("initContainerStatuses", []):
        if status["name"].startswith("wait-gcs-ready") and "running" in status.get("state", {}):
            return "waits for its cluster's head, which does not answer yet"
    for status in [
        *pod["status"].get("initContainerStatuses", []),
        *pod["status"].get("containerStatuses", []),
    ]:
        if waiting := status.get("state", {}).get("waiting"):
            return _waiting(status, waiting, own)
    return "is starting"


def why_not_made(owner: Object, events: list[Object]) -> str | None:
    """Says why KubeRay could not create a pod or a cluster, from the Ray object and its events."""
    failure = conditions(owner).get("ReplicaFailure", {})
    if failure.get("status") == "True":
        told = _not_made(failure.get("message", ""))
        return told if _is_seen(owner) else f"{told}; and {_NOT_SEEN}: is the operator running?"
    if owner["kind"] == "RayCluster" and conditions(owner):
        # The next pod that can be made clears the condition; the event stays for an hour
        return None
    return _last_failure(events)


def _last_failure(events: list[Object]) -> str | None:
    """Returns why something could not be made, unless something was made later. That a thing exists
    already is no failure: KubeRay raced with its own cache."""
    failed = [
        e
        for e in events
        if e.get("reason", "").startswith(_NOT_MADE) and "already exists" not in e["message"]
    ]
    made = [event for event in events if event.get("reason", "").startswith(_MADE)]
    if not failed or _time(_newest(made)) > _time(_newest(failed)):
        return None
    return _not_made(_newest(failed)["message"])


def _not_made(message: str) -> str:
    if "exceeded quota" in message:
        quota = re.search(r"exceeded quota: ([^,]+), (requested: [^,]+(?:,[^,:]+=[^,]+)*)", message)
        return (
            f"no more pods: the quota {quota[1]} is used up ({quota[2]})"
            if quota
            else f"no more pods: {message}"
        )
    # Before the reason, a condition's message has a line with its own name.
    lines = message.strip().splitlines() or [""]
    return f"a pod cannot be made: {lines[-1][:300]}"


def _unscheduled(message: str, events: list[Object]) -> str:
    pieces = _PIECES.search(message)
    reasons = [_node_words(piece) for piece in pieces[2].split(", ")] if pieces else []
    where = f"no node of {pieces[1]} has room" if pieces else "no node has room"
    text = f"{where}: {', '.join(reasons) or message[:300] or 'the scheduler gives no reason'}"
    known = {event.get("reason"): event for event in sorted(events, key=_time)}
    if "TriggeredScaleUp" in known or "Nominated" in known:
        return f"{text}; a node is on its way"
    if "NotTriggerScaleUp" in known:
        return f"{text}; and the node autoscaler will add none{_detail(known['NotTriggerScaleUp'])}"
    return text


def _node_words(piece: str) -> str:
    for pattern, words in WORDS["nodes"].items():
        if found := re.fullmatch(pattern, piece):
            return words.format(*found.groups())
    return piece


def _why_unbound(pod: Object, events: list[Object]) -> str:
    volumes = [volume.get("persistentVolumeClaim", {}) for volume in pod["spec"].get("volumes", [])]
    claims = {("PersistentVolumeClaim", claim["claimName"]) for claim in volumes if claim}
    return _detail(_newest([event for event in events if _about(event) in claims]))


def _waiting(status: Object, waiting: Object, events: list[Object]) -> str:
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    if reason in _IMAGE:
        return f"its image {status.get('image', '')} cannot be pulled{_detail(waiting)}"
    if reason in _CONFIG:
        return f"what it names is not there: {message or reason}"
    if reason == "CrashLoopBackOff":
        last = status.get("lastState", {}).get("terminated", {})
        return (
            f"its container {status['name']} ended {status.get('restartCount', 0)} times, last with exit code "
            f"{last.get('exitCode', 'unknown')} ({last.get('reason', 'Error')}); `kubectl logs --previous` has its end"
        )
    last = _newest(
        [event for event in events if event.get("reason") in (*_MOUNT, "Pulling", "Pulled")]
    )
    if last.get("reason") in _MOUNT:
        return f"a volume cannot be mounted{_detail(last)}"
    if last.get("reason") == "Pulling":
        return f"its image {status.get('image', '')} is being pulled"
    return "is starting"


def _detail(source: Object) -> str:
    return f": {source['message'][:300]}" if source.get("message") else ""


def _newest(events: list[Object]) -> Object:
    """Returns the last event, an empty object if there is none."""
    return max(events, key=_time, default={})


def _time(event: Object) -> str:
    series = event.get("series") or {}
    return (
        series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime") or ""
    )

"""Says in a sentence why a pod does not run yet, from the pod and its events. Pure: objects in, text out."""

import re

from cluster.kube.status import Object

_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
_CONFIG = ("CreateContainerConfigError", "CreateContainerError")
_LACKS = re.compile(r"(\d+) Insufficient (\S+?)[.,]?(?=\s|$)")
_TAINT = re.compile(r"(\d+) node\(s\) had untolerated taint(?:\(s\)|s)? ?\{?([^:},]*)")
_SELECTOR = re.compile(r"(\d+) node\(s\) didn't match Pod's node affinity/selector")
_CLAIM = re.compile(r"unbound immediate PersistentVolumeClaims|persistentvolumeclaim \"[^\"]+\" not found")
_NODES = re.compile(r"0/(\d+) nodes are available")


def is_pending(pod: Object) -> bool:
    """Says whether a container that should run does not; a pod that is leaving or done is not pending."""
    if "deletionTimestamp" in pod["metadata"] or pod["status"].get("phase") in ("Succeeded", "Failed"):
        return False
    if pod["status"].get("phase") == "Pending":
        return True
    return any("waiting" in status.get("state", {}) for status in pod["status"].get("containerStatuses", []))


def why_pending(pod: Object, events: list[Object]) -> str:
    """Returns the reason; `events` are those of this pod, in any order."""
    conditions = {condition["type"]: condition for condition in pod["status"].get("conditions", [])}
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("reason") == "SchedulingGated":
        gates = ", ".join(gate["name"] for gate in pod["spec"].get("schedulingGates", []))
        return f"is held back by {gates or 'a scheduling gate'}: a queue has not admitted it yet"
    if scheduled.get("status") == "False":
        return _unscheduled(scheduled.get("message", ""), events)
    for status in pod["status"].get("initContainerStatuses", []):
        if status["name"].startswith("wait-gcs-ready") and not status.get("ready"):
            return "waits for its cluster's head, which does not answer yet"
    for status in [*pod["status"].get("initContainerStatuses", []), *pod["status"].get("containerStatuses", [])]:
        if waiting := status.get("state", {}).get("waiting"):
            return _waiting(status, waiting, events)
    return "is starting"


def why_not_made(events: list[Object]) -> str | None:
    """Says why KubeRay could not create a pod, from the newest failure among the Ray object's events."""
    failed = [event for event in events if event.get("type") == "Warning" and "Failed" in event.get("reason", "")]
    if not failed:
        return None
    message = _newest(failed)["message"]
    if "exceeded quota" in message:
        quota = re.search(r"exceeded quota: ([^,]+), (requested: [^,]+(?:,[^,:]+=[^,]+)*)", message)
        return f"no more pods: the quota {quota[1]} is used up ({quota[2]})" if quota else f"no more pods: {message}"
    return f"a pod cannot be made: {message[:300]}"


def _unscheduled(message: str, events: list[Object]) -> str:
    reasons = [f"{number} lack {resource}" for number, resource in _LACKS.findall(message)]
    taints = [(number, taint.strip()) for number, taint in _TAINT.findall(message)]
    reasons += [f"{number} have the taint {taint}, which it does not tolerate" for number, taint in taints]
    reasons += [f"{number} lack the labels that it asks for" for number in _SELECTOR.findall(message)]
    if _CLAIM.search(message):
        reasons.append("its volume is not there yet")
    nodes = _NODES.search(message)
    where = f"no node of {nodes[1]} has room" if nodes else "no node has room"
    text = f"{where}: {', '.join(reasons) or message[:300] or 'the scheduler gives no reason'}"
    known = {event.get("reason"): event for event in sorted(events, key=_time)}
    if "TriggeredScaleUp" in known or "Nominated" in known:
        return f"{text}; a node is on its way"
    if "NotTriggerScaleUp" in known:
        return f"{text}; and the node autoscaler will add none{_detail(known['NotTriggerScaleUp'])}"
    return text


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
    mounts = [event for event in events if event.get("reason") in ("FailedMount", "FailedAttachVolume")]
    if mounts:
        return f"a volume cannot be mounted{_detail(_newest(mounts))}"
    known = {event.get("reason") for event in events}
    if "Pulling" in known and "Pulled" not in known:
        return f"its image {status.get('image', '')} is being pulled"
    return "is starting"


def _detail(source: Object) -> str:
    return f": {source['message'][:300]}" if source.get("message") else ""


def _newest(events: list[Object]) -> Object:
    return max(events, key=_time)


def _time(event: Object) -> str:
    return event.get("lastTimestamp") or event.get("eventTime") or ""

"""`raymill cluster` explains objects in the shape in which Kubernetes and KubeRay write them."""

from typing import Any

import pytest
import yaml

from cluster.kube.pending import is_pending, why_not_made, why_pending
from cluster.kube.scale import scale_group, suspend
from cluster.kube.status import groups, sentence
from cluster.settings.parser import ConfigError
from tests.k8s.api_objects import change as change_object
from tests.k8s.manifests import find, render

_CLUSTER = {"kind": "RayCluster", "metadata": {"name": "shared"}, "spec": {}}
_JOB = {"kind": "RayJob", "metadata": {"name": "pretrain", "labels": {}}, "spec": {}}
_SERVICE = {"kind": "RayService", "metadata": {"name": "completions"}, "spec": {}}

_STATES: list[tuple[dict[str, Any], str, str]] = [
    (_CLUSTER, "{}", "has not been seen by KubeRay"),
    (_CLUSTER, "{state: ready, readyWorkerReplicas: 1, desiredWorkerReplicas: 3}", "its head is ready, and 1 of 3 workers"),
    (
        _CLUSTER,
        "{conditions: [{type: HeadPodReady, status: 'False', reason: ContainersNotReady, message: 'no: [ray-head]'}]}",
        "waits for its head (ContainersNotReady): no: [ray-head]",
    ),
    (_CLUSTER, "{conditions: [{type: HeadPodReady, status: 'False', reason: Unknown}]}", "waits for its head"),
    (
        _CLUSTER,
        "{conditions: [{type: ReplicaFailure, status: 'True', reason: FailedCreateWorkerPod, message: exceeded quota}]}",
        "cannot make its pods (FailedCreateWorkerPod): exceeded quota",
    ),
    (
        _CLUSTER,
        "{state: suspended, conditions: [{type: RayClusterSuspended, status: 'True'}]}",
        "is suspended: it has no pods; `raymill cluster scale` with --resume",
    ),
    (
        _CLUSTER,  # resumed
        "{state: suspended, conditions: [{type: RayClusterSuspended, status: 'False'}, {type: HeadPodReady, status: 'False'}]}",
        "waits for its head",
    ),
    (_JOB, "{jobDeploymentStatus: Initializing, rayClusterName: pretrain-x7k2p}", "starting its cluster, on the cluster pretrain-x7k2p"),
    (_JOB, "{jobDeploymentStatus: Running, jobStatus: RUNNING}", "is running"),
    (_JOB, "{jobDeploymentStatus: Running, jobStatus: PENDING}", "on which its job does not run yet"),
    (_JOB, "{jobDeploymentStatus: Complete, jobStatus: SUCCEEDED}", "is done"),
    (
        _JOB,
        "{jobDeploymentStatus: Failed, reason: AppFailed, message: \"Traceback:\\n  error: no source\"}",
        "has failed (AppFailed):   error: no source",
    ),
    (_JOB, "{jobDeploymentStatus: Retrying, reason: DeadlineExceeded}", "is being retried on a new cluster (DeadlineExceeded)"),
    (
        _SERVICE,
        "{conditions: [{type: Ready, status: 'True'}], activeServiceStatus: {rayClusterName: completions-a}}",
        "is answering on the cluster completions-a",
    ),
    (
        _SERVICE,
        """{conditions: [{type: Ready, status: 'True'}, {type: UpgradeInProgress, status: 'True'}],
            activeServiceStatus: {rayClusterName: a}, pendingServiceStatus: {rayClusterName: b}}""",
        "on the cluster a while its successor b starts",
    ),
    (
        _SERVICE,
        """{conditions: [{type: Ready, status: 'True'}, {type: UpgradeInProgress, status: 'True'}],
            activeServiceStatus: {rayClusterName: a, applicationStatuses: {raymill: {status: RUNNING}}},
            pendingServiceStatus: {rayClusterName: b, applicationStatuses: {raymill: {status: DEPLOYING}}}}""",
        "is answering on the cluster a while its successor b starts (raymill is DEPLOYING)",
    ),
    (
        _SERVICE,
        """{conditions: [{type: Ready, status: 'False', reason: Initializing}], pendingServiceStatus:
            {rayClusterName: b, applicationStatuses: {raymill: {status: DEPLOYING}}}}""",
        "does not answer yet: raymill is DEPLOYING",
    ),
    (
        _SERVICE,
        """{conditions: [{type: Ready, status: 'False', reason: Initializing}], pendingServiceStatus:
            {rayClusterName: b, applicationStatuses: {raymill: {status: DEPLOY_FAILED, message: no checkpoint}}}}""",
        "does not answer: raymill is DEPLOY_FAILED: no checkpoint",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("manifest", "status", "says"), _STATES, ids=[says for _, _, says in _STATES]
)
def test_a_status_is_one_sentence(manifest: dict[str, Any], status: str, says: str) -> None:
    text = sentence(manifest | {"status": yaml.safe_load(status)})
    assert says in text
    assert "\n" not in text


def test_a_job_in_a_queue_says_which() -> None:
    queued = find(render("overlays/kueue"), "RayJob/pretrain")
    assert (
        sentence(queued)
        == "is suspended: it has no pods; Kueue starts it when the queue raymill has room"
    )


_SCHEDULED = (
    "conditions: [{type: PodScheduled, status: 'False', reason: Unschedulable, message: %s}]"
)
_FULL = '"0/5 nodes are available: 2 node(s) had untolerated taint {nvidia.com/gpu: present}, 3 Insufficient nvidia.com/gpu. preemption: 0/5 nodes are available"'
_PODS: list[tuple[str, str, str]] = [
    (_SCHEDULED % _FULL, "[]", "no node of 5 has room: 2 have the taint nvidia.com/gpu, which it does not tolerate, 3 lack nvidia.com/gpu"),
    (_SCHEDULED % _FULL, "[{reason: TriggeredScaleUp, message: m}]", "; a node is on its way"),
    (
        _SCHEDULED % _FULL,
        "[{reason: NotTriggerScaleUp, message: max node group size reached}]",
        "the node autoscaler will add none: max node group size reached",
    ),
    (_SCHEDULED % "\"0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector.\"", "[]", "2 lack the labels"),
    (_SCHEDULED % '"0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims."', "[]", "its volume is not there yet"),
    # As Kubernetes 1.36 words it.
    (
        _SCHEDULED % '"0/3 nodes are available: 3 node(s) had untolerated taint(s). no new claims to deallocate, preemption: not eligible due to preemptionPolicy=Never."',
        "[]",
        "no node of 3 has room: 3 have a taint that it does not tolerate",
    ),
    (
        _SCHEDULED % '"0/3 nodes are available: 1 node(s) had untolerated taint(s), 2 Insufficient nvidia.com/gpu. no new claims to deallocate, preemption: m."',
        "[]",
        "no node of 3 has room: 1 have a taint that it does not tolerate, 2 lack nvidia.com/gpu",
    ),
    (
        _SCHEDULED % '"0/3 nodes are available: 1 node(s) were unschedulable, 2 node(s) had untolerated taint(s)."',
        "[]",
        "no node of 3 has room: 1 are cordoned, 2 have a taint that it does not tolerate",
    ),
    (
        _SCHEDULED % "\"0/3 nodes are available: 1 node(s) had untolerated taint(s), 2 node(s) didn't satisfy plugin(s) [NodeAffinity].\"",
        "[]",
        "no node of 3 has room: 1 have a taint that it does not tolerate, 2 are not the one that it names",
    ),
    (
        _SCHEDULED % '"0/3 nodes are available: 3 node(s) didn\'t satisfy something new."',
        "[]",
        "no node of 3 has room: 3 node(s) didn't satisfy something new",
    ),
    (_SCHEDULED % '"0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims. not found"', "[]", "its volume is not there yet"),
    (
        """initContainerStatuses: [{name: wait-gcs-ready, ready: false, state: {waiting: {reason: PodInitializing}}}]""",
        "[{reason: FailedMount, message: 'secret \"api-keys\" not found'}]",
        'a volume cannot be mounted: secret "api-keys" not found',
    ),
    ("conditions: [{type: PodScheduled, status: 'False', reason: SchedulingGated}]", "[]", "held back by kueue.x-k8s.io/admission"),
    (
        "containerStatuses: [{name: ray, image: 'raymill:1', state: {waiting: {reason: ImagePullBackOff, message: not found}}}]",
        "[]",
        "its image raymill:1 cannot be pulled: not found",
    ),
    (
        "containerStatuses: [{name: ray, image: i, state: {waiting: {reason: CreateContainerConfigError, message: 'secret \"api-keys\" not found'}}}]",
        "[]",
        'what it names is not there: secret "api-keys" not found',
    ),
    (
        """containerStatuses: [{name: ray, image: i, restartCount: 4, state: {waiting: {reason: CrashLoopBackOff}},
            lastState: {terminated: {exitCode: 137, reason: OOMKilled}}}]""",
        "[]",
        "ended 4 times, last with exit code 137 (OOMKilled)",
    ),
    ("initContainerStatuses: [{name: wait-gcs-ready, ready: false, state: {running: {}}}]", "[]", "waits for its cluster's head"),
    (
        "containerStatuses: [{name: ray, image: i, state: {waiting: {reason: ContainerCreating}}}]",
        "[{reason: FailedMount, message: 'configmap \"run-config\" not found'}]",
        'a volume cannot be mounted: configmap "run-config" not found',
    ),
    (
        "containerStatuses: [{name: ray, image: big, state: {waiting: {reason: ContainerCreating}}}]",
        "[{reason: Pulling, message: m}]",
        "its image big is being pulled",
    ),
    (
        "containerStatuses: [{name: ray, image: mounted, state: {waiting: {reason: ContainerCreating}}}]",
        "[{reason: FailedMount, message: 'no Secret', lastTimestamp: '1'}, {reason: Pulling, message: m, lastTimestamp: '2'}]",
        "its image mounted is being pulled",
    ),
]  # fmt: skip


_OF_OTHERS = [{"reason": "FailedMount", "message": "of a pod of that name", "lastTimestamp": "9"}]


@pytest.mark.parametrize(("status", "events", "says"), _PODS, ids=[says for _, _, says in _PODS])
def test_a_pending_pod_says_why(status: str, events: str, says: str) -> None:
    gates = {"schedulingGates": [{"name": "kueue.x-k8s.io/admission"}]}
    pod = {
        "metadata": {"name": "p"},
        "spec": gates,
        "status": {"phase": "Pending"} | yaml.safe_load(status),
    }
    pod["metadata"]["uid"] = "u"
    assert is_pending(pod)
    of_it = [
        event | {"involvedObject": {"kind": "Pod", "name": "p", "uid": "u"}}
        for event in yaml.safe_load(events)
    ]
    others = [
        event | {"involvedObject": {"kind": "Pod", "name": "p", "uid": "before"}}
        for event in _OF_OTHERS
    ]
    assert says in why_pending(pod, [*of_it, *others])


def test_a_pod_that_leaves_or_runs_is_not_pending() -> None:
    running = {
        "metadata": {},
        "status": {"phase": "Running", "containerStatuses": [{"state": {"running": {}}}]},
    }
    assert not is_pending(running)
    assert not is_pending({"metadata": {"deletionTimestamp": "t"}, "status": {"phase": "Pending"}})


def test_a_quota_that_is_used_up_is_named() -> None:
    message = 'pods "p" is forbidden: exceeded quota: raymill, requested: requests.nvidia.com/gpu=1, used: requests.nvidia.com/gpu=16, limited: requests.nvidia.com/gpu=16'
    event = {
        "type": "Warning",
        "reason": "FailedToCreateWorkerPod",
        "message": message,
        "lastTimestamp": "2",
    }
    assert (
        why_not_made(_CLUSTER, [event])
        == "no more pods: the quota raymill is used up (requested: requests.nvidia.com/gpu=1)"
    )
    assert (
        why_not_made(_CLUSTER, [{"type": "Normal", "reason": "CreatedWorkerPod", "message": "m"}])
        is None
    )
    later = {
        "reason": "CreatedWorkerPod",
        "message": "m",
        "lastTimestamp": None,
        "eventTime": "2",
        "series": {"lastObservedTime": "3"},
    }
    assert why_not_made(_CLUSTER, [event, later]) is None


@pytest.mark.parametrize("name", ["RayCluster/shared", "RayService/completions"])
def test_a_group_is_scaled_twice(name: str) -> None:
    manifest = find(render("overlays/gpu"), name)
    group = next(iter(groups(manifest))).partition(":")[0]

    def bounds() -> str:
        return next(iter(groups(manifest))).removeprefix(f"{group}: ")

    def change(patch: list[dict[str, Any]]) -> None:
        for step in patch:
            change_object(manifest, step)

    before = bounds()
    change(scale_group(manifest, None, lowest=1, most=3))
    assert bounds() == "1 to 3 pods"
    change(scale_group(manifest, None, lowest=None, most=2))
    change(scale_group(manifest, group, lowest=None, most=3))
    assert bounds() == "1 to 3 pods" != before


def test_what_cannot_be_scaled_is_refused() -> None:
    shared = find(render("base"), "RayCluster/shared")
    with pytest.raises(ConfigError, match="9 to 4 pods"):
        scale_group(shared, None, lowest=9, most=None)
    with pytest.raises(ConfigError, match="has the groups workers"):
        scale_group(shared, "gpus", lowest=0, most=1)
    with pytest.raises(ConfigError, match="not suspended already"):
        suspend(shared, suspended=False)
    with pytest.raises(ConfigError, match="Kueue suspends and resumes it"):
        suspend(find(render("overlays/kueue"), "RayJob/pretrain"), suspended=False)

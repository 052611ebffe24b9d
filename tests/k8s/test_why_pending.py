"""`raymill cluster why-pending` gives reasons, and stops giving them, as Kubernetes 1.36 and
KubeRay 1.7 leave a cluster."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.k8s.api_stand_in import ApiStandIn
from tests.k8s.cluster_cli import CORE, RAY, Asked, cluster_behind, ray_object
from tests.k8s.operator_stand_in import OperatorStandIn, unmounted, unscheduled

pytestmark = pytest.mark.more

NOTHING = {"pending": "nothing: every requested pod runs"}


@pytest.fixture
def operator(api: ApiStandIn, asked: Asked) -> OperatorStandIn:
    asked("apply", "dev")
    return OperatorStandIn(api)


def labelled(key: str, value: str) -> Callable[[dict[str, Any]], bool]:
    return lambda pod: pod["metadata"]["labels"].get(key) == value


def test_all_that_was_asked_for_runs(asked: Asked, operator: OperatorStandIn) -> None:
    # Whose race leaves "FailedToCreateRayCluster ... already exists" with the service
    operator.look()
    assert asked("why-pending") == NOTHING


def test_a_quota_is_named_for_a_job_and_no_more_once_it_is_raised(
    api: ApiStandIn, asked: Asked, operator: OperatorStandIn
) -> None:
    operator.look()

    def set_quota(pods: int) -> None:
        change = {"spec": {"hard": {"pods": str(pods)}}}
        api.patch(
            f"{CORE}/resourcequotas/raymill",
            "application/merge-patch+json",
            change,
            manager="kubectl-patch",
        )

    set_quota(len(api.list(f"{CORE}/pods")["items"]) + 2)
    asked("scale", "rayjob/pretrain", "--min", "6", "--max", "6")
    operator.look()
    cluster = cluster_behind(api, ray_object(api, "RayJob", "pretrain"))["metadata"]["name"]
    full = "no more pods: the quota raymill is used up (requested: pods=1)"
    assert asked("why-pending", "rayjob/pretrain") == {f"RayCluster/{cluster}": full}
    assert asked("why-pending", cluster) == {f"RayCluster/{cluster}": full}
    set_quota(64)
    operator.look()
    assert asked("why-pending", "rayjob/pretrain") == NOTHING
    assert asked("why-pending", cluster) == NOTHING


def test_a_submitter_that_has_no_node_is_shown(
    api: ApiStandIn, asked: Asked, operator: OperatorStandIn
) -> None:
    message = "0/3 nodes are available: 1 Insufficient cpu, 2 node(s) had untolerated taint(s). no new claims to deallocate, preemption: not eligible due to preemptionPolicy=Never."
    operator.fates = [(labelled("raymill/role", "submitter"), unscheduled(message))]
    operator.look()
    (said,) = asked("why-pending", "pretrain").items()
    assert said[0].startswith("pretrain-")
    assert said[1] == "no node of 3 has room: 1 lack cpu, 2 have a taint that it does not tolerate"


def test_redis_without_a_volume_is_shown_by_what_waits_for_it(
    api: ApiStandIn, asked: Asked, operator: OperatorStandIn
) -> None:
    message = "0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims. not found"
    operator.fates = [(labelled("raymill/role", "redis"), unscheduled(message))]
    operator.look()
    claim = api.get(f"{CORE}/persistentvolumeclaims/data-redis-0")
    unbound = "no persistent volumes available for this claim and no storage class is set"
    api.event(claim, "FailedBinding", unbound)
    for name in ("shared", "completions"):
        assert asked("why-pending", name) == {"redis-0": f"its volume is not there yet: {unbound}"}
    assert asked("why-pending", "pretrain") == NOTHING


def test_a_service_that_starts_shows_its_pending_cluster(
    api: ApiStandIn, asked: Asked, operator: OperatorStandIn
) -> None:
    message = 'MountVolume.SetUp failed for volume "api-keys" : secret "api-keys" not found'
    is_head = labelled("ray.io/node-type", "head")
    operator.fates = [
        (lambda pod: is_head(pod) and "completions" in pod["metadata"]["name"], unmounted(message))
    ]
    operator.look()
    said = asked("why-pending", "completions")
    assert list(said.values()) == [f"a volume cannot be mounted: {message}"]
    cluster = ray_object(api, "RayService", "completions")["status"]["pendingServiceStatus"][
        "rayClusterName"
    ]
    assert (
        asked("status", "completions")["RayService/completions"][0]
        == "does not answer yet (Initializing)"
    )
    assert f"RayCluster/{cluster}" not in asked("status"), "it is a part of the service"


def test_events_of_an_object_that_had_the_name_before_say_nothing(
    api: ApiStandIn, asked: Asked, operator: OperatorStandIn
) -> None:
    operator.look()
    before = ray_object(api, "RayService", "completions")
    said = "Failed to create the RayCluster raymill/completions-vnjkh: exceeded quota: raymill, requested: pods=1, used: pods=14, limited: pods=14"
    api.event(before, "FailedToCreateRayCluster", said, kind="Warning", at="2999-01-01T00:00:00Z")
    assert asked("why-pending", "completions") == {
        "RayService/completions": "no more pods: the quota raymill is used up (requested: pods=1)"
    }
    api.delete(f"{RAY}/rayservices/completions")
    asked("apply", "dev", "--component", "completions")
    operator.look()
    assert asked("why-pending", "completions") == NOTHING


def test_a_newer_success_is_believed(
    api: ApiStandIn, asked: Asked, operator: OperatorStandIn
) -> None:
    operator.look()
    job = ray_object(api, "RayJob", "pretrain")
    said = "Failed to create RayCluster raymill/pretrain-a: quota"
    api.event(job, "FailedToCreateRayCluster", said, kind="Warning", at="2999-01-01T00:00:00Z")
    assert "RayJob/pretrain" in asked("why-pending", "pretrain")
    api.event(
        job, "CreatedRayCluster", "Created RayCluster raymill/pretrain-a", at="2999-01-01T00:00:09Z"
    )
    assert asked("why-pending", "pretrain") == NOTHING


def test_a_submitter_that_cannot_be_made_is_shown(
    api: ApiStandIn, asked: Asked, operator: OperatorStandIn
) -> None:
    operator.look()
    (submitter,) = api.list(f"{CORE}/pods", "job-name=pretrain")["items"]
    api.delete(f"{CORE}/pods/{submitter['metadata']['name']}")
    refused = 'Error creating: pods "pretrain-x" is forbidden: exceeded quota: raymill, requested: pods=1, used: pods=14, limited: pods=14'
    owner = api.get("/apis/batch/v1/namespaces/raymill/jobs/pretrain")
    api.event(owner, "FailedCreate", refused, kind="Warning")
    assert asked("why-pending", "pretrain") == {
        "Job/pretrain": "no more pods: the quota raymill is used up (requested: pods=1)"
    }


def test_what_is_suspended_or_not_looked_at_says_so(
    api: ApiStandIn, asked: Asked, operator: OperatorStandIn
) -> None:
    assert "is the operator running" in asked("why-pending", "pretrain")["RayJob/pretrain"]
    operator.look()
    asked("scale", "completions", "--suspend")
    operator.look()
    assert asked("why-pending", "completions")["RayService/completions"].startswith(
        "is suspended: it has no pods"
    )


def test_a_missing_account_of_the_head_is_shown(
    api: ApiStandIn, asked: Asked, operator: OperatorStandIn
) -> None:
    for account in ("ray-head", "serving-head"):
        api.delete(f"{CORE}/serviceaccounts/{account}")
    operator.look()
    for name, account in (
        ("shared", "ray-head"),
        ("evaluate", "ray-head"),
        ("completions", "serving-head"),
    ):
        (reason,) = asked("why-pending", name).values()
        assert (
            reason.startswith("KubeRay cannot go on: ")
            and f"ServiceAccount {account} is not found" in reason
        )
    assert "is not found" in asked("status", "shared")["RayCluster/shared"][0]


def test_an_object_that_kuberay_refuses_is_not_put_down_to_the_operator(
    api: ApiStandIn, asked: Asked, operator: OperatorStandIn
) -> None:
    shared = ray_object(api, "RayCluster", "shared")
    name = "shared-" + "x" * 56
    api.put(
        f"{RAY}/rayclusters/{name}", shared | {"metadata": {"name": name, "namespace": "raymill"}}
    )
    assert "is the operator running" in asked("why-pending", name)[f"RayCluster/{name}"]
    operator.look()
    expected = "KubeRay refuses it: RayCluster name should be no more than 53 characters"
    assert asked("why-pending", name) == {f"RayCluster/{name}": expected}
    assert asked("status", name)[f"RayCluster/{name}"][0] == expected


def test_a_refusal_of_before_is_told_with_that_nobody_looks(
    api: ApiStandIn, asked: Asked, operator: OperatorStandIn
) -> None:
    operator.look()
    cluster = ray_object(api, "RayCluster", "shared")
    condition = {"type": "ReplicaFailure", "status": "True", "message": "denied by a policy"}
    status = cluster["status"] | {"conditions": [condition]}
    api.put(f"{RAY}/rayclusters/shared", cluster | {"status": status})
    told = "a pod cannot be made: denied by a policy"
    assert asked("why-pending", "shared") == {"RayCluster/shared": told}
    asked("scale", "shared", "--min", "1", "--max", "2")
    since = f"{told}; and KubeRay has not seen its newest change: is the operator running?"
    assert asked("why-pending", "shared") == {"RayCluster/shared": since}


def test_what_an_operator_that_is_gone_has_not_made_is_shown(
    api: ApiStandIn, asked: Asked, operator: OperatorStandIn
) -> None:
    asked("scale", "shared", "--min", "2", "--max", "2")
    operator.look()
    assert asked("why-pending") == NOTHING
    asked("scale", "shared", "--min", "4", "--max", "4")
    unseen = "2 of 4 worker pods exist, and KubeRay has not seen its newest change: is the operator running?"
    assert asked("why-pending", "shared") == {"RayCluster/shared": unseen}
    (head,) = api.list(f"{CORE}/pods", "ray.io/cluster=shared,ray.io/node-type=head")["items"]
    operator.look()
    assert asked("why-pending") == NOTHING
    api.delete(f"{CORE}/pods/{head['metadata']['name']}")
    gone = "its head's pod does not exist, and KubeRay has made no more: is the operator running?"
    assert asked("why-pending", "shared") == {"RayCluster/shared": gone}


def test_a_job_without_its_cluster_is_shown(
    api: ApiStandIn, asked: Asked, operator: OperatorStandIn
) -> None:
    operator.look()
    cluster = cluster_behind(api, ray_object(api, "RayJob", "pretrain"))["metadata"]["name"]
    for pod in api.list(f"{CORE}/pods", f"ray.io/cluster={cluster}")["items"]:
        api.delete(f"{CORE}/pods/{pod['metadata']['name']}")
    api.delete(f"{RAY}/rayclusters/{cluster}")
    said = "has no cluster; KubeRay says that it has a cluster, on which"
    assert asked("why-pending", "pretrain")["RayJob/pretrain"].startswith(said)


def test_a_quota_for_workers_is_told_in_one_line(
    api: ApiStandIn, asked: Asked, operator: OperatorStandIn
) -> None:
    operator.look()
    cluster = ray_object(api, "RayCluster", "shared")
    refused = 'pods "shared-x" is forbidden: maximum cpu usage per Container is 1, but limit is 2'
    condition = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreateWorkerPod"}
    condition["message"] = f"FailedCreateWorkerPod\n{refused}"
    api.put(
        f"{RAY}/rayclusters/shared",
        cluster | {"status": cluster["status"] | {"conditions": [condition]}},
    )
    assert asked("why-pending", "shared") == {
        "RayCluster/shared": f"a pod cannot be made: {refused}"
    }


def test_a_node_that_does_not_answer_is_told(
    api: ApiStandIn, asked: Asked, operator: OperatorStandIn
) -> None:
    asked("scale", "shared", "--min", "2", "--max", "2")
    operator.look()
    pods = {
        pod["metadata"]["labels"]["ray.io/node-type"]: pod["metadata"]["name"]
        for pod in api.list(f"{CORE}/pods", "ray.io/cluster=shared")["items"]
    }
    operator.lose_node("cpu-1", *pods.values())
    told = "its node cpu-1 does not answer; Kubernetes removes the pod after five minutes of that"
    assert asked("why-pending") == dict.fromkeys(pods.values(), told)
    said = asked("status", "shared")["RayCluster/shared"]
    assert said[1] == "workers: 2 to 2 pods, 2 wanted, 1 running"
    assert said[2].startswith("cut off, as their nodes do not answer: ")
    assert {*said[2].partition(": ")[2].split(", ")} == {*pods.values()}

    for event in api.list(f"{CORE}/events")["items"]:  # which Kubernetes keeps for an hour
        api.delete(f"{CORE}/events/{event['metadata']['name']}")
    assert asked("why-pending") == dict.fromkeys(pods.values(), told)
    head = f"{CORE}/pods/{pods['head']}"
    leaving = api.get(head)
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    api.put(head, leaving)
    stuck = (
        "its node cpu-1 does not answer, so it cannot end: delete the node if its machine is gone"
    )
    assert asked("why-pending", "shared") == {pods["worker"]: told, pods["head"]: stuck}


def test_a_pod_that_is_not_ready_by_itself_is_not_put_down_to_its_node(
    api: ApiStandIn, asked: Asked, operator: OperatorStandIn
) -> None:
    """Its probe fails, or a load balancer has not registered it."""
    operator.look()
    (head,) = api.list(f"{CORE}/pods", "ray.io/cluster=shared,ray.io/node-type=head")["items"]
    path = f"{CORE}/pods/{head['metadata']['name']}"
    for containers, gates in (("False", []), ("True", [{"conditionType": "elb/registered"}])):
        pod = api.get(path)
        states = {"Ready": "False", "ContainersReady": containers}
        pod["status"]["conditions"] = [
            {"type": kind, "status": status} for kind, status in states.items()
        ]
        pod["spec"]["readinessGates"] = gates
        api.put(path, pod)
        api.event(pod, "Unhealthy", "Readiness probe failed", kind="Warning")
        assert asked("why-pending", "shared") == NOTHING
        assert not [
            line for line in asked("status", "shared")["RayCluster/shared"] if "cut" in line
        ]

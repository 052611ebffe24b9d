"""`raymill cluster scale` reaches a running cluster, job or service, and says so if it does not."""

import pytest

from tests.k8s.api_stand_in import ApiStandIn
from tests.k8s.cluster_cli import RAY, Asked, cluster_behind, ray_object
from tests.k8s.manifests import Manifest, cluster_spec
from tests.k8s.operator_stand_in import OperatorStandIn, unpulled

pytestmark = pytest.mark.more


@pytest.fixture
def operator(api: ApiStandIn, asked: Asked) -> OperatorStandIn:
    """Serves `dev`, after the operator's first look at all of it."""
    asked("apply", "dev")
    operator = OperatorStandIn(api)
    operator.look()
    return operator


def bounds(manifest: Manifest) -> tuple[int, int]:
    (group,) = cluster_spec(manifest)["workerGroupSpecs"]
    return group["minReplicas"], group["maxReplicas"]


@pytest.mark.parametrize(
    "owner", ["RayCluster/shared", "RayJob/pretrain", "RayService/completions"]
)
def test_the_pods_that_run_follow(
    api: ApiStandIn, asked: Asked, operator: OperatorStandIn, owner: str
) -> None:
    kind, name = owner.split("/")
    manifest = ray_object(api, kind, name)
    cluster = manifest if kind == "RayCluster" else cluster_behind(api, manifest)
    group = cluster_spec(manifest)["workerGroupSpecs"][0]["groupName"]

    def workers() -> int:
        operator.look()
        selector = f"ray.io/cluster={cluster['metadata']['name']},ray.io/node-type=worker"
        return len(api.list("/api/v1/namespaces/raymill/pods", selector)["items"])

    before = bounds(manifest)
    changed = asked("scale", owner.lower(), "--min", "2", "--max", "6")
    assert changed["changed"] == list(
        dict.fromkeys([f"RayCluster/{cluster['metadata']['name']}", owner])
    )
    assert changed["groups"][0].startswith(f"{group}: 2 to 6 pods, 2 wanted")
    assert workers() == 2
    asked("scale", owner.lower(), "--group", group, "--min", "0", "--max", "0")
    assert workers() == 0
    assert bounds(ray_object(api, kind, name)) == (0, 0), "the next cluster would have pods"
    asked("scale", owner.lower(), "--group", group, "--min", "2", "--max", "6")
    assert workers() == 2
    assert before != bounds(ray_object(api, kind, name)) == (2, 6)


def test_without_a_head_surplus_pods_stay_and_it_says_so(
    api: ApiStandIn, asked: Asked, operator: OperatorStandIn
) -> None:
    """KubeRay leaves them to the autoscaler, a container of the head's pod."""
    selector = "ray.io/cluster=shared,ray.io/node-type=worker"
    assert "note" not in asked("scale", "shared", "--min", "2")
    operator.fates = [(lambda pod: True, unpulled("raymill:0.1.0"))]
    operator.look()
    told = asked("scale", "shared", "--group", "workers", "--min", "0", "--max", "0")
    assert told["note"].startswith("its head is not up: surplus pods stay until its autoscaler")
    operator.look()
    assert len(api.list("/api/v1/namespaces/raymill/pods", selector)["items"]) == 2
    assert "note" not in asked("scale", "shared", "--group", "workers", "--min", "2", "--max", "2")
    operator.fates = []
    operator.look()
    assert "note" not in asked("scale", "shared", "--min", "0", "--max", "1")
    operator.look()
    assert not api.list("/api/v1/namespaces/raymill/pods", selector)["items"]


def test_a_service_is_suspended_once_redis_is_cleaned_and_not_before(
    api: ApiStandIn, asked: Asked, operator: OperatorStandIn
) -> None:
    operator.fates = [
        (lambda pod: "redis-cleanup" in pod["metadata"]["name"], unpulled("raymill:0.1.0"))
    ]
    name = "RayService/completions"
    before = cluster_behind(api, ray_object(api, *name.split("/")))["metadata"]["name"]
    asked("scale", "completions", "--suspend")
    operator.look()
    assert (
        asked("status", "completions")[name][0] == "is being suspended: its pods are being removed"
    )
    asked("scale", "completions", "--resume")  # KubeRay goes through with it all the same
    operator.look()
    assert "deletionTimestamp" in ray_object(api, "RayCluster", before)["metadata"]
    assert asked("scale", "completions", "--max", "2")["note"].startswith("it has no cluster now")
    operator.fates = []
    operator.look()
    assert api.get(f"{RAY}/rayclusters/{before}") is None
    operator.look()
    assert "is answering" in asked("status", "completions")[name][0]


def test_the_next_cluster_has_the_bounds_too(
    api: ApiStandIn, asked: Asked, operator: OperatorStandIn
) -> None:
    asked("scale", "rayjob/pretrain", "--min", "2", "--max", "5")
    asked("scale", "pretrain", "--suspend")
    operator.look()
    told = asked("scale", "pretrain", "--max", "6")
    assert told["note"] == "it has no cluster now: the next one starts with these bounds"
    asked("scale", "pretrain", "--resume")
    operator.look()
    assert bounds(cluster_behind(api, ray_object(api, "RayJob", "pretrain"))) == (2, 6)


def test_a_service_that_gets_another_cluster_has_both_scaled(
    api: ApiStandIn, asked: Asked, operator: OperatorStandIn
) -> None:
    operator.fates = [(lambda pod: True, ({"phase": "Pending"}, []))]
    service = ray_object(api, "RayService", "completions")
    service["spec"]["rayClusterConfig"]["rayVersion"] = "2.60.1"
    api.put(f"{RAY}/rayservices/completions", service)
    operator.look()
    assert len(asked("scale", "completions", "--max", "2", "--min", "2")["changed"]) == 3


def test_a_service_has_a_maximum_of_its_own(asked: Asked, operator: OperatorStandIn) -> None:
    told = asked("scale", "completions", "--max", "6")
    assert (
        told["note"]
        == "its settings allow 2 replicas, so more pods find no work: raise `max_replicas` too"
    )
    assert "note" not in asked("scale", "completions", "--max", "2")


@pytest.mark.parametrize(
    "words", [["--suspend"], ["--resume"], ["--max", "3"], ["--group", "trainers", "--max", "3"]]
)
def test_a_job_that_has_ended_is_not_scaled(
    api: ApiStandIn, asked: Asked, operator: OperatorStandIn, words: list[str]
) -> None:
    for deployment, status, says in (
        ("Complete", "SUCCEEDED", "is done"),
        ("Failed", "FAILED", "has failed"),
    ):
        operator.end_job("pretrain", deployment=deployment, status=status)
        before = ray_object(api, "RayJob", "pretrain")["spec"]
        assert f"RayJob/pretrain {says}: nothing of it runs" in asked.refused(
            "scale", "pretrain", *words
        )
        assert ray_object(api, "RayJob", "pretrain")["spec"] == before


def test_what_cannot_be_asked_for_is_refused(
    api: ApiStandIn, asked: Asked, operator: OperatorStandIn
) -> None:
    assert "nothing to change" in asked.refused("scale", "shared", code=2)
    assert "9 to 2 pods; expected 0 <= min <= max" in asked.refused(
        "scale", "pretrain", "--min", "9", code=2
    )
    assert "RayCluster/shared" in asked.refused("scale", "other", "--max", "1")
    writers = {
        entry["manager"]
        for entry in ray_object(api, "RayCluster", "shared")["metadata"]["managedFields"]
    }
    asked("scale", "shared", "--max", "1")
    after = {
        entry["manager"]
        for entry in ray_object(api, "RayCluster", "shared")["metadata"]["managedFields"]
    }
    assert "OpenAPI-Generator" not in after and writers <= after

"""The manifests and `raymill cluster` work with a real Kubernetes: `make test-live`, see
`live_cluster.py`.

The first tests need only an API server with KubeRay's CRDs; the next also need KubeRay's operator,
with an image that nobody has; the last one needs an image, and evicts a pod of a run.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client
from kubernetes.client import V1Eviction, V1ObjectMeta

from cluster.kube.kustomize import rendered_overlay
from cluster.storage.uris import open_storage
from tests.k8s.cluster_cli import operators_rights
from tests.k8s.live_cluster import (
    IMAGE,
    KUBECONFIG,
    NOBODYS,
    STORAGE,
    LiveCluster,
    live_cluster,
    ships,
)
from tests.k8s.manifests import K8S, cluster_spec, pods, render

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(
        KUBECONFIG not in os.environ,
        reason=f"no {KUBECONFIG}: a real cluster is asked only where named",
    ),
]

NAMES = ("RayCluster/shared", "RayJob/pretrain", "RayService/completions")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    with live_cluster(tmp_path_factory.mktemp("live")) as live:
        dry = live.apply("--dry-run")
        assert "not_checked" in dry and "failed" not in dry
        yield live


@pytest.fixture(scope="module")
def applied(live: LiveCluster) -> LiveCluster:
    assert "failed" not in live.apply()
    return live


@pytest.fixture(scope="module")
def admitting(applied: LiveCluster) -> LiveCluster:
    applied.admit_pods()
    return applied


@pytest.fixture(scope="module")
def operated(applied: LiveCluster) -> LiveCluster:
    applied.needs_operator()
    return applied


# With an API server alone


def test_it_is_applied_any_number_of_times(applied: LiveCluster) -> None:
    for words in ((), (), ("--dry-run",)):
        result = applied.apply(*words)
        assert len(result["checked" if words else "applied"]) == len(
            rendered_overlay(applied.overlay)
        )
        assert not result.keys() & {"failed", "not_checked", "kept"}


def test_an_operator_of_raymill_may_do_its_work_and_no_more(applied: LiveCluster) -> None:
    forbidden = {
        ("", "secrets", "get"),
        ("", "pods", "create"),
        ("", "pods/exec", "create"),
        ("", "serviceaccounts/token", "create"),
        ("ray.io", "rayclusters", "delete"),
        ("rbac.authorization.k8s.io", "rolebindings", "create"),
    }
    for right in operators_rights() | forbidden:
        group, resource, verb = right
        what, _, sub = resource.partition("/")
        attributes = client.V1ResourceAttributes(
            namespace=applied.namespace,
            group=group,
            resource=what,
            subresource=sub or None,
            verb=verb,
        )
        spec = client.V1SubjectAccessReviewSpec(
            user="somebody",
            groups=["raymill-operators", "system:authenticated"],
            resource_attributes=attributes,
        )
        review = client.AuthorizationV1Api().create_subject_access_review(
            client.V1SubjectAccessReview(spec=spec)
        )
        assert review.status.allowed is (right not in forbidden), right


@pytest.mark.parametrize("overlay", ["dev", "gpu", "spot"])
def test_each_pod_is_one_that_the_namespace_takes(admitting: LiveCluster, overlay: str) -> None:
    """The API server itself enforces PodSecurity, the quota, priorities and service accounts."""
    for pod in pods(render(f"overlays/{overlay}")):
        metadata = pod.template["metadata"] | {"name": "pod-of-a-template"}
        # In place of its claim
        data = [{"name": "data", "emptyDir": {}}] if pod.role == "redis" else []
        spec = pod.spec | {"volumes": [*pod.spec["volumes"], *data]}
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
        client.CoreV1Api().create_namespaced_pod(admitting.namespace, body, dry_run="All")


# With KubeRay's operator


@pytest.mark.parametrize("name", NAMES)
def test_what_runs_is_scaled(operated: LiveCluster, name: str) -> None:
    kind, plain = name.split("/")
    found = operated.cluster_of(kind, plain)
    cluster, (group,) = found["metadata"]["name"], cluster_spec(found)["workerGroupSpecs"]

    def has(lowest: int, most: int, wanted: int) -> None:
        """Waits for KubeRay, which makes what is wanted, and leaves the removal of surplus pods to
        the autoscaler."""

        def agrees() -> bool:
            are_made = len(operated.workers(cluster)) >= wanted
            return are_made and operated.bounds(cluster) == (lowest, most, wanted)

        operated.until(agrees, f"{cluster} has {lowest} to {most} workers and wants {wanted}")

    operated.cluster("scale", name.lower(), "--min", "2", "--max", "3")
    has(2, 3, 2)
    assert (
        f"{group['groupName']}: 2 to 3 pods, 2 wanted"
        in operated.cluster("status", name.lower())[name][1]
    )
    assert "kept" in operated.apply()  # the scaling, also of what KubeRay has written since
    has(2, 3, 2)
    operated.cluster(
        "scale", name.lower(), "--group", group["groupName"], "--min", "0", "--max", "0"
    )
    has(0, 0, 0)
    said = operated.cluster("status", name.lower())[name][1]
    assert f"{group['groupName']}: 0 to 0 pods, 0 wanted" in said
    assert "kept" in operated.apply()
    has(0, 0, 0)
    operated.cluster(
        "scale", name.lower(), "--group", group["groupName"], "--min", "2", "--max", "3"
    )
    has(2, 3, 2)
    operated.cluster("scale", name.lower(), "--min", "1", "--max", "2")


@pytest.mark.parametrize("name", NAMES)
def test_all_of_it_is_suspended_and_resumed(operated: LiveCluster, name: str) -> None:
    kind, plain = name.split("/")
    before = operated.cluster_of(kind, plain)["metadata"]["name"]
    operated.cluster("scale", name.lower(), "--min", "1")
    operated.suspend(name)
    selectors = [f"ray.io/cluster={before},ray.io/node-type={role}" for role in ("head", "worker")]
    operated.until(
        lambda: not any(operated.api.all("v1", "Pod", selector=s) for s in selectors),
        "its pods are gone",
    )
    assert "failed" not in operated.apply()
    assert operated.is_suspended(name)
    operated.cluster("scale", name.lower(), "--resume")
    cluster = operated.cluster_of(kind, plain)["metadata"]["name"]
    operated.until(lambda: operated.workers(cluster), f"{name} has workers again")


def test_a_job_that_has_ended_is_not_scaled(operated: LiveCluster) -> None:
    def has_failed() -> bool:
        return "has failed" in operated.cluster("status", "evaluate")["RayJob/evaluate"][0]

    operated.until(has_failed, "RayJob/evaluate runs out of time")
    error = operated.cluster("scale", "evaluate", "--suspend", code=1)["error"]
    assert "nothing of it runs" in error


def test_a_quota_is_told_of_and_no_more_once_it_is_raised(operated: LiveCluster) -> None:
    """Uses a job that is new: KubeRay gives up one whose head has not answered for five minutes."""
    operated.api.delete("ray.io/v1", "RayJob", "pretrain")
    operated.until(
        lambda: operated.api.get("ray.io/v1", "RayJob", "pretrain") is None, "the job is gone"
    )
    operated.apply("--component", "pretrain")
    cluster = operated.cluster_of("RayJob", "pretrain")["metadata"]["name"]
    operated.until(lambda: operated.workers(cluster), "its worker is there")

    def says() -> Any:
        return operated.cluster("why-pending", "rayjob/pretrain").get(f"RayCluster/{cluster}", "")

    operated.set_quota(1)
    try:
        operated.cluster("scale", "pretrain", "--min", "4", "--max", "4")
        operated.until(lambda: "the quota raymill is used up" in says(), "the quota is told of")
        assert (
            "cannot make its pods"
            in operated.cluster("status", cluster)[f"RayCluster/{cluster}"][0]
        )
    finally:
        operated.set_quota(64)
    operated.until(lambda: not says(), "the quota is not told of any more", timeout_s=300)
    operated.cluster("scale", "pretrain", "--min", "1", "--max", "2")


def test_a_secret_that_is_missing_is_told_of(operated: LiveCluster) -> None:
    def says() -> str:
        return " ".join(operated.cluster("why-pending", "completions").values())

    operated.until(lambda: 'secret "api-keys" not found' in says(), "the Secret is told of")
    secret = client.V1Secret(metadata=V1ObjectMeta(name="api-keys"), string_data={"keys": "a"})
    client.CoreV1Api().create_namespaced_secret(operated.namespace, secret)
    # A kubelet tries again after two minutes at the latest.
    operated.until(
        lambda: "api-keys" not in says(), "the Secret is not told of any more", timeout_s=400
    )


def test_a_volume_that_nobody_makes_is_told_of(operated: LiveCluster) -> None:
    for name in ("shared", "completions"):

        def is_said(name: str = name) -> bool:
            said = operated.cluster("why-pending", name).get("redis-0", "")
            return said.startswith("its volume is not there yet: ") and NOBODYS in said

        operated.until(is_said, "the volume is told of")


@pytest.mark.parametrize("reason", ["a taint", "labels", "GPUs"])
def test_a_node_that_does_not_fit_is_told_of(operated: LiveCluster, reason: str) -> None:
    everything = [{"operator": "Exists"}]
    # As the quota allows, and no node has
    gpus = {"cpu": "10m", "memory": "64Mi", "nvidia.com/gpu": "16"}
    tainted = _tainted_node()
    spec, says = {
        "a taint": ({"affinity": _only_on(tainted)}, "taint"),
        "labels": (
            {"nodeSelector": {"nvidia.com/gpu.product": NOBODYS}, "tolerations": everything},
            "lack the labels",
        ),
        "GPUs": ({"tolerations": everything, "resources": gpus}, "lack nvidia.com/gpu"),
    }[reason]
    if reason == "a taint" and tainted is None:
        pytest.skip("no node has a taint")
    operated.suspend("RayCluster/shared")  # KubeRay does not change pods that are there
    operated.cluster(
        "apply", str(_with_workers(operated.overlay, reason, spec)), "--component", "shared"
    )
    operated.cluster("scale", "shared", "--min", "1", "--max", "1")
    operated.cluster("scale", "shared", "--resume")
    said: list[str] = []

    def is_said() -> bool:
        reasons = operated.cluster("why-pending", "shared")
        said[:] = [
            reasons[worker]
            for worker in operated.workers("shared")
            if "no node of" in reasons.get(worker, "")
        ]
        return bool(said)

    try:
        operated.until(is_said, "the scheduler has looked at it")
        assert says in said[0], said
        assert "{" not in said[0] and "preemption" not in said[0] and "taint ." not in said[0], said
    finally:
        operated.apply("--component", "shared")


def _tainted_node() -> str | None:
    """Returns the name of a node with a taint that is not cordoned, which the scheduler looks at
    first."""
    for node in client.CoreV1Api().list_node().items:
        if (
            any(taint.effect == "NoSchedule" for taint in node.spec.taints or [])
            and not node.spec.unschedulable
        ):
            return str(node.metadata.name)
    return None


def _only_on(node: str | None) -> dict[str, Any]:
    fields = [{"key": "metadata.name", "operator": "In", "values": [node]}]
    terms = {"nodeSelectorTerms": [{"matchFields": fields}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}


def _with_workers(overlay: Path, reason: str, spec: dict[str, Any]) -> Path:
    """Writes a kustomization in which the workers of `shared` have this in their pods; `resources`
    is the container's."""
    # One inside it would be a cycle
    folder = overlay.with_name(f"{overlay.name}-{reason.replace(' ', '-')}")
    folder.mkdir(exist_ok=True)
    at = "/spec/workerGroupSpecs/0/template/spec"
    steps = [
        {"op": "add", "path": f"{at}/{key}", "value": value}
        for key, value in spec.items()
        if key != "resources"
    ]
    if resources := spec.get("resources"):
        both = {"requests": resources, "limits": resources}
        steps.append({"op": "add", "path": f"{at}/containers/0/resources", "value": both})
    patches = [{"target": {"kind": "RayCluster", "name": "shared"}, "patch": yaml.safe_dump(steps)}]
    (folder / "kustomization.yaml").write_text(
        yaml.safe_dump({"resources": [f"../{overlay.name}"], "patches": patches})
    )
    return folder


# With an image


@pytest.mark.skipif(
    not {IMAGE, STORAGE} <= os.environ.keys(), reason=f"no {IMAGE} and {STORAGE}: no run"
)
def test_a_run_loses_no_step_to_an_eviction(operated: LiveCluster, tmp_path: Path) -> None:
    """`RAYMILL_LIVE_STORAGE` is an s3:// URI that this machine and the pods reach, with
    AWS_ACCESS_KEY_ID and so on."""
    core, uri = client.CoreV1Api(), os.environ[STORAGE].rstrip("/")
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    keys = {name: os.environ[name] for name in names if name in os.environ}
    secret = client.V1Secret(metadata=V1ObjectMeta(name="s3-credentials"), string_data=keys)
    # Which leave it the room, and would run with these keys
    for name in (*NAMES, "RayJob/tokenize"):
        operated.suspend(name)
    core.create_namespaced_secret(operated.namespace, secret)
    open_storage(uri).write_bytes(f"{operated.namespace}/corpus/ships.jsonl", ships())
    values = yaml.safe_load((K8S / "overlays/dev/run.yaml").read_text())
    values |= {"run_id": operated.namespace, "storage": {"uri": f"{uri}/{operated.namespace}"}}
    values["data"] |= {"source": f"{uri}/{operated.namespace}/corpus", "vocab_size": 300}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    where = ["--storage.uri", values["storage"]["uri"]]
    submitted = operated.raymill(
        "submit",
        "pretrain",
        str(tmp_path / "run.yaml"),
        "--kuberay",
        str(operated.overlay),
        "-n",
        operated.namespace,
    )
    cluster = operated.cluster_of("RayJob", submitted["job"])["metadata"]["name"]

    def running() -> list[str]:
        pods = {pod["metadata"]["name"]: pod for pod in operated.api.all("v1", "Pod")}
        return [
            name
            for name in operated.workers(cluster)
            if pods[name]["status"].get("phase") == "Running"
        ]

    def has_ended() -> bool:
        return operated.raymill("status", operated.namespace, *where)["state"] not in (
            "pending",
            "running",
        )

    operated.until(lambda: len(running()) == 2 or has_ended(), "two workers run", timeout_s=900)
    ledger = open_storage(values["storage"]["uri"]).child(f"runs/{operated.namespace}")
    operated.until(
        lambda: b'"step": 20' in _read(ledger) or has_ended(),
        "the run has taken 20 steps, or ended",
        timeout_s=900,
    )
    assert not has_ended(), operated.raymill("logs", operated.namespace, *where)["lines"][-20:]
    evicted = running()[-1]
    body = V1Eviction(metadata=V1ObjectMeta(name=evicted, namespace=operated.namespace))
    core.create_namespaced_pod_eviction(evicted, operated.namespace, body)

    operated.until(has_ended, "the run ends", timeout_s=1800)
    told = operated.raymill("status", operated.namespace, *where)
    assert told["state"] == "succeeded", told
    assert told["result"]["restarts"] >= 1 and told["result"]["lost_steps"] == 0, told


def _read(run: Any) -> bytes:
    return run.read_bytes("ledger.jsonl") if run.stat("ledger.jsonl") else b""

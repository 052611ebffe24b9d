"""The policies of k8s/admission admit what the manifests make, and refuses pods that reach what an
operator may not."""

import copy
import functools
from typing import Any

import pytest

from tests.k8s.admission import refusals
from tests.k8s.api_stand_in import ApiStandIn
from tests.k8s.cluster_cli import Asked
from tests.k8s.manifests import (
    CLUSTER_KINDS,
    K8S,
    Manifest,
    cluster_spec,
    find,
    name_of,
    of_kind,
    pods,
    render,
)
from tests.k8s.schema_rules import builtin_problems

_OPERATORS = ("raymill-operators", "system:authenticated")
_DIGEST = "@sha256:" + "0" * 64


@functools.cache
def policy() -> Manifest:
    """Returns the policy of a cluster whose images are from registry.example.com."""
    found = find(render("admission"), "ValidatingAdmissionPolicy/raymill-ray-kinds")
    (registry,) = [it for it in found["spec"]["variables"] if it["name"] == "registry"]
    assert registry["expression"] == '""'
    registry["expression"] = '"registry.example.com/"'
    return found


@functools.cache
def by_digest(kustomization: str) -> list[Manifest]:
    """Returns Ray's objects of a kustomization with the images that an overlay of one's own
    names."""
    objects = of_kind(render(kustomization), *CLUSTER_KINDS)
    for pod in pods(objects):
        name = pod.container["image"].rpartition(":")[0]
        pod.container["image"] = f"registry.example.com/{name}{_DIGEST}"
    return objects


@pytest.mark.parametrize(
    "kustomization",
    [
        "overlays/dev",
        "overlays/kueue",
        "overlays/spot",
        "overlays/gpu + components/huggingface",
        "overlays/gpu + components/redis-tls",
    ],
)
def test_what_the_manifests_make_is_admitted(kustomization: str) -> None:
    for manifest in by_digest(kustomization):
        assert refusals(policy(), manifest) == [], name_of(manifest)


_POD = {"serviceAccountName": "trainer", "automountServiceAccountToken": False}
_TOKEN = {"name": "kubernetes-token", "mountPath": "/token"}
_KEYS = {"name": "K", "valueFrom": {"secretKeyRef": {"name": "api-keys", "key": "keys"}}}
_REDIS = {"redisAddress": "redis:6379"}
_OF_JOBS = _REDIS | {"redisPassword": {"valueFrom": {"secretKeyRef": {"name": "redis"}}}}
_OF_KEYS = _REDIS | {"redisPassword": {"valueFrom": {"secretKeyRef": {"name": "api-keys"}}}}

# Where the object is spoilt (`head.` and `worker.` are pod specs, `box.` the head's container), what
# is put there, and what the refusal says.
_PLANTED: list[tuple[str, str, Any, str]] = [
    ("RayJob/pretrain", "worker.serviceAccountName", "server", "a worker as tokenizer, trainer"),
    ("RayJob/pretrain", "head.serviceAccountName", "serving-head", "a head runs as ray-head"),
    ("RayCluster/shared", "worker.serviceAccountName", "redis", "a worker as tokenizer, trainer"),
    ("RayJob/pretrain", "worker.automountServiceAccountToken", True, "pods mount no token"),
    ("RayJob/pretrain", "head.shareProcessNamespace", True, "share no process namespace"),
    ("RayJob/pretrain", "head.volumes.+", {"name": "k", "secret": {"secretName": "api-keys"}}, "volumes are"),
    ("RayJob/pretrain", "head.volumes.+", {"name": "k", "persistentVolumeClaim": {"claimName": "data-redis-0"}}, "volumes are"),
    ("RayJob/pretrain", "head.volumes.+", {"name": "kubernetes-token", "projected": {"sources": [{"secret": {"name": "api-keys"}}]}}, "volumes are"),
    ("RayJob/pretrain", "worker.volumes.+", {"name": "kubernetes-token", "projected": {"sources": [{"serviceAccountToken": {}}]}}, "volumes are"),
    ("RayJob/pretrain", "box.volumeMounts.+", _TOKEN, "for the autoscaler's container alone"),
    ("RayJob/pretrain", "box.env", [_KEYS], "read the Secrets s3-credentials"),
    ("RayJob/pretrain", "box.envFrom.+", {"secretRef": {"name": "redis"}}, "read the Secrets s3-credentials"),
    ("RayJob/pretrain", "head.initContainers", [{"image": f"registry.example.com/raymill{_DIGEST}", "env": [_KEYS]}], "read the Secrets s3-credentials"),
    ("RayJob/pretrain", "box.image", "registry.example.com/raymill:0.1.0", "by digest"),
    ("RayJob/pretrain", "box.image", f"elsewhere.example.com/raymill{_DIGEST}", "by digest"),
    ("RayJob/pretrain", "cluster.autoscalerOptions.args", ["curl"], "the autoscaler, which has a token"),
    ("RayJob/pretrain", "cluster.autoscalerOptions.image", f"registry.example.com/raymill{_DIGEST}", "the autoscaler, which has a token"),
    ("RayJob/pretrain", "cluster.autoscalerOptions.env", [{"name": "PYTHONPATH", "value": "/tmp"}], "the autoscaler, which has a token"),
    ("RayJob/pretrain", "cluster.autoscalerOptions.volumeMounts.+", {"name": "run-config", "mountPath": "/app"}, "the autoscaler, which has a token"),
    ("RayJob/pretrain", "cluster.gcsFaultToleranceOptions", _OF_JOBS, "or none where it is a job's"),
    ("RayCluster/shared", "cluster.gcsFaultToleranceOptions", _OF_KEYS, "by the Secret redis"),
    ("RayCluster/shared", "cluster.authOptions.mode", "disabled", "a cluster has Ray's token"),
    ("RayJob/pretrain", "spec.clusterSelector", {"ray.io/cluster": "completions-a"}, "no clusterSelector"),
    ("RayJob/pretrain", "worker.labels", {"app.kubernetes.io/component": "completions", "raymill/role": "node"}, "have the labels"),
    ("RayJob/pretrain", "worker.labels", {"app.kubernetes.io/component": "pretrain", "raymill/role": "redis"}, "have the labels"),
]  # fmt: skip


def spoilt(name: str, path: str, value: Any) -> tuple[Manifest, Manifest]:
    """Returns an object of the manifests, and what somebody made of it."""
    before = find(by_digest("overlays/gpu"), name)
    after = copy.deepcopy(before)
    cluster = cluster_spec(after)
    head = cluster["headGroupSpec"]["template"]
    worker = cluster["workerGroupSpecs"][0]["template"]
    roots = {"head": head["spec"], "worker": worker["spec"], "box": head["spec"]["containers"][0]}
    roots |= {"cluster": cluster, "spec": after["spec"]}
    first, *steps, last = path.split(".")
    parent: Any = worker["metadata"] if path == "worker.labels" else roots[first]
    for step in steps:
        parent = parent[step]
    if last == "+":
        parent.append(value)
    else:
        parent[last] = value
    return before, after


def test_what_reaches_further_is_refused_as_a_new_object_and_as_a_change() -> None:
    for number, (name, path, value, says) in enumerate(_PLANTED):
        before, after = spoilt(name, path, value)
        live = before if number % 2 else None
        told = refusals(policy(), after, before=live, groups=_OPERATORS)
        assert any(says in message for message in told), (name, path, told)


def test_whoever_scales_is_admitted_whatever_the_object_was_before() -> None:
    for manifest in of_kind(render("overlays/gpu"), *CLUSTER_KINDS):  # images by tag
        after = copy.deepcopy(manifest)
        cluster_spec(after)["workerGroupSpecs"][0] |= {
            "maxReplicas": 9,
            "replicas": 3,
            "scaleStrategy": {"workersToDelete": ["a"]},
        }
        after["spec"]["suspend"] = True
        told = refusals(policy(), after, before=manifest, groups=_OPERATORS)
        assert told == [], name_of(manifest)


def test_operators_scale_a_service_and_administrators_change_it() -> None:
    before = find(by_digest("overlays/gpu"), "RayService/completions")
    deploys, commands = copy.deepcopy(before), copy.deepcopy(before)
    deploys["spec"]["serveConfigV2"] = "applications: [{import_path: mine:app}]"
    container = cluster_spec(commands)["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    container["env"].append({"name": "PYTHONPATH", "value": "/tmp"})
    for changed, live in ((deploys, before), (commands, before), (before, None)):
        assert refusals(policy(), changed, before=live, groups=("admins",)) == []
        (told,) = refusals(policy(), changed, before=live, groups=_OPERATORS)
        assert told.startswith("operators scale and suspend a RayService")


def test_an_administrator_applies_them_beside_the_overlays(api: ApiStandIn, asked: Asked) -> None:
    objects = render("admission")
    assert builtin_problems(objects) == []
    assert asked("apply", str(K8S / "admission")) == {"applied": [name_of(it) for it in objects]}
    root = "/apis/admissionregistration.k8s.io/v1"
    for binding in of_kind(objects, "ValidatingAdmissionPolicyBinding"):
        policies = f"{root}/validatingadmissionpolicies/{binding['spec']['policyName']}"
        assert api.get(policies) is not None
        (label,) = binding["spec"]["matchResources"]["namespaceSelector"]["matchLabels"].items()
        assert label in find(render("base"), "Namespace/raymill")["metadata"]["labels"].items()


def test_operators_change_the_settings_of_submitted_runs_alone() -> None:
    settings = find(render("admission"), "ValidatingAdmissionPolicy/raymill-settings")
    environment = find(render("base"), "ConfigMap/ray-environment")
    owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": "run-a-1", "uid": "1"}
    runs = {"kind": "ConfigMap", "metadata": {"name": "run-a-1", "ownerReferences": [owner]}}
    for live, expected in ((environment, 1), (runs, 0)):
        assert len(refusals(settings, live, before=live, groups=_OPERATORS)) == expected
        assert refusals(settings, live, before=live, groups=("admins",)) == []


def test_what_kuberay_makes_of_an_admitted_object_is_not_asked() -> None:
    service = find(by_digest("overlays/gpu"), "RayService/completions")
    cluster = {"kind": "RayCluster", "metadata": {"name": "a"}, "spec": cluster_spec(service)}
    account = "system:serviceaccount:%s:kuberay-operator"
    assert refusals(policy(), cluster, user=account % "kuberay-operator") == []
    assert refusals(policy(), cluster, user=account % "raymill") != []

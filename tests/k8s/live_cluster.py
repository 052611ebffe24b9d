"""A namespace on a real Kubernetes, with the overlay `dev` in it, which is removed at the end.

`RAYMILL_LIVE_KUBECONFIG` names the cluster, as an administrator. KubeRay's CRDs must be there; its
operator and `RAYMILL_LIVE_IMAGE` may be: what needs them is skipped otherwise, and says so. All
pods but those of the run are small, so that a cluster of one node has room for them. Their heads
are never up, for want of an image or of Secrets, nor their autoscalers, without which KubeRay
removes no surplus pod.
"""

import contextlib
import io
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from cluster.cli import main
from cluster.kube.client import KubeApi
from cluster.kube.kustomize import rendered_overlay
from cluster.kube.status import cluster_names
from cluster.local.jobs_api import ClusterError
from tests.k8s.manifests import K8S, Manifest
from tests.waiting import wait_until

KUBECONFIG, IMAGE, STORAGE = "RAYMILL_LIVE_KUBECONFIG", "RAYMILL_LIVE_IMAGE", "RAYMILL_LIVE_STORAGE"
_RAY = "ray.io/v1"
_KINDS = ("RayService", "RayJob", "RayCluster")
NOBODYS = "raymill-live-none"
"""The name of a storage class, and the value of a label, that no cluster has."""

_SMALL = {key: {"cpu": "10m", "memory": "64Mi"} for key in ("requests", "limits")}

STARTED_S = 180
"""Time in which KubeRay looks at an object, makes its pods or removes them, on a foreign
cluster."""


@dataclass
class LiveCluster:
    namespace: str
    overlay: Path
    """`dev`, except that Redis needs a volume that nobody makes, that the job `evaluate` runs out
    of time, and that pods are small."""

    @property
    def api(self) -> KubeApi:
        return KubeApi(self.namespace)

    def raymill(self, *words: str, code: int = 0) -> dict[str, Any]:
        """Returns the result of the command."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            ended = main([*words, "--json"])
        assert ended == code, f"{words} ended with {ended}: {err.getvalue()}{out.getvalue()}"
        lines = out.getvalue().splitlines()
        return json.loads(lines[-1]) if lines else {"error": err.getvalue()}

    def cluster(self, command: str, *words: str, code: int = 0) -> dict[str, Any]:
        """Returns the result of `raymill cluster` in the namespace."""
        return self.raymill("cluster", command, *words, "-n", self.namespace, code=code)

    def apply(self, *words: str) -> dict[str, Any]:
        return self.cluster("apply", str(self.overlay), *words)

    def cluster_of(self, kind: str, name: str) -> Manifest:
        """Returns the newest RayCluster behind the object, once there is one that is not being
        removed."""
        found: list[Manifest] = []

        def is_there() -> bool:
            owner = self.api.get(_RAY, kind, name)
            clusters = [
                self.api.get(_RAY, "RayCluster", n) for n in (cluster_names(owner) if owner else [])
            ]
            found[:] = [
                c for c in clusters if c is not None and "deletionTimestamp" not in c["metadata"]
            ]
            return bool(found)

        self.until(is_there, f"{kind}/{name} has a cluster")
        return found[-1]

    def workers(self, cluster: str) -> list[str]:
        """Returns the names of the cluster's worker pods that are not being removed."""
        pods = self.api.all(
            "v1", "Pod", selector=f"ray.io/cluster={cluster},ray.io/node-type=worker"
        )
        return [
            pod["metadata"]["name"] for pod in pods if "deletionTimestamp" not in pod["metadata"]
        ]

    def bounds(self, cluster: str) -> tuple[int, int, int]:
        """Returns the least, most and wanted workers that KubeRay tells of, which leaves out what
        is 0."""
        status = (self.api.get(_RAY, "RayCluster", cluster) or {}).get("status") or {}
        low, high, wanted = (
            status.get(f"{which}WorkerReplicas", 0) for which in ("min", "max", "desired")
        )
        return low, high, wanted

    def is_suspended(self, name: str) -> bool:
        return "is suspended" in self.cluster("status", name.lower())[name][0]

    def suspend(self, name: str) -> None:
        """Waits until all is gone. A service's cluster has up to five minutes to clean Redis, which
        is not there."""
        self.cluster("scale", name.lower(), "--suspend")
        self.until(lambda: self.is_suspended(name), f"{name} is suspended", timeout_s=400)

    def set_quota(self, pods: int) -> None:
        """Waits until it is in force, which is when its controller has copied it."""
        quota = self.api.get("v1", "ResourceQuota", "raymill")
        assert quota is not None
        self.api.patch(quota, [{"op": "replace", "path": "/spec/hard/pods", "value": str(pods)}])
        self.until(
            lambda: self._quota().get("pods") == str(pods), f"the quota of {pods} pods is in force"
        )

    def _quota(self) -> dict[str, str]:
        quota = self.api.get("v1", "ResourceQuota", "raymill") or {}
        return (quota.get("status") or {}).get("hard") or {}

    def until(self, condition: Any, what: str, timeout_s: float = STARTED_S) -> None:
        def why() -> str:
            asked = {command: self.cluster(command) for command in ("status", "why-pending")}
            return f"not within the time: {what}; {json.dumps(asked, indent=1)}"

        wait_until(condition, timeout_s=timeout_s, poll_s=1, why=why)

    def needs_operator(self) -> None:
        """Skips the test if no operator looks at Ray's objects."""
        if not _happens(
            lambda: (self.api.get(_RAY, "RayCluster", "shared") or {}).get("status"), 60
        ):
            pytest.skip("no KubeRay operator has looked at RayCluster/shared for 60 s")

    def admit_pods(self) -> None:
        """Removes the quota on an API server alone, where nothing counts what it leaves, so that it
        lets no pod in."""
        if not _happens(self._quota, 20):
            self.api.delete("v1", "ResourceQuota", "raymill")


def ships() -> bytes:
    """Returns a corpus of many small documents, since a document goes whole into one split."""
    lines = (
        {"text": f"The {number} ships sailed at dawn, and {number // 2} came home.\n"}
        for number in range(4000)
    )
    return "".join(f"{json.dumps(line)}\n" for line in lines).encode()


@contextmanager
def live_cluster(folder: Path) -> Iterator[LiveCluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", os.environ[KUBECONFIG])
        namespace = f"raymill-live-{secrets.token_hex(3)}"
        KubeApi(namespace)  # which sets the client's configuration
        extensions = client.ApiextensionsV1Api()
        crds = {item.metadata.name for item in extensions.list_custom_resource_definition().items}
        if missing := {f"{kind.lower()}s.ray.io" for kind in _KINDS} - crds:
            pytest.skip(f"the cluster has no {', '.join(sorted(missing))}: apply KubeRay's CRDs")
        scheduling = client.SchedulingV1Api()
        before = {item.metadata.name for item in scheduling.list_priority_class().items}
        live = LiveCluster(namespace, _overlay(folder))
        try:
            yield live
        finally:
            manifests = rendered_overlay(live.overlay, namespace)
            _remove(namespace, manifests)
            for manifest in manifests:
                name = manifest["metadata"]["name"]
                if manifest["kind"] == "PriorityClass" and name not in before:
                    _ignoring_missing(lambda name=name: scheduling.delete_priority_class(name))


def _overlay(folder: Path) -> Path:
    """Writes the kustomization of a user that changes `dev` in some places."""
    no_volume = [
        {
            "op": "add",
            "path": "/spec/volumeClaimTemplates/0/spec/storageClassName",
            "value": NOBODYS,
        }
    ]
    no_time = [
        {"op": "add", "path": "/spec/activeDeadlineSeconds", "value": 5},
        {"op": "add", "path": "/spec/backoffLimit", "value": 0},
    ]
    kustomization: dict[str, Any] = {
        "resources": [os.path.relpath(K8S / "overlays/dev", folder.resolve())],
        "patches": [
            {
                "target": {"kind": "StatefulSet", "name": "redis"},
                "patch": yaml.safe_dump(no_volume),
            },
            {"target": {"kind": "RayJob", "name": "evaluate"}, "patch": yaml.safe_dump(no_time)},
        ],
    }
    if image := os.environ.get(IMAGE):
        name, at, digest = image.partition("@")
        name, _, tag = (name, "", "") if at else image.rpartition(":")
        kustomization["images"] = [
            {"name": "raymill", "newName": name} | ({"digest": digest} if at else {"newTag": tag})
        ]
    for kind, inside in (
        ("RayJob", "/rayClusterSpec"),
        ("RayService", "/rayClusterConfig"),
        ("RayCluster", ""),
    ):
        target = {"kind": kind} | (
            {"name": "tokenize|evaluate"} if image and kind == "RayJob" else {}
        )
        pods = [
            f"/spec{inside}/{group}/template" for group in ("headGroupSpec", "workerGroupSpecs/0")
        ]
        pods += ["/spec/submitterPodTemplate"] * (kind == "RayJob")
        paths = [f"/spec{inside}/autoscalerOptions", *(f"{pod}/spec/containers/0" for pod in pods)]
        small = [{"op": "replace", "path": f"{path}/resources", "value": _SMALL} for path in paths]
        kustomization["patches"].append({"target": target, "patch": yaml.safe_dump(small)})
    if STORAGE in os.environ:  # in place of MinIO
        region = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
        url = os.environ.get("AWS_ENDPOINT_URL", f"https://s3.{region}.amazonaws.com")
        literals = [f"AWS_ENDPOINT_URL={url}", f"AWS_DEFAULT_REGION={region}"]
        kustomization["configMapGenerator"] = [
            {"name": "ray-environment", "behavior": "merge", "literals": literals}
        ]
        (folder / "storage.yaml").write_text(yaml.safe_dump(_way_to(url)))
        kustomization["resources"].append("storage.yaml")
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return folder


def _way_to(url: str) -> Manifest:
    """Returns the policy that lets Ray's nodes reach a storage which is on another port than
    443."""
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    labels = {"app.kubernetes.io/part-of": "raymill", "app.kubernetes.io/component": "platform"}
    spec = {
        "podSelector": {"matchLabels": {"raymill/role": "node"}},
        "policyTypes": ["Egress"],
        "egress": [{"ports": [{"protocol": "TCP", "port": port}]}],
    }
    metadata = {"name": "live-storage", "labels": labels}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata,
        "spec": spec,
    }


def _remove(namespace: str, manifests: list[Manifest]) -> None:
    """Removes finalizers by force: what they wait for, such as a job that empties Redis, may have
    no image to run on."""
    core, custom, api = client.CoreV1Api(), client.CustomObjectsApi(), KubeApi(namespace)
    for kind in _KINDS:
        plural = f"{kind.lower()}s"
        _ignoring_missing(
            lambda plural=plural: custom.delete_collection_namespaced_custom_object(
                "ray.io", "v1", namespace, plural
            )
        )
    _ignoring_missing(lambda: core.delete_namespace(namespace))
    # The controller of namespaces tells of its progress within seconds
    alone_s = time.monotonic() + 60

    def is_gone() -> bool:
        for item in (item for kind in _KINDS for item in api.all(_RAY, kind)):
            # `api` says what kind of patch it is; the client does not for these
            if item["metadata"].get("finalizers"):
                with contextlib.suppress(ClusterError):  # the operator was faster
                    api.patch(item, [{"op": "remove", "path": "/metadata/finalizers"}])
        found = {item.metadata.name: item.status for item in core.list_namespace().items}
        if (
            namespace in found
            and time.monotonic() > alone_s
            and not getattr(found[namespace], "conditions", None)
        ):
            _remove_alone(namespace, manifests)
        return namespace not in found

    # Pods may take their grace, up to 150 s, and Kubernetes looks again after a part of it.
    wait_until(
        is_gone, timeout_s=600, poll_s=2, why=lambda: f"the namespace {namespace} does not go away"
    )


def _remove_alone(namespace: str, manifests: list[Manifest]) -> None:
    """Does on an API server alone what the controller of namespaces does."""
    for manifest in manifests:
        if "namespace" in manifest["metadata"]:
            KubeApi(namespace).delete(
                manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"]
            )
    metadata, spec = {"name": namespace}, {"finalizers": []}
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata, "spec": spec}
    client.CoreV1Api().replace_namespace_finalize(namespace, body)


def _happens(condition: Callable[[], object], within_s: float) -> bool:
    """Tells whether what a controller does comes about, for which there may be none."""
    deadline_s = time.monotonic() + within_s
    while not (happened := condition()) and time.monotonic() < deadline_s:
        time.sleep(1)
    return bool(happened)


def _ignoring_missing(act: Any) -> None:
    try:
        act()
    except ApiException as error:
        if error.status != 404:
            raise

"""A namespace on a real Kubernetes, with the overlay `dev` in it, which is removed at the end.

`RAYMILL_LIVE_KUBECONFIG` names the cluster, as an administrator. KubeRay's CRDs must be there; its operator and
`RAYMILL_LIVE_IMAGE` may be: what needs them is skipped otherwise, and says so.
"""

import contextlib
import io
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from cluster.cli import main
from cluster.kube.client import KubeApi
from cluster.kube.kustomize import rendered_overlay
from cluster.kube.status import cluster_names
from tests.k8s.manifests import K8S, Manifest
from tests.waiting import wait_until

KUBECONFIG, IMAGE, STORAGE = "RAYMILL_LIVE_KUBECONFIG", "RAYMILL_LIVE_IMAGE", "RAYMILL_LIVE_STORAGE"
_RAY = "ray.io/v1"
_KINDS = ("RayService", "RayJob", "RayCluster")
_NO_CLASS = "raymill-live-none"
"""A storage class that no cluster has."""

STARTED_S = 180
"""Time in which KubeRay looks at an object, makes its pods or removes them, on a foreign cluster."""


@dataclass
class LiveCluster:
    namespace: str
    overlay: Path
    """`dev`, except that Redis needs a volume that nobody makes, and that the job `evaluate` runs out of time."""

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
        """Returns the newest RayCluster behind the object, once there is one."""
        found: list[Manifest] = []

        def is_there() -> bool:
            owner = self.api.get(_RAY, kind, name)
            names = cluster_names(owner) if owner else []
            found[:] = [c for n in names if (c := self.api.get(_RAY, "RayCluster", n)) is not None]
            return bool(found)

        self.until(is_there, f"{kind}/{name} has a cluster")
        return found[-1]

    def workers(self, cluster: str) -> list[str]:
        """Returns the names of the cluster's worker pods that are not being removed."""
        pods = self.api.all("v1", "Pod", selector=f"ray.io/cluster={cluster},ray.io/node-type=worker")
        return [pod["metadata"]["name"] for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    def until(self, condition: Any, what: str, timeout_s: float = STARTED_S) -> None:
        def why() -> str:
            asked = {command: self.cluster(command) for command in ("status", "why-pending")}
            return f"not within the time: {what}; {json.dumps(asked, indent=1)}"

        wait_until(condition, timeout_s=timeout_s, poll_s=1, why=why)

    def needs_operator(self) -> None:
        """Skips the test if no operator looks at Ray's objects."""
        deadline_s = time.monotonic() + 60
        while not (self.api.get(_RAY, "RayCluster", "shared") or {}).get("status"):
            if time.monotonic() > deadline_s:
                pytest.skip("no KubeRay operator has looked at RayCluster/shared for 60 s")
            time.sleep(1)


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
            _remove(namespace)
            for manifest in rendered_overlay(live.overlay):
                name = manifest["metadata"]["name"]
                if manifest["kind"] == "PriorityClass" and name not in before:
                    _ignoring_missing(lambda name=name: scheduling.delete_priority_class(name))


def _overlay(folder: Path) -> Path:
    """Writes the kustomization of a user that changes `dev` in some places."""
    no_volume = [{"op": "add", "path": "/spec/volumeClaimTemplates/0/spec/storageClassName", "value": _NO_CLASS}]
    no_time = [
        {"op": "add", "path": "/spec/activeDeadlineSeconds", "value": 5},
        {"op": "add", "path": "/spec/backoffLimit", "value": 0},
    ]
    kustomization: dict[str, Any] = {
        "resources": [os.path.relpath(K8S / "overlays/dev", folder.resolve())],
        "patches": [
            {"target": {"kind": "StatefulSet", "name": "redis"}, "patch": yaml.safe_dump(no_volume)},
            {"target": {"kind": "RayJob", "name": "evaluate"}, "patch": yaml.safe_dump(no_time)},
        ],
    }
    if image := os.environ.get(IMAGE):
        name, at, digest = image.partition("@")
        name, _, tag = (name, "", "") if at else image.rpartition(":")
        kustomization["images"] = [
            {"name": "raymill", "newName": name} | ({"digest": digest} if at else {"newTag": tag})
        ]
    if url := os.environ.get("AWS_ENDPOINT_URL"):
        literals = [f"AWS_ENDPOINT_URL={url}"]
        kustomization["configMapGenerator"] = [{"name": "ray-environment", "behavior": "merge", "literals": literals}]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return folder


def _remove(namespace: str) -> None:
    """Removes finalizers by force: what they wait for, such as a job that empties Redis, may have no image to run on."""
    core, custom = client.CoreV1Api(), client.CustomObjectsApi()
    for kind in _KINDS:
        plural = f"{kind.lower()}s"
        _ignoring_missing(
            lambda plural=plural: custom.delete_collection_namespaced_custom_object("ray.io", "v1", namespace, plural)
        )
    _ignoring_missing(lambda: core.delete_namespace(namespace))

    def is_gone() -> bool:
        for kind in _KINDS:
            for item in KubeApi(namespace).all(_RAY, kind):
                if item["metadata"].get("finalizers"):
                    where = ("ray.io", "v1", namespace, f"{kind.lower()}s", item["metadata"]["name"])
                    body = [{"op": "remove", "path": "/metadata/finalizers"}]
                    _ignoring_missing(
                        lambda where=where, body=body: custom.patch_namespaced_custom_object(*where, body)
                    )
        return all(item.metadata.name != namespace for item in core.list_namespace().items)

    wait_until(is_gone, timeout_s=STARTED_S, poll_s=2, why=lambda: f"the namespace {namespace} does not go away")


def _ignoring_missing(act: Any) -> None:
    try:
        act()
    except ApiException as error:
        if error.status != 404:
            raise

"""`make test-live` itself works on the stand-ins for the API and the operator: what it asks, waits
for and removes.

They are no Kubernetes. That a real one behaves so is what it is for.
"""

import functools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.api_objects import RefusedError, now
from tests.k8s.api_stand_in import ApiStandIn
from tests.k8s.live_cluster import IMAGE, KUBECONFIG, NOBODYS, STORAGE
from tests.k8s.operator_stand_in import OperatorStandIn, unmounted, unpulled, unscheduled
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

pytestmark = pytest.mark.slow

Object = dict[str, Any]


_NEVER = "no new claims to deallocate, preemption: not eligible due to preemptionPolicy=Never."
_UNPLACED = {
    "persistentVolumeClaim": "pod has unbound immediate PersistentVolumeClaims. not found",
    "matchFields": f"1 node(s) had untolerated taint(s), 2 node(s) didn't satisfy plugin(s) [NodeAffinity]. {_NEVER}",
    NOBODYS: f"3 node(s) didn't match Pod's node affinity/selector. {_NEVER}",
    "nvidia.com/gpu": f"1 node(s) had untolerated taint(s), 2 Insufficient nvidia.com/gpu. {_NEVER}",
}
"""What the scheduler says of a pod with this word in it."""


class _Cluster(ApiStandIn):
    """Serves KubeRay's CRDs, and controllers that look again and again: with three nodes, one of
    them tainted, no volumes, no GPUs and no image."""

    def __init__(self, folder: Path, *, has_controllers: bool) -> None:
        super().__init__(folder, namespaces=("default",))
        self.has_controllers = has_controllers
        crds = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        for kind in ("RayCluster", "RayJob", "RayService"):
            names = {"kind": kind, "plural": f"{kind.lower()}s"}
            spec = {"group": "ray.io", "names": names, "scope": "Namespaced", "versions": []}
            self.put(
                f"{crds}/{names['plural']}.ray.io",
                {"metadata": {"name": f"{names['plural']}.ray.io"}, "spec": spec},
            )
        for name, taints in (
            ("cpu-1", []),
            ("cpu-2", []),
            ("gpu-1", [{"key": "gpu", "effect": "NoSchedule"}]),
        ):
            self.put(
                f"/api/v1/nodes/{name}",
                {"kind": "Node", "metadata": {"name": name}, "spec": {"taints": taints}},
            )

    def delete(self, path: str) -> None:
        """Deletes, except that an API server alone only marks a namespace: its controller does the
        rest."""
        if self.has_controllers or path.split("/")[-2] != "namespaces":
            super().delete(path)
        elif path in self._objects:
            self._objects[path]["metadata"]["deletionTimestamp"] = now()

    def create(
        self, collection: str, value: Object, *, manager: str, dry_run: bool = False
    ) -> Object:
        if collection.endswith("/pods"):
            self._admit(collection, value["metadata"]["name"])
        if not collection.endswith("/subjectaccessreviews"):
            return super().create(collection, value, manager=manager, dry_run=dry_run)
        asked = value["spec"]["resourceAttributes"]
        what = (
            f"{asked['resource']}/{asked['subresource']}"
            if "subresource" in asked
            else asked["resource"]
        )
        role = self.get(
            f"/apis/rbac.authorization.k8s.io/v1/namespaces/{asked['namespace']}/roles/raymill-operator"
        )
        assert role is not None
        allowed = any(
            asked.get("group", "") in rule["apiGroups"]
            and what in rule["resources"]
            and asked["verb"] in rule["verbs"]
            for rule in role["rules"]
        )
        return value | {"status": {"allowed": allowed}}

    def _admit(self, collection: str, name: str) -> None:
        """Refuses a pod, as Kubernetes does, before the quota's controller has counted."""
        quota = self.get(collection.replace("/pods", "/resourcequotas/raymill"))
        if quota and "status" not in quota:
            said = f'pods "{name}" is forbidden: status unknown for quota: raymill, resources: limits.memory,pods'
            raise RefusedError(403, "Forbidden", said)

    def operate(self, ended: threading.Event) -> None:
        if not self.has_controllers:
            return
        missing = 'MountVolume.SetUp failed for volume "api-keys" : secret "api-keys" not found'
        fates = [
            (functools.partial(_has, word), unscheduled(f"0/3 nodes are available: {message}"))
            for word, message in _UNPLACED.items()
        ]
        fates += [
            (self._lacks_its_keys, unmounted(missing)),
            (lambda pod: True, unpulled("raymill:0.1.0")),
        ]
        while not ended.wait(0.3):
            with self.lock:
                for item in self.list("/api/v1/namespaces")["items"]:
                    if "deletionTimestamp" not in item["metadata"]:
                        OperatorStandIn(self, item["metadata"]["name"], fates, cleanup_s=2).look()

    def _lacks_its_keys(self, pod: Object) -> bool:
        secret = f"/api/v1/namespaces/{pod['metadata']['namespace']}/secrets/api-keys"
        return "api-keys" in str(pod["spec"]["volumes"]) and self.get(secret) is None


def _has(word: str, pod: Object) -> bool:
    return word in str(pod["spec"])


@pytest.mark.parametrize(
    ("has_controllers", "says"), [(True, "18 passed, 1 skipped"), (False, "5 passed, 14 skipped")]
)
def test_it_passes_and_leaves_nothing(has_controllers: bool, says: str, tmp_path: Path) -> None:
    """Skips the run, which needs an image, and on an API server alone all that needs an
    operator."""
    ended = threading.Event()
    with _Cluster(tmp_path, has_controllers=has_controllers).serving() as api:
        before = set(api._objects)
        thread = threading.Thread(target=api.operate, args=(ended,))
        thread.start()
        try:
            environment = {
                name: value for name, value in os.environ.items() if name not in (IMAGE, STORAGE)
            }
            start_s = time.monotonic()
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pytest",
                    "-q",
                    "-n0",
                    "-m",
                    "live",
                    "tests/k8s/test_live.py",
                ],
                cwd=REPOSITORY,
                env=environment | {KUBECONFIG: str(api.kubeconfig())},
                capture_output=True,
                text=True,
                timeout=limit_s(600),
                check=False,
            )
        finally:
            ended.set()
            thread.join()
        print(f"{time.monotonic() - start_s:.0f} s")
        assert done.returncode == 0, done.stdout[-20000:]
        assert says in done.stdout, done.stdout[-3000:]
        assert set(api._objects) == before

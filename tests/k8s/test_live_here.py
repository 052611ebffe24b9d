"""`make test-live` itself works on the stand-ins for the API and the operator: what it asks, waits for and removes.

They are no Kubernetes. That a real one behaves so is what it is for.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.api_stand_in import ApiStandIn
from tests.k8s.live_cluster import IMAGE, KUBECONFIG, STORAGE
from tests.k8s.operator_stand_in import OperatorStandIn, unmounted, unscheduled
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

pytestmark = pytest.mark.slow

Object = dict[str, Any]


class _Cluster(ApiStandIn):
    """Serves KubeRay's CRDs, an operator that looks again and again, no volumes and no GPUs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, namespaces=("default",))
        crds = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        for kind in ("RayCluster", "RayJob", "RayService"):
            names = {"kind": kind, "plural": f"{kind.lower()}s"}
            spec = {"group": "ray.io", "names": names, "scope": "Namespaced", "versions": []}
            self.put(
                f"{crds}/{names['plural']}.ray.io", {"metadata": {"name": f"{names['plural']}.ray.io"}, "spec": spec}
            )

    def create(self, collection: str, value: Object, *, manager: str, dry_run: bool = False) -> Object:
        if not collection.endswith("/subjectaccessreviews"):
            return super().create(collection, value, manager=manager, dry_run=dry_run)
        asked = value["spec"]["resourceAttributes"]
        what = f"{asked['resource']}/{asked['subresource']}" if "subresource" in asked else asked["resource"]
        role = self.get(f"/apis/rbac.authorization.k8s.io/v1/namespaces/{asked['namespace']}/roles/raymill-operator")
        assert role is not None
        allowed = any(
            asked.get("group", "") in rule["apiGroups"] and what in rule["resources"] and asked["verb"] in rule["verbs"]
            for rule in role["rules"]
        )
        return value | {"status": {"allowed": allowed}}

    def operate(self, ended: threading.Event) -> None:
        while not ended.wait(0.3):
            with self.lock:
                for item in self.list("/api/v1/namespaces")["items"]:
                    operator = OperatorStandIn(self, namespace=item["metadata"]["name"])
                    gpu = "0/3 nodes are available: 1 node(s) had untolerated taint(s), 2 Insufficient nvidia.com/gpu. no new claims to deallocate, preemption: not eligible due to preemptionPolicy=Never."
                    redis = "0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims. not found"
                    missing = 'MountVolume.SetUp failed for volume "api-keys" : secret "api-keys" not found'
                    operator.fates = [
                        (lambda pod: pod["metadata"]["labels"].get("raymill/role") == "redis", unscheduled(redis)),
                        (lambda pod: "nvidia.com/gpu" in str(pod["spec"]["containers"]), unscheduled(gpu)),
                        (self._lacks_its_keys, unmounted(missing)),
                    ]
                    operator.look()

    def _lacks_its_keys(self, pod: Object) -> bool:
        secret = f"/api/v1/namespaces/{pod['metadata']['namespace']}/secrets/api-keys"
        return "api-keys" in str(pod["spec"]["volumes"]) and self.get(secret) is None


def test_it_passes_and_leaves_nothing(tmp_path: Path) -> None:
    ended = threading.Event()
    with _Cluster(tmp_path).serving() as api:
        before = set(api._objects)
        thread = threading.Thread(target=api.operate, args=(ended,))
        thread.start()
        try:
            environment = {name: value for name, value in os.environ.items() if name not in (IMAGE, STORAGE)}
            start_s = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "live", "tests/k8s/test_live.py"],
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
        assert "16 passed, 1 skipped" in done.stdout, done.stdout[-3000:]  # the run, without an image
        assert set(api._objects) == before

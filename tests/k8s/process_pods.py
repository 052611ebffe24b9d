"""A RayCluster whose pods are real Ray nodes on this machine, scaled by Ray's own autoscaler.

It does what KubeRay's operator and a kubelet would do for one RayCluster, and Ray's autoscaler runs
as in its sidecar: it asks `api_stand_in.py` for more or fewer pods. `pod_process.py` says what a
pod is. Not a Kubernetes: no scheduler, no containers, no probes but those of `service_stand_in.py`.

One thread starts the processes, and ends them all.
"""

import functools
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from ray.job_submission import JobSubmissionClient

from cluster.local.local_cluster import free_port
from cluster.storage.process_identity import kill, with_descendants
from tests.bound_process import start_bound
from tests.k8s.api_stand_in import ApiStandIn
from tests.k8s.manifests import Manifest, cluster_spec, find, of_kind
from tests.k8s.pod_process import PodProcess
from tests.redis_server import Redis
from tests.repository import REPOSITORY
from tests.time_limits import limit_s, slowness
from tests.waiting import wait_until

MAX_STARTS = 12
"""The largest number of pods that a machine as fast as the reference starts: a cluster that flaps
must not fill it with processes. A slow machine starts more, as Ray ends a node whose agents have
not answered after a fixed 30 s."""

_POLL_S = 0.3
_START_TIMEOUT_S = limit_s(90)


@dataclass
class _Pod:
    """A worker pod that runs or is pending."""

    name: str
    group: Manifest
    process: PodProcess | None = None  # None while no Kubernetes node has room for it
    is_leaving: bool = False


class PodCluster:
    """Starts on entering the context, with its head and autoscaler; ends on leaving it."""

    def __init__(
        self,
        objects: list[Manifest],
        name: str,
        *,
        num_nodes: int,
        redis: Redis | None = None,
        without_nodes: str | None = None,
    ) -> None:
        """Takes all `objects` of a kustomization, and runs the cluster of `Kind/name`. The
        Kubernetes nodes have room for `num_nodes` of its worker pods; further ones stay Pending, as
        do all of the group `without_nodes`. `redis` stands for the one that it names."""
        owner = find(objects, name)
        self.name, self.namespace = owner["metadata"]["name"], owner["metadata"]["namespace"]
        self.num_nodes, self._without_nodes = num_nodes, without_nodes
        self.problem: BaseException | None = None
        """The error that ended the thread of the pods too early."""
        self._spec = cluster_spec(owner)
        self._redis = redis
        assert (redis is not None) == ("gcsFaultToleranceOptions" in self._spec)
        self._config_maps = {
            item["metadata"]["name"]: item["data"] for item in of_kind(objects, "ConfigMap")
        }
        self._folder = Path(tempfile.mkdtemp(prefix="pods-"))  # Ray's socket paths must stay short
        self._gcs_port, self._dashboard_port = free_port(), free_port()
        self._token = secrets.token_hex(32)
        self._pods: dict[str, _Pod] = {}
        self._head: PodProcess | None = None
        self._autoscaler: Any = None
        self._num_starts = 0
        self._lock = threading.RLock()
        self._is_up, self._ended = threading.Event(), threading.Event()
        self._api = ApiStandIn(self._folder)
        self._thread = threading.Thread(target=self._live, name="pods", daemon=True)

    @property
    def jobs_url(self) -> str:
        return f"http://127.0.0.1:{self._dashboard_port}"

    @property
    def headers(self) -> dict[str, str]:
        """Returns headers with the token, for requests to `jobs_url`."""
        return {"Authorization": f"Bearer {self._token}"}

    @functools.cached_property
    def jobs(self) -> JobSubmissionClient:
        return JobSubmissionClient(self.jobs_url, headers=self.headers)

    def submit(self, entrypoint: str, *, num_gpus: int = 0) -> str:
        """Submits a job and returns its id. A head answers before the agent that starts jobs is
        there, for which Ray waits 10 s."""
        taken: list[str] = []

        def is_taken() -> bool:
            try:
                taken.append(
                    self.jobs.submit_job(entrypoint=entrypoint, entrypoint_num_gpus=num_gpus)
                )
            except RuntimeError as error:
                if "No available agent" not in str(error):
                    raise
            return bool(taken)

        wait_until(is_taken, poll_s=1, why=lambda: "no agent takes the job")
        return taken[0]

    @property
    def running(self) -> list[str]:
        """Returns the names of the worker pods that run and are not ending."""
        return [process.name for process in self._running()]

    @property
    def addresses(self) -> list[str]:
        """Returns the addresses of those pods."""
        return [process.address for process in self._running()]

    @property
    def pending(self) -> list[str]:
        """Returns the names of the worker pods that no node has room for."""
        with self._lock:
            return [pod.name for pod in self._pods.values() if pod.process is None]

    def autoscaler_log(self) -> str:
        return (self._folder / "autoscaler.log").read_text(errors="replace")

    def kill(self, name: str) -> None:
        """Sends SIGKILL, without notice, to all of the pod's processes; its node stays."""
        with self._lock:
            process = self._pods[name].process
            assert process is not None
            process.kill()

    def kill_head(self) -> None:
        """Sends SIGKILL to all processes of the head's pod, its autoscaler included; it is
        restarted."""
        with self._lock:
            assert self._head is not None
            self._head.kill()
            self._end_autoscaler()

    def take_back_node_of(self, name: str) -> None:
        """Reclaims a spot node as a cloud does: its pod gets SIGTERM, and there is one node
        less."""
        with self._lock:
            self.num_nodes -= 1
            self._tell_to_end(self._pods[name])

    def is_up(self) -> bool:
        """Tells whether the head answers."""
        try:
            return httpx.get(
                f"{self.jobs_url}/api/v0/nodes", headers=self.headers, timeout=limit_s(30)
            ).is_success
        except httpx.TransportError:
            return False

    def __enter__(self) -> Self:
        self._thread.start()
        while not self._is_up.wait(_POLL_S):
            if self.problem is not None:
                self.__exit__(None, None, None)
                raise self.problem
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _live(self) -> None:
        try:
            with self._api.serving():
                token = self._folder / "token"
                token.touch(mode=0o600)
                token.write_text(self._token)
                self._api.put(self._cluster_path, self._ray_cluster())
                self._start_head()
                self._is_up.set()
                while not self._ended.wait(_POLL_S):
                    self._keep_head()
                    with self._lock:
                        self._reconcile()
        except BaseException as error:
            self.problem = error
            raise
        finally:
            self._end_all()

    def _start_head(self) -> None:
        """Starts the head with the autoscaler, a container of the same pod. A head that ends while
        it starts, for which Ray gives it 30 s, is started again, as a kubelet does."""
        while not self._head_starts():
            continue
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "kuberay-autoscaler",
            "--cluster-name",
            self.name,
        ]
        command += [
            "--cluster-namespace",
            self.namespace,
            "--gcs-address",
            f"127.0.0.1:{self._gcs_port}",
        ]
        further = {"RAY_HEAD_POD_NAME": f"{self.name}-head", "KUBERAY_CRD_VER": "v1"}
        further |= {
            variable["name"]: variable["value"]
            for variable in self._spec["autoscalerOptions"].get("env", [])
        }
        environment = self._environment | self._api.environment | further
        self._autoscaler = start_bound(
            command, log=self._folder / "autoscaler.log", environment=environment
        )

    def _head_starts(self) -> bool:
        """Tells whether it answers; if not, it has ended."""
        group = self._spec["headGroupSpec"]
        flags = ["--head", "--port", str(self._gcs_port), "--dashboard-host", "127.0.0.1"]
        flags += [
            "--dashboard-port",
            str(self._dashboard_port),
            "--ray-client-server-port",
            str(free_port()),
        ]
        state = {}
        if self._redis is not None:
            state = {
                "RAY_REDIS_ADDRESS": self._redis.address,
                "REDIS_PASSWORD": self._redis.password,
            }
            # The operator takes the cluster's UID
            state["RAY_external_storage_namespace"] = self.name
            flags += ["--redis-password", self._redis.password]
        name = f"{self.name}-head"
        self._head = self._start(name, "headgroup", group, flags, state)
        self._api.put(
            self._pod_path(name),
            self._pod_object(name, "headgroup", group, kind="head", is_running=True),
        )
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not self.is_up():
            if self._head.has_ended():
                return False
            assert time.monotonic() < deadline_s, (
                f"{_START_TIMEOUT_S:.0f} s were too short for the head to answer"
            )
            assert not self._ended.wait(_POLL_S), "ended while starting"
        return True

    def _keep_head(self) -> None:
        """Restarts a head that was lost. Callers that ask for the pods meanwhile do not have to
        wait."""
        assert self._head is not None
        with self._lock:
            has_ended = self._head.has_ended()
            assert has_ended or self._autoscaler.poll() is None, (
                f"the autoscaler ended: {self.autoscaler_log()[-3000:]}"
            )
        if has_ended:
            assert self._redis is not None, (
                f"the head ended: {self._head.log.read_text(errors='replace')[-3000:]}"
            )
            self._end_autoscaler()
            self._start_head()

    def _reconcile(self) -> None:
        """Compares the desired cluster with the actual one, once."""
        # The operator deletes pods that have ended, and makes others
        for pod in list(self._pods.values()):
            if pod.process.has_ended() if pod.process else pod.is_leaving:
                del self._pods[pod.name]
                self._api.delete(self._pod_path(pod.name))
        for group in self._api.get(self._cluster_path)["spec"]["workerGroupSpecs"]:  # type: ignore[index]
            for name in group.get("scaleStrategy", {}).get("workersToDelete", []):
                if name in self._pods:
                    self._tell_to_end(self._pods[name])
            mine = [
                pod for pod in self._pods.values() if pod.group["groupName"] == group["groupName"]
            ]
            for _ in range(group["replicas"] - sum(not pod.is_leaving for pod in mine)):
                pod = _Pod(f"{self.name}-{group['groupName']}-{secrets.token_hex(3)}", group)
                self._pods[pod.name] = pod
                self._show(pod)
        for pod in self._pods.values():
            has_room = (
                len(self._running()) < self.num_nodes
                and pod.group["groupName"] != self._without_nodes
            )
            if pod.process is None and not pod.is_leaving and has_room:
                flags = ["--address", f"127.0.0.1:{self._gcs_port}"]
                pod.process = self._start(pod.name, pod.group["groupName"], pod.group, flags, {})
                self._show(pod)

    def _running(self) -> list[PodProcess]:
        with self._lock:
            return [
                pod.process for pod in self._pods.values() if pod.process and not pod.is_leaving
            ]

    def _tell_to_end(self, pod: _Pod) -> None:
        if pod.is_leaving:
            return
        pod.is_leaving = True
        if pod.process is not None:
            pod.process.tell_to_end()
        change = {
            "metadata": {"deletionTimestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        }
        self._api.patch(self._pod_path(pod.name), "application/merge-patch+json", change)

    def _start(
        self, name: str, group_name: str, group: Manifest, flags: list[str], further: dict[str, str]
    ) -> PodProcess:
        self._num_starts += 1
        most = MAX_STARTS * slowness()
        assert self._num_starts <= most, f"{most:.0f} pods were started already; the cluster flaps"
        container = group["template"]["spec"]["containers"][0]
        environment: dict[str, str] = {}
        for source in container.get("envFrom", []):
            environment |= self._config_maps[source["configMapRef"]["name"]]
        environment |= _variables(container, node=f"node-of-{name}")
        environment |= {"RAY_CLOUD_INSTANCE_ID": name, "RAY_NODE_TYPE_NAME": group_name}
        environment |= {
            "RAY_enable_autoscaler_v2": "1",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
        }
        environment |= self._environment | further
        return PodProcess(
            name,
            group,
            flags,
            number=self._num_starts,
            environment=environment,
            folder=self._folder,
        )

    @property
    def _environment(self) -> dict[str, str]:
        """Returns the variables that a process needs to join the cluster."""
        return {
            "RAY_ADDRESS": f"127.0.0.1:{self._gcs_port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._folder / "token"),
            # Keeps addresses on loopback, see cluster/local/start_node.py
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "PYTHONPATH": str(REPOSITORY),  # where the image has its working directory
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }

    def _end_autoscaler(self) -> None:
        if self._autoscaler is not None:
            kill(with_descendants(self._autoscaler.pid))
            self._autoscaler.wait()

    def _end_all(self) -> None:
        self._end_autoscaler()
        for process in [self._head, *(pod.process for pod in self._pods.values())]:
            if process is not None:
                process.kill()

    def _ray_cluster(self) -> Manifest:
        """Returns the object that the operator makes from the manifest; `replicas` is `minReplicas`
        at first."""
        groups = [
            group | {"replicas": group["minReplicas"]} for group in self._spec["workerGroupSpecs"]
        ]
        metadata = {"name": self.name, "namespace": self.namespace}
        spec = self._spec | {"workerGroupSpecs": groups}
        return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata, "spec": spec}

    def _show(self, pod: _Pod) -> None:
        is_running, name = pod.process is not None, pod.group["groupName"]
        value = self._pod_object(pod.name, name, pod.group, kind="worker", is_running=is_running)
        self._api.put(self._pod_path(pod.name), value)

    def _pod_object(
        self, name: str, group_name: str, group: Manifest, *, kind: str, is_running: bool
    ) -> Manifest:
        labels = {"ray.io/cluster": self.name, "ray.io/node-type": kind, "ray.io/group": group_name}
        status: Manifest = {"phase": "Pending"}
        if is_running:
            status = {
                "phase": "Running",
                "podIP": "127.0.0.1",
                "containerStatuses": [{"state": {"running": {}}}],
            }
        metadata = {"name": name, "namespace": self.namespace, "labels": labels}
        return {"metadata": metadata, "spec": group["template"]["spec"], "status": status}

    @property
    def _cluster_path(self) -> str:
        return f"/apis/ray.io/v1/namespaces/{self.namespace}/rayclusters/{self.name}"

    def _pod_path(self, name: str) -> str:
        return f"/api/v1/namespaces/{self.namespace}/pods/{name}"


def _variables(container: Manifest, *, node: str) -> dict[str, str]:
    """Returns a container's variables as on a node of this name, each pod's own."""
    values: dict[str, str] = {}
    for variable in container.get("env", []):
        if "valueFrom" in variable:
            assert variable["valueFrom"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
            values[variable["name"]] = node
        else:
            values[variable["name"]] = variable["value"]
    return values

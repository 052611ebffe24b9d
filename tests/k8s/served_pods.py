"""The manifests' endpoint on real Ray nodes: RayService `completions` of the base, with a tiny
model."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from cluster.local.local_cluster import free_port
from tests.k8s.manifests import cluster_spec, find, render
from tests.k8s.pod_process import POD_HOST
from tests.k8s.process_pods import PodCluster
from tests.k8s.service_stand_in import ServiceStandIn
from tests.redis_server import redis_server
from tests.time_limits import limit_s
from tests.waiting import wait_until

MODEL = "tiny"


@dataclass(frozen=True)
class ServedPods:
    pods: PodCluster
    service: ServiceStandIn

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.service.port}"

    def status(self) -> str | None:
        """Returns the application's status as the head reports it, or None while it does not."""
        try:
            answer = httpx.get(
                f"{self.pods.jobs_url}/api/serve/applications/",
                headers=self.pods.headers,
                timeout=limit_s(30),
            )
        except httpx.TransportError:
            return None
        return answer.json()["applications"]["raymill"]["status"] if answer.is_success else None

    def why(self) -> str:
        """Returns the state, for the message of a wait that failed."""
        answer = httpx.get(
            f"{self.pods.jobs_url}/api/serve/applications/",
            headers=self.pods.headers,
            timeout=limit_s(30),
        )
        deployments = answer.json()["applications"]["raymill"]["deployments"]
        replicas = {
            name: [r["state"] for r in found["replicas"]] for name, found in deployments.items()
        }
        log = self.pods.autoscaler_log()[-4000:]
        return f"{len(self.pods.running)} pods, {len(self.service.ready)} ready; replicas {replicas}; {log}"

    def until(self, condition: Callable[[], object], *, timeout_s: float = 120) -> float:
        """Waits for it, and returns the seconds that it took."""

        def comes_true() -> object:
            assert self.pods.problem is None, self.pods.problem
            return condition()

        return wait_until(comes_true, timeout_s=timeout_s, poll_s=0.2, why=self.why)


@contextmanager
def served_pods(checkpoint: Path, folder: Path, **replicas: Any) -> Iterator[ServedPods]:
    """Returns the objects as rendered, except that a pod has one CPU and goes away after 15 s
    without work, not 120, that its address is its own, and that clients need no key."""
    objects = render("base")
    owner = find(objects, "RayService/completions")
    (group,) = cluster_spec(owner)["workerGroupSpecs"]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    resources["limits"]["cpu"] = resources["requests"]["cpu"] = "1"
    group["idleTimeoutSeconds"] = 15
    group["minReplicas"] = replicas["min_replicas"]
    settings = yaml.safe_load(owner["spec"]["serveConfigV2"])
    settings["http_options"] = {"host": POD_HOST, "port": free_port()}
    (application,) = settings["applications"]
    arguments = application["args"]
    del arguments["api_key_file"]
    arguments |= {"checkpoint": str(checkpoint), "host": "127.0.0.1", "model_name": MODEL}
    arguments["storage"] = {"uri": str(folder / "storage")}
    arguments["replicas"] |= {"threads_per_replica": 1} | replicas

    with ExitStack() as stack:
        redis = stack.enter_context(redis_server(folder / "redis"))
        pods = stack.enter_context(
            PodCluster(objects, "RayService/completions", num_nodes=4, redis=redis)
        )
        port = settings["http_options"]["port"]
        service = ServiceStandIn(lambda: pods.addresses, target_port=port, probe_path="/-/healthz")
        served = ServedPods(pods, stack.enter_context(service.serving()))
        url = f"{pods.jobs_url}/api/serve/applications/"
        httpx.put(url, headers=pods.headers, json=settings, timeout=limit_s(60)).raise_for_status()
        served.until(lambda: served.status() == "RUNNING")
        served.until(lambda: len(service.ready) == replicas["min_replicas"])
        yield served

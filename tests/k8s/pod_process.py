"""One pod as a real Ray node on this machine: a `ray start --block` with what its manifest gives
it.

From the manifest come the resources, the environment, the preStop hook and the grace period. The
pod's own address, 127.0.1.N, is that of the name `pod.internal` for its processes alone; Ray's own
ports are on 127.0.0.1 for all pods. The pod ends with the thread that started it, also where this
process dies.
"""

import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
from ray.autoscaler._private.kuberay.utils import parse_quantity

from cluster.local.local_cluster import NODE_NAME_VARIABLE, free_port
from cluster.storage.process_identity import kill, with_descendants
from tests.bound_process import start_bound
from tests.k8s.manifests import Manifest
from tests.repository import REPOSITORY

POD_HOST = "pod.internal"

needs_pods = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "--mount", "true"], check=False).returncode != 0,
    reason="a pod needs a mount namespace of its own: run as root, on Linux",
)

_OBJECT_STORE_BYTES = 80 << 20


class PodProcess:
    """Runs from its creation until it is ended or killed."""

    def __init__(
        self,
        name: str,
        group: Manifest,
        flags: list[str],
        *,
        number: int,
        environment: Mapping[str, str],
        folder: Path,
    ) -> None:
        """Takes a `headGroupSpec` or one of the `workerGroupSpecs`; `environment` overrides this
        process's."""
        self.name, self.address = name, f"127.0.1.{number}"
        self.log = folder / f"{name}.log"
        self._pod_spec, self._environment = (
            group["template"]["spec"],
            environment | {NODE_NAME_VARIABLE: name},
        )
        hosts = folder / f"hosts-{number}"
        hosts.write_text(f"127.0.0.1 localhost\n{self.address} {POD_HOST}\n")
        command = [
            sys.executable,
            str(REPOSITORY / "cluster/local/start_node.py"),
            "start",
            "--block",
            *flags,
        ]
        command += [
            "--node-ip-address",
            "127.0.0.1",
            "--object-store-memory",
            str(_OBJECT_STORE_BYTES),
        ]
        command += ["--min-worker-port", "0", "--max-worker-port", "0", "--log-color", "false"]
        command += [
            "--dashboard-agent-listen-port",
            str(free_port()),
            "--temp-dir",
            str(folder / f"pod-{number}"),
        ]
        params = _resources(self._container) | group["rayStartParams"]
        command += [word for key, value in params.items() for word in (f"--{key}", value)]
        script = f"mount --bind {shlex.quote(str(hosts))} /etc/hosts && exec {shlex.join(command)}"
        self._process = start_bound(
            ["unshare", "--mount", "sh", "-c", script], log=self.log, environment=self._environment
        )
        self._descendants: list[psutil.Process] = []
        self._pre_stop: subprocess.Popen[bytes] | None = None
        self._killed_at_s: float | None = None

    def tell_to_end(self) -> None:
        """Ends the pod as a kubelet does: the preStop hook, SIGTERM, and SIGKILL after the grace
        period."""
        if self._killed_at_s is not None:
            return
        self._killed_at_s = time.monotonic() + self._pod_spec["terminationGracePeriodSeconds"]
        hook = (
            self._container.get("lifecycle", {})
            .get("preStop", {})
            .get("exec", {})
            .get("command", ["true"])
        )
        self._pre_stop = start_bound(hook, log=self.log, environment=self._environment)

    def has_ended(self) -> bool:
        """Must be called often, as it also advances the end. Kills what an ended pod left
        behind."""
        known = {process for process in self._descendants if process.is_running()}
        self._descendants = [*known, *(set(with_descendants(self._process.pid)) - known)]
        if self._pre_stop is not None and self._pre_stop.poll() is not None:
            self._pre_stop = None
            self._process.send_signal(signal.SIGTERM)
        if self._killed_at_s is not None and time.monotonic() > self._killed_at_s:
            self._process.kill()
        if self._process.poll() is None:
            return False
        kill(self._descendants)
        return True

    def kill(self) -> None:
        """Sends SIGKILL, without notice, to all of its processes."""
        kill([*self._descendants, *with_descendants(self._process.pid)])
        self._process.wait()
        if self._pre_stop is not None:
            self._pre_stop.kill()
            self._pre_stop.wait()

    @property
    def _container(self) -> Manifest:
        return self._pod_spec["containers"][0]


def _resources(container: Manifest) -> dict[str, str]:
    """Returns the flags of `ray start` that KubeRay derives from a container's limits."""
    limits = container["resources"]["limits"]
    flags = {
        "num-cpus": limits["cpu"],
        "num-gpus": limits.get("nvidia.com/gpu", "0"),
        "memory": limits["memory"],
    }
    return {flag: str(int(parse_quantity(value))) for flag, value in flags.items()}

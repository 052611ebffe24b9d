"""The Redis of component `redis-tls` and a Ray head agree on TLS, without which Redis does not
answer."""

import secrets
import socket
import subprocess
from pathlib import Path

import pytest

from cluster.local.local_cluster import free_port
from tests.bound_process import start_bound
from tests.k8s.manifests import cluster_spec, find, pods, render
from tests.k8s.pod_process import needs_pods
from tests.k8s.process_pods import PodCluster
from tests.redis_server import Redis, needs_redis
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, needs_pods, needs_redis]

SECRET = "/secrets/redis-tls"


def test_a_head_keeps_its_state_in_redis_by_tls(tmp_path: Path) -> None:
    """Starts Redis with the test's own certificate, folder, address and port."""
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=redis -addext subjectAltName=DNS:redis,IP:127.0.0.1"
    subprocess.run(
        [*make.split(), "-keyout", "tls.key", "-out", "tls.crt"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    (tmp_path / "ca.crt").write_bytes((tmp_path / "tls.crt").read_bytes())
    objects, port, password = (
        render("overlays/gpu + components/redis-tls"),
        free_port(),
        secrets.token_hex(16),
    )
    (server,) = [pod for pod in pods(objects) if pod.role == "redis"]
    script = (
        server.container["args"][0].replace(SECRET, str(tmp_path)).replace("/data", str(tmp_path))
    )
    script = script.replace("tls-port 6379", f"bind 127.0.0.1\ntls-port {port}")
    log = tmp_path / "redis.log"
    process = start_bound(
        [*server.container["command"], script], log=log, environment={"REDIS_PASSWORD": password}
    )
    try:
        wait_until(
            lambda: "Ready to accept connections tls" in log.read_text(),
            timeout_s=20,
            why=log.read_text,
        )
        with (
            socket.create_connection(("127.0.0.1", port), timeout=5) as plain,
            pytest.raises(ConnectionResetError),
        ):
            plain.sendall(b"PING\r\n")
            plain.recv(100)
        shared = cluster_spec(find(objects, "RayCluster/shared"))
        variables = shared["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
        (authority,) = [one for one in variables if one["name"] == "RAY_REDIS_CA_CERT"]
        assert authority["value"] == f"{SECRET}/ca.crt"
        authority["value"] = str(tmp_path / "ca.crt")
        scheme = shared["gcsFaultToleranceOptions"]["redisAddress"].partition("://")[0]
        redis = Redis(f"{scheme}://127.0.0.1:{port}", password)
        with PodCluster(objects, "RayCluster/shared", num_nodes=0, redis=redis) as cluster:
            job = cluster.submit("true")
            wait_until(
                lambda: cluster.jobs.get_job_status(job).is_terminal(),
                why=lambda: "the job does not end",
            )
        assert (tmp_path / "appendonlydir").is_dir()
        assert b"RAY" in b"".join(
            path.read_bytes() for path in (tmp_path / "appendonlydir").iterdir()
        )
    finally:
        process.kill()
        process.wait()

"""A run and its endpoint listen on loopback or ask for a token or key, and leave no secret
anywhere.

One local cluster with real secrets of the test's own making trains a run into S3 and serves it.
"""

import ipaddress
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
import yaml

from cluster.cli import main
from cluster.endpoint.endpoint import Endpoint, deploy
from cluster.local.jobs_api import JobsApi, Token
from cluster.local.local_cluster import LocalCluster, free_port
from cluster.settings.flags import validate_config
from cluster.settings.run import ClusterConfig, RunConfig, StorageConfig, to_yaml
from cluster.settings.serve import ServeConfig
from cluster.stages.stage import connected, run_stage
from cluster.storage.uris import open_storage
from tests.jobs.corpora import number_texts
from tests.time_limits import limit_s

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

VARIABLES = ("AWS_SESSION_TOKEN", "GRAFANA_TOKEN", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD")
REFUSED = (401, 403)


@dataclass
class House:
    """Everything that was started, and what was observed meanwhile."""

    cluster: LocalCluster
    config: RunConfig
    secrets: dict[str, str]
    endpoint: Endpoint | None = None
    listening: set[tuple[str, str, int]] = field(default_factory=set)  # process, address, port
    command_lines: set[str] = field(default_factory=set)

    def look(self, before: set[psutil.Process]) -> None:
        for process in set(psutil.Process().children(recursive=True)) - before:
            try:
                self.command_lines.add(" ".join(process.cmdline()))
                for connection in process.net_connections("inet"):
                    if connection.status == psutil.CONN_LISTEN:
                        # IPv4 on a socket for both
                        address = connection.laddr.ip.removeprefix("::ffff:")
                        self.listening.add((process.name(), address, connection.laddr.port))
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue


@pytest.fixture(scope="module")
def house(s3_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    import boto3

    folder = tmp_path_factory.mktemp("doors")
    boto3.client("s3").create_bucket(Bucket="doors")
    texts = number_texts(folder / "texts", num_texts=6)
    config = validate_config(
        {
            "run_id": "seen",
            "model": {"preset": "tiny"},
            "data": {"source": str(texts), "vocab_size": 300, "val_fraction": 0.2},
            "train": {
                "max_tokens": 40 * 256,
                "global_batch_size": 8,
                "micro_batch_size": 4,
                "seq_len": 32,
            },
            "storage": {"uri": "s3://doors/store"},
        },
        RunConfig,
    )
    with pytest.MonkeyPatch.context() as patch:
        seeded = {name: secrets.token_hex(16) for name in VARIABLES}
        for name, value in seeded.items():
            patch.setenv(name, value)
        for name in ("keys", "admin"):
            seeded[name] = secrets.token_urlsafe(24)
            (folder / name).write_text(seeded[name])
            (folder / name).chmod(0o600)
        before = set(psutil.Process().children(recursive=True))
        with connected(ClusterConfig(num_nodes=2), cpus_per_node=3) as connection:
            cluster = connection.local
            assert cluster is not None
            seeded |= {"token": cluster.token, "AWS_SECRET_ACCESS_KEY": "test-secret-never-shown"}
            house, ended = House(cluster, config, seeded), threading.Event()

            def watch() -> None:
                while not ended.wait(0.3):
                    house.look(before)

            watcher = threading.Thread(target=watch)
            watcher.start()
            try:
                run = run_stage(connection, "jobs.pretrain", config)
                serving = ServeConfig(
                    checkpoint=run["checkpoint"],
                    port=free_port(),
                    api_key_file=str(folder / "keys"),
                    admin_key_file=str(folder / "admin"),
                    storage=StorageConfig(uri="s3://doors/store"),
                )
                house.endpoint = deploy(connection, serving)
                house.look(before)
                yield house
            finally:
                ended.set()
                watcher.join()


def test_what_listens_is_on_loopback_or_asks_for_the_token(house: House) -> None:
    names = {name for name, _, _ in house.listening}
    assert {"gcs_server", "raylet"} <= names
    ports = {port for _, _, port in house.listening}
    assert house.endpoint is not None
    assert {
        int(url.rpartition(":")[2]) for url in (house.cluster.jobs_url, house.endpoint.url)
    } <= ports
    outside = {found for found in house.listening if not ipaddress.ip_address(found[1]).is_loopback}
    # Ray Serve's replicas listen on all interfaces for calls between deployments, and nothing can
    # be set (Ray 2.60).
    assert {name.partition(":raymill")[0] for name, _, _ in outside} <= {"ray::ServeReplica"}
    for port in {port for _, _, port in outside}:
        for metadata in ((), (("authorization", "Bearer wrong"),)):
            assert answer_of_replica(port, metadata) is grpc.StatusCode.UNAUTHENTICATED
        right = (("authorization", f"Bearer {house.cluster.token}"),)
        assert answer_of_replica(port, right) is not grpc.StatusCode.UNAUTHENTICATED


def answer_of_replica(port: int, metadata: tuple[tuple[str, str], ...]) -> grpc.StatusCode:
    """Returns the answer to a meaningless request."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
        with pytest.raises(grpc.RpcError) as refused:
            call(b"", metadata=metadata, timeout=limit_s(20))
    return refused.value.code()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/version"),
        ("GET", "/api/jobs/"),
        ("POST", "/api/jobs/"),
        ("GET", "/api/v0/nodes"),
        ("GET", "/api/serve/applications/"),
        ("GET", "/nodes?view=summary"),
    ],
)
def test_the_dashboard_asks_for_the_token(house: House, method: str, path: str) -> None:
    url, right = house.cluster.jobs_url + path, {"Authorization": f"Bearer {house.cluster.token}"}
    assert httpx.request(method, url, timeout=limit_s(20)).status_code in REFUSED
    wrong = {"Authorization": f"Bearer {'0' * len(house.cluster.token)}"}
    assert httpx.request(method, url, headers=wrong, timeout=limit_s(20)).status_code in REFUSED
    assert httpx.request(method, url, headers=right, timeout=limit_s(20)).status_code not in REFUSED


@pytest.mark.parametrize(
    ("method", "path", "key"),
    [
        ("GET", "/v1/models", "keys"),
        ("POST", "/v1/completions", "keys"),
        ("POST", "/v1/chat/completions", "keys"),
        ("POST", "/v1/responses", "keys"),
        ("POST", "/tokenize", "keys"),
        ("POST", "/detokenize", "keys"),
        ("POST", "/v1/xray", "keys"),
        ("POST", "/v1/trace", "keys"),
        ("GET", "/admin/status", "admin"),
        ("POST", "/admin/promote", "admin"),
        ("POST", "/admin/rollback", "admin"),
        ("POST", "/admin/drain", "admin"),
    ],
)
def test_the_endpoint_asks_for_its_keys(house: House, method: str, path: str, key: str) -> None:
    assert house.endpoint is not None
    url, other = house.endpoint.url + path, {"keys": "wrong", "admin": house.secrets["keys"]}[key]

    def answer(token: str | None, body: str = "{}") -> int:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.request(
            method, url, headers=headers | {"Content-Type": "application/json"}, timeout=limit_s(30)
        ).status_code

    assert answer(None) in REFUSED
    assert answer(other) in REFUSED  # a user's key opens no operator's door
    if path != "/admin/drain":
        assert answer(house.secrets[key]) not in REFUSED


def test_no_secret_is_in_a_command_line(house: House) -> None:
    assert len(house.command_lines) > 10
    assert_clean(house, "command line", house.command_lines)


def test_no_secret_is_in_what_ray_shows_of_jobs(house: House) -> None:
    api = JobsApi(house.cluster.jobs_url, Token(house.cluster.token, "the test"))
    jobs = httpx.get(f"{api.url}/api/jobs/", headers=api.headers, timeout=limit_s(30)).json()
    assert len(jobs) == 2
    assert any("AWS_ENDPOINT_URL" in str(job["runtime_env"]) for job in jobs)
    assert_clean(house, "job", [str(job) for job in jobs])


def test_no_secret_is_in_logs(house: House) -> None:
    folder = Path(house.cluster.environment["RAY_AUTH_TOKEN_PATH"]).parent
    logs = [
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and "logs" in str(path)
    ]
    logs += list(folder.glob("*.log"))
    assert len(logs) > 10
    for path in logs:
        assert_clean(house, str(path), [path.read_text(errors="replace")])


def test_no_secret_is_in_the_storage(house: House) -> None:
    storage = open_storage("s3://doors/store")
    keys = [entry.key for entry in storage.list()]
    assert {"runs/seen/ledger.jsonl", "runs/seen/config.yaml", "endpoint.json"} <= set(keys)
    assert any(key.startswith("runs/seen/jobs/") and "/log-" in key for key in keys)
    for key in keys:
        assert_clean(house, key, [storage.read_bytes(key).decode(errors="replace")])


def test_no_secret_is_in_rendered_manifests(
    house: House,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tests.k8s.api_stand_in import ApiStandIn

    values: dict[str, Any] = yaml.safe_load(to_yaml(house.config))
    open_storage("s3://doors").write_bytes("corpus/a.txt", b"words")
    values |= {"run_id": "rendered", "data": values["data"] | {"source": "s3://doors/corpus"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    with ApiStandIn(tmp_path).serving() as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig()))
        code = main(
            ["submit", "pretrain", str(tmp_path / "run.yaml"), "--kuberay", "dev", "--dry-run"]
        )
    rendered, said = capsys.readouterr()
    assert code == 0, said
    assert "RayJob" in rendered and "s3://doors/store" in rendered
    assert_clean(house, "manifest", [rendered])


def assert_clean(house: House, where: str, texts: Any) -> None:
    """Names the secret that was found, not its value."""
    assert "" not in house.secrets.values()
    found = {name for text in texts for name, value in house.secrets.items() if value in text}
    assert not found, f"{where} holds the secrets {sorted(found)}"

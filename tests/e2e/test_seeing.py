"""A real Prometheus scrapes a training run with a killed worker and an endpoint with a canary:
every panel has its data."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from cluster.commands.chaos import chaos, parse_faults
from cluster.endpoint.endpoint import deploy
from cluster.local.local_cluster import LocalCluster, free_port
from cluster.monitoring.files import Json, documents
from cluster.settings.run import ClusterConfig, RunConfig
from cluster.settings.serve import ServeConfig
from cluster.stages.stage import Connection, connected, run_stage
from tests.metric_series import SERIES
from tests.prometheus import Prometheus, needs_prometheus, prometheus
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, needs_prometheus]

SEEN_ON_GPUS_ONLY = {"raymill_train_mfu", "ray_node_gpus_utilization", "ray_node_gram_used"}
SEEN_WITH_AN_AUTOSCALER_ONLY = {"ray_cluster_active_nodes", "ray_cluster_pending_nodes"}
CANNOT_BE_SEEN_HERE = {
    name
    for name, metric in SERIES.items()
    if metric.name in SEEN_ON_GPUS_ONLY | SEEN_WITH_AN_AUTOSCALER_ONLY
}
KEYS = [f"sk-{number}" for number in range(8)]
"""Several, of which the canary has some: a key keeps its version."""


@dataclass(frozen=True)
class Scene:
    prometheus: Prometheus
    began_s: float
    run_id: str


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("seeing")
    (folder / "texts").mkdir()
    for number in range(21):
        # The last repeats the first
        words = " ".join(f"w{(number % 20 * 31 + i * i) % 211}" for i in range(600))
        (folder / "texts" / f"{number:02d}.txt").write_text(f"Document {number % 20}. {words}")
    config = RunConfig.model_validate(
        {
            "run_id": "seen",
            "data": {
                "source": str(folder / "texts" / "*.txt"),
                "vocab_size": 400,
                "val_fraction": 0.2,
            },
            "model": {"preset": "tiny"},
            "train": {
                "max_tokens": 600 * 8 * 64,
                "global_batch_size": 8,
                "micro_batch_size": 2,
                "seq_len": 64,
                "eval_every_steps": 50,
                "eval_max_tokens": 2048,
            },
            "scaling": {"min_workers": 1, "max_workers": 2, "price_per_device_hour": 2.5},
            "checkpoint": {"save_every_steps": 50},
            "storage": {"uri": str(folder / "store")},
        }
    )
    began_s = time.time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")  # of 10 s
        with connected(ClusterConfig(num_nodes=2), cpus_per_node=3) as connection:
            assert connection.local is not None
            with prometheus(
                folder / "prometheus", scrape_targets=scrape_targets(connection.local)
            ) as server:
                with chaos(
                    parse_faults(["kill-worker@100"]), cluster=connection.local, config=config
                ):
                    run_stage(connection, "jobs.pretrain", config)
                ask_an_endpoint(connection, folder, server)
                yield Scene(server, began_s, "seen")


def scrape_targets(cluster: LocalCluster) -> Path:
    """The file in which Ray's head keeps the metrics ports of all nodes, for Prometheus'
    `file_sd_configs`."""
    folder = Path(cluster.environment["RAY_AUTH_TOKEN_PATH"]).parent
    return folder / "head" / "prom_metrics_service_discovery.json"


def ask_an_endpoint(connection: Connection, folder: Path, server: Prometheus) -> None:
    """Asks an endpoint until Prometheus has seen its answers."""
    (folder / "keys").write_text("\n".join(KEYS))
    (folder / "admin").write_text("sk-admin")
    config = ServeConfig.model_validate(
        {
            "port": free_port(),
            "api_key_file": str(folder / "keys"),
            "admin_key_file": str(folder / "admin"),
            "storage": {"uri": str(folder / "store")},
            "delivery": {"watch_s": 3600},
        }
    )
    endpoint = deploy(connection, config)
    *_, earlier, _ = sorted((folder / "store" / "runs" / "seen" / "checkpoints").glob("step-*"))
    answer = httpx.post(
        f"{endpoint.url}/admin/promote",
        headers={"Authorization": "Bearer sk-admin"},
        json={"checkpoint": str(earlier), "canary_percent": 50},
        timeout=limit_s(60),
    )
    assert answer.status_code == 202, answer.text
    with httpx.Client(base_url=endpoint.url, timeout=limit_s(60)) as client:
        request = {
            "model": endpoint.model,
            "prompt": "Document 3.",
            "max_tokens": 16,
            "ignore_eos": True,
        }

        def status(key: str, **fields: object) -> int:
            headers = {"Authorization": f"Bearer {key}"}
            return client.post(
                "/v1/completions", json=request | fields, headers=headers
            ).status_code

        def answers_are_seen() -> bool:
            for key in KEYS:
                assert {status(key, stream=stream) for stream in (False, True)} == {200}
            assert status(KEYS[0], n=-1) == 400
            seen = server.get("query", query='ray_raymill_version_answers_total{outcome="ok"} > 2')[
                "result"
            ]
            return len(seen) == 2 and "ray_vllm_generation_tokens_total" in server.names()

        wait_until(answers_are_seen, timeout_s=60)
        time.sleep(4)  # two more scrapes, which a rate needs


def substituted(expr: str, scene: Scene) -> str:
    for name, value in {
        "$__rate_interval": "10s",
        "$run": scene.run_id,
        "$application": "raymill",
    }.items():
        expr = expr.replace(name, value)
    return expr


def panels() -> list[Json]:
    return [
        panel for body in documents().values() for panel in body["panels"] if panel["type"] != "row"
    ]


def test_what_is_exported_is_what_the_table_says(scene: Scene) -> None:
    names = scene.prometheus.names()
    ours = {name for name in names if name.startswith(("ray_raymill_", "ray_vllm_"))}
    assert ours - SERIES.keys() == set()
    assert SERIES.keys() - names == CANNOT_BE_SEEN_HERE


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: str(panel["title"]))
def test_every_panel_has_data(panel: Json, scene: Scene) -> None:
    for expr in [target["expr"] for target in panel["targets"]]:
        if set(re.findall(r"ray_\w+", expr)) & CANNOT_BE_SEEN_HERE:
            pytest.skip("needs GPUs or an autoscaler")
        found = scene.prometheus.history(substituted(expr, scene), since_s=scene.began_s)
        numbers = [value for series in found for _, value in series["values"] if value != "NaN"]
        assert numbers, expr


def test_labels_are_those_of_the_table(scene: Scene) -> None:
    for name, metric in SERIES.items():
        if name in CANNOT_BE_SEEN_HERE:
            continue
        for series in scene.prometheus.get("series", **{"match[]": name}):
            assert set(metric.all_labels) <= series.keys(), series
            if metric.values:
                assert series[metric.labels[-1]] in metric.values

"""The head of the local cluster is lost, in the middle of a run and under an endpoint, and is
restarted.

On Kubernetes, where the endpoint has proxies besides the head's, no request fails:
tests/serving/delivery/test_head_loss.py.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.commands.chaos import chaos, parse_faults
from cluster.endpoint.endpoint import Endpoint, deploy, stream_completion
from cluster.local.local_cluster import free_port
from cluster.settings.run import ClusterConfig, RunConfig, StorageConfig
from cluster.settings.serve import ReplicaConfig, ServeConfig
from cluster.stages.stage import Connection, connected, run_stage
from raymill.errors import UserError
from tests.e2e.tiny_runs import ledger_of, losses, tiny_run
from tests.jobs.corpora import number_texts
from tests.serving.endpoint_parts import children_with
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

# Workers go on until Ray has noticed the loss: none may reach the last step meanwhile, however fast
# its processor is.
NUM_STEPS, SAVE_EVERY = 1500, 150
ENGINE = "serving.engine_process.run_engine"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the corpus and the storage."""
    folder = tmp_path_factory.mktemp("head-loss")
    number_texts(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def connection() -> Iterator[Connection]:
    with connected(ClusterConfig(num_nodes=3), cpus_per_node=1) as connection:
        yield connection


def run_config(folder: Path, run_id: str) -> RunConfig:
    return tiny_run(
        folder,
        run_id,
        num_steps=NUM_STEPS,
        save_every_steps=SAVE_EVERY,
        batch_size=32,
        lane_size=4,
        dropout=0.1,
        min_workers=1,
        max_workers=2,
    )


@pytest.fixture(scope="module")
def undisturbed(connection: Connection, folder: Path) -> dict[str, Any]:
    return run_stage(connection, "jobs.pretrain", run_config(folder, "undisturbed"))


def test_a_run_goes_on_under_a_new_head(
    connection: Connection,
    folder: Path,
    undisturbed: dict[str, Any],
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert connection.local is not None
    nodes = connection.local.node_names
    config = run_config(folder, "disturbed")
    with chaos(parse_faults(["kill-head@220"]), cluster=connection.local, config=config):
        disturbed = run_stage(connection, "jobs.pretrain", config)
    assert connection.local.node_names == nodes
    (recovery,) = ledger_of(config).recoveries()
    assert "the head of the local cluster was lost" in capfd.readouterr().err
    with capfd.disabled():
        print(
            f"from the last step before to the first after it: {recovery.seconds} s, steps lost: {recovery.lost_steps}"
        )
    assert recovery.lost_steps <= SAVE_EVERY
    assert disturbed["parameter_hash"] == undisturbed["parameter_hash"]
    assert losses(config) == losses(run_config(folder, "undisturbed"))


def test_an_endpoint_comes_back_with_its_replica(
    connection: Connection, folder: Path, undisturbed: dict[str, Any]
) -> None:
    assert connection.local is not None
    config = ServeConfig(
        checkpoint=undisturbed["checkpoint"],
        port=free_port(),
        replicas=ReplicaConfig(min_replicas=1, max_replicas=1),
        storage=StorageConfig(uri=str(folder / "storage")),
    )
    endpoint = deploy(connection, config)
    before, engines = answer(endpoint), children_with(ENGINE)
    assert before
    assert engines

    lost_s = time.monotonic()
    connection.local.kill_node("head")
    connection.local.restart_head()
    wait_until(lambda: answer(endpoint) is not None, timeout_s=120)
    print(f"the endpoint answers {time.monotonic() - lost_s:.1f} s after the loss of its head")
    assert answer(endpoint) == before
    assert children_with(ENGINE) == engines


def answer(endpoint: Endpoint) -> str | None:
    """Returns a greedy completion, or None if there is none."""
    request = {"prompt": "tell me", "max_tokens": 8, "temperature": 0.0}
    try:
        return str(stream_completion(endpoint, request, on_text=lambda text: None)["text"])
    except UserError:
        return None

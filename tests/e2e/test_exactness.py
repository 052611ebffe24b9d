"""The flagship: one config, any number of workers, any schedule of kills and resizes, the same bits.

Everything is real: raylets, Ray Train, gloo, SIGKILL. One local cluster serves the whole module.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.local.chaos import Chaos, parse_faults
from cluster.local.local_cluster import LocalCluster
from cluster.settings.flags import validate_config
from cluster.settings.run import RunConfig
from cluster.stages.stage import Connection, run_stage
from cluster.storage.uris import open_storage
from jobs.run.ledger import Ledger
from tests.jobs.corpora import number_texts

pytestmark = pytest.mark.cluster

SETTINGS: dict[str, Any] = {
    "model": {"preset": "tiny", "dropout": 0.1},
    "data": {"vocab_size": 300, "val_fraction": 0.2},
    "train": {
        "max_tokens": 120 * 8 * 32,
        "global_batch_size": 8,
        "micro_batch_size": 1,
        "seq_len": 32,
        "learning_rate": 3e-3,
        "eval_every_steps": 40,
    },
    "checkpoint": {"save_every_steps": 20},
}


@pytest.fixture(scope="module")
def connection() -> Iterator[Connection]:
    with LocalCluster(num_nodes=3, cpus_per_node=2) as cluster:
        yield Connection(cluster.jobs_url, {"Authorization": f"Bearer {cluster.token}"}, cluster)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return number_texts(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="module")
def storage_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("storage"))


def run_config(corpus: Path, storage_uri: str, run_id: str, **scaling: Any) -> RunConfig:
    values = SETTINGS | {"scaling": scaling, "storage": {"uri": storage_uri}, "run_id": run_id}
    values["data"] = values["data"] | {"source": str(corpus)}
    return validate_config(values, RunConfig)


def losses(config: RunConfig) -> list[float]:
    ledger = Ledger.read(open_storage(config.storage.uri).child(f"runs/{config.run_id}"))
    assert [line["step"] for line in ledger.steps] == list(range(1, 121))
    return [line["loss"] for line in ledger.steps]


@pytest.fixture(scope="module")
def alone(connection: Connection, corpus: Path, storage_uri: str) -> tuple[dict[str, Any], list[float]]:
    """The run that everything is compared with: one worker, undisturbed."""
    config = run_config(corpus, storage_uri, "alone", min_workers=1, max_workers=1)
    return run_stage(connection, "jobs.pretrain", config), losses(config)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_number_of_workers_gives_the_same_bits(
    connection: Connection,
    corpus: Path,
    storage_uri: str,
    alone: tuple[dict[str, Any], list[float]],
    world_size: int,
) -> None:
    config = run_config(corpus, storage_uri, f"world-{world_size}", min_workers=world_size, max_workers=world_size)
    result = run_stage(connection, "jobs.pretrain", config)
    assert result["world_sizes"] == [world_size]
    assert result["parameter_hash"] == alone[0]["parameter_hash"]
    assert losses(config) == alone[1]
    assert result["val_loss"] == alone[0]["val_loss"]


def test_kills_and_resizes_change_nothing(
    connection: Connection, corpus: Path, storage_uri: str, alone: tuple[dict[str, Any], list[float]]
) -> None:
    """A worker and then a node are killed, and a node joins: the run shrinks, grows, and ends with the same bits."""
    config = run_config(corpus, storage_uri, "disturbed", min_workers=1, max_workers=4, resize_check_s=2)
    faults = parse_faults(["kill-worker@15", "kill-node@45", "add-node@65"])
    with Chaos(faults, cluster=connection.local, config=config):
        result = run_stage(connection, "jobs.pretrain", config)
    assert result["restarts"] >= 2
    assert min(result["world_sizes"]) < max(result["world_sizes"])
    assert result["parameter_hash"] == alone[0]["parameter_hash"]
    assert losses(config) == alone[1]


@pytest.mark.slow
def test_stock_ddp_trains_too_but_with_other_bits(
    connection: Connection, corpus: Path, storage_uri: str, alone: tuple[dict[str, Any], list[float]]
) -> None:
    """`exact: false` reaches the same loss up to rounding; that its bits differ shows that the tests above can fail."""
    exact = run_config(corpus, storage_uri, "ddp", min_workers=3, max_workers=3)
    config = exact.model_copy(update={"train": exact.train.model_copy(update={"exact": False})})
    result = run_stage(connection, "jobs.pretrain", config)
    assert result["parameter_hash"] != alone[0]["parameter_hash"]
    assert losses(config) == pytest.approx(alone[1], rel=1e-3)

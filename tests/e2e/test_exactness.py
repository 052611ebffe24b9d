"""The flagship: one config, any number of workers, any schedule of kills and resizes, the same bits.

Everything is real: raylets, Ray Train, gloo, SIGKILL. One local cluster serves the module, and one process drives the
worlds of each size, as most of a short run's time is the start of its processes.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.local.chaos import Chaos, parse_faults
from cluster.settings.run import ClusterConfig, RunConfig, write_config
from cluster.stages.stage import Connection, connected, run_stage
from tests.e2e.tiny_runs import losses, tiny_run
from tests.jobs.corpora import number_texts
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

pytestmark = pytest.mark.cluster

SIZES = (1, 2, 3, 4)

Outcome = tuple[dict[str, Any], list[float]]
"""A run's result and its losses."""


@pytest.fixture(scope="module")
def connection() -> Iterator[Connection]:
    with connected(ClusterConfig(num_nodes=3), cpus_per_node=2) as connection:
        yield connection


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exactness")
    number_texts(folder / "corpus")
    return folder


def run_config(folder: Path, run_id: str, *, exact: bool = True, **scaling: Any) -> RunConfig:
    return tiny_run(
        folder,
        run_id,
        num_steps=120,
        eval_every_steps=40,
        save_every_steps=20,
        dropout=0.1,
        train={"exact": exact},
        **scaling,
    )


@pytest.fixture(scope="module")
def worlds(connection: Connection, folder: Path) -> dict[int, Outcome]:
    """The same run with each number of workers, undisturbed."""
    assert connection.local is not None
    configs = {size: run_config(folder, f"world-{size}", min_workers=size, max_workers=size) for size in SIZES}
    for size, config in configs.items():
        write_config(config, folder / f"world-{size}.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.train_in_turn", *(str(folder / f"world-{size}.yaml") for size in SIZES)],
        cwd=REPOSITORY,
        env=os.environ | connection.local.environment | {"RAY_ADDRESS": connection.local.address},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=limit_s(180),
    )
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {size: (result, losses(configs[size])) for size, result in zip(SIZES, results, strict=True)}


@pytest.mark.parametrize("size", SIZES[1:])
def test_any_number_of_workers_gives_the_same_bits(worlds: dict[int, Outcome], size: int) -> None:
    (alone, losses_alone), (result, losses_together) = worlds[1], worlds[size]
    assert result["world_sizes"] == [size]
    assert result["parameter_hash"] == alone["parameter_hash"]
    assert losses_together == losses_alone
    assert result["val_loss"] == alone["val_loss"]


def test_kills_and_resizes_change_nothing(connection: Connection, folder: Path, worlds: dict[int, Outcome]) -> None:
    """A worker and then a node are killed, and a node joins: the run shrinks, grows, and ends with the same bits."""
    config = run_config(folder, "disturbed", min_workers=1, max_workers=4, resize_check_s=2)
    faults = parse_faults(["kill-worker@15", "kill-node@45", "add-node@65"])
    with Chaos(faults, cluster=connection.local, config=config):
        result = run_stage(connection, "jobs.pretrain", config)
    assert result["restarts"] >= 2
    assert min(result["world_sizes"]) < max(result["world_sizes"])
    assert (result["parameter_hash"], losses(config)) == (worlds[1][0]["parameter_hash"], worlds[1][1])


@pytest.mark.slow
def test_stock_ddp_trains_too_but_with_other_bits(
    connection: Connection, folder: Path, worlds: dict[int, Outcome]
) -> None:
    """`exact: false` reaches the same loss up to rounding; that its bits differ shows that the tests above can fail."""
    config = run_config(folder, "ddp", exact=False, min_workers=3, max_workers=3)
    result = run_stage(connection, "jobs.pretrain", config)
    assert result["parameter_hash"] != worlds[1][0]["parameter_hash"]
    assert losses(config) == pytest.approx(worlds[1][1], rel=1e-3)

"""A sharded run of four workers in groups of two loses a node of one: two train, one is spare and
replaces the next loss, as soon as a worker has started there.

Everything is real: raylets of one worker each, Ray Train, and nodes that are killed and added.
"""

from pathlib import Path
from typing import Any

import pytest

from cluster.commands.chaos import chaos, parse_faults
from cluster.settings.run import ClusterConfig, RunConfig
from cluster.stages.stage import connected, run_stage
from tests.e2e.tiny_runs import ledger_of, losses, tiny_run
from tests.jobs.corpora import number_texts
from tests.paced_steps import paced

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NUM_STEPS = 200
STEP_S = 0.4  # a minute from the second loss to the end, in which the spare one's worker starts


def run_config(folder: Path, run_id: str, **scaling: Any) -> RunConfig:
    return tiny_run(
        folder,
        run_id,
        num_steps=NUM_STEPS,
        save_every_steps=40,
        batch_size=8,
        lane_size=2,
        dropout=0.1,
        **scaling,
    )


def test_a_lost_worker_of_whole_groups__leaves_a_spare_for_the_next_loss(tmp_path: Path) -> None:
    number_texts(tmp_path / "corpus")
    alone = run_config(tmp_path, "alone", min_workers=1, max_workers=1)
    groups = {
        "shard": "parameters",
        "shard_group": 2,
        "min_workers": 1,
        "max_workers": 4,
        "resize_check_s": 1,
    }
    config = run_config(tmp_path, "groups", **groups)
    with (
        paced(tmp_path) as pace,
        connected(ClusterConfig(num_nodes=5), cpus_per_node=1) as connection,
    ):
        expected = run_stage(connection, "jobs.pretrain", alone)
        faults = parse_faults(["kill-node@20", "kill-node@50", "add-node@80"])
        with pace.slow(STEP_S), chaos(faults, cluster=connection.local, config=config):
            result = run_stage(connection, "jobs.pretrain", config)
    ledger = ledger_of(config)
    print(result["world_sizes"], ledger.events("spares"))
    assert (result["parameter_hash"], losses(config)) == (expected["parameter_hash"], losses(alone))
    assert result["world_sizes"][:2] == [4, 2]
    assert 3 not in result["world_sizes"], (
        "three would be one group, of more workers than were asked for"
    )
    assert result["world_sizes"][-1] == 2, "the spare one replaced the second loss"
    first = ledger.events("spares")[0]
    assert (first["world_size"], first["spares"]) == (2, 1)

"""Scale on paper: the simulation against its formulas, and the page against the command that it
shows."""

import shlex
from itertools import pairwise

import pytest

from cluster.cli import command_parser
from cluster.settings.flags import settings_from_flags, validate_config
from cluster.settings.plan import PlanConfig
from cluster.settings.run import RunConfig
from jobs.plan.scale_simulation import scale_table, scales
from tests.repository import REPOSITORY

PAGE = REPOSITORY / "k8s" / "scale.md"


def documented() -> tuple[RunConfig, PlanConfig]:
    (command,) = [
        line
        for line in PAGE.read_text().splitlines()
        if line.startswith("raymill plan --simulate ")
    ]
    words = shlex.split(command)[1:]
    arguments = command_parser(words).parse_args(words)
    assert arguments.simulate
    run, options = (settings_from_flags(vars(arguments), root) for root in (RunConfig, PlanConfig))
    return validate_config(run, RunConfig), validate_config(options, PlanConfig)


def test_the_page_holds_what_its_command_prints() -> None:
    written = PAGE.read_text().partition("<!-- begin -->\n")[2].partition("<!-- end -->")[0]
    assert written.strip() == scale_table(scales(*documented())), (
        "paste the command's output between the marks"
    )


def test_more_gpus_compute_faster_and_wait_longer() -> None:
    rows = scales(*documented())
    assert [row["num_gpus"] for row in rows] == [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    for few, many in pairwise(rows):
        assert many["compute_s"] == pytest.approx(few["compute_s"] / 2)
        assert many["efficiency"] < few["efficiency"]
        assert many["mtbf_s"] == pytest.approx(few["mtbf_s"] / 2)
    assert rows[-1]["goodput_waiting"] < rows[-1]["goodput_elastic"]
    assert rows[-1]["goodput_waiting"] < rows[0]["goodput_waiting"]
    assert all(row["step_s"] == pytest.approx(row["compute_s"] + row["exposed_s"]) for row in rows)


def sharded(config: RunConfig, shard: str, group: int | None = None) -> RunConfig:
    scaling = config.scaling.model_copy(update={"shard": shard, "shard_group": group})
    return config.model_copy(update={"scaling": scaling})


def test_zero_1_lightens_snapshots() -> None:
    config, options = documented()
    whole, shares = scales(config, options)[-1], scales(sharded(config, "optimizer"), options)[-1]
    assert shares["snapshot_s"] == pytest.approx(whole["snapshot_s"] / 4096 * 8), (
        "the 8 GPUs of a node divide it"
    )
    assert shares["snapshot_wait_s"] == 0 < whole["snapshot_wait_s"] < whole["snapshot_s"]
    assert shares["snapshot_every"] < whole["snapshot_every"]
    sums_s = whole["exposed_s"] / 2
    assert shares["exposed_s"] > whole["exchange_s"] / 2 - sums_s, (
        "an update of a 4,096th hides little of what the weights take to go round"
    )


def test_groups_of_a_node_spare_the_storage() -> None:
    config, options = documented()
    flat, nodes = (scales(each, options) for each in (config, sharded(config, "gradients", 8)))
    for all_alike, in_groups in zip(flat[1:], nodes[1:], strict=True):
        assert in_groups["card_bytes"] == pytest.approx(all_alike["card_bytes"]), (
            "neighbors begin either way"
        )
    assert nodes[-1]["snapshot_s"] == flat[-1]["snapshot_s"], "a node has all shares either way"
    assert nodes[-1]["checkpoint_store_s"] == flat[-1]["checkpoint_store_s"], "one node stores it"
    for shard in ("gradients", "parameters"):
        over_nodes = scales(sharded(config, shard, 64), options)[-1]
        assert over_nodes["checkpoint_store_s"] == pytest.approx(flat[-1]["checkpoint_store_s"] / 8)
        assert over_nodes["snapshot_s"] == pytest.approx(flat[-1]["snapshot_s"] / 8)


@pytest.mark.parametrize("shard", ["optimizer", "gradients", "parameters"])
def test_every_rank_of_a_sharded_run_stores_its_own_parts(shard: str) -> None:
    config, options = documented()
    for whole, shares in zip(
        scales(config, options), scales(sharded(config, shard), options), strict=True
    ):
        num_nodes = max(1, shares["num_gpus"] // options.gpus_per_node)
        assert shares["checkpoint_store_s"] == pytest.approx(
            whole["checkpoint_store_s"] / num_nodes
        )
        assert shares["checkpoint_wait_s"] == 0, (
            "a step computes for longer than the copy of a share takes"
        )

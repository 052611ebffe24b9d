"""The tables of sharded runs in k8s/scale.md, against the planner."""

from typing import Any

import pytest

from cluster.settings.plan import PlanConfig
from cluster.settings.run import RunConfig
from jobs.plan.make_plan import make_plan
from jobs.plan.table import Figures
from tests.repository import REPOSITORY

PAGE = " ".join((REPOSITORY / "k8s" / "scale.md").read_text().split())
MOVED = (
    "{x[traffic][link_bytes]:size} | {x[traffic][card_bytes]:size} | {x[traffic][num_messages]:,}"
)


def planned(
    model: str,
    count: int,
    shard: str,
    group: int | None,
    *,
    network_gbit_per_s: float = 400,
    **train: Any,
) -> dict[str, Any]:
    train = {"max_tokens": 300_000_000_000, "precision": "bf16"} | train
    scaling = {"shard": shard, "shard_group": group}
    config = RunConfig.model_validate(
        {"model": {"preset": model}, "train": train, "scaling": scaling}
    )
    options = PlanConfig(gpu="h100", count=count, network_gbit_per_s=network_gbit_per_s)
    return make_plan(config, options)


@pytest.mark.parametrize("count", [8, 64, 512])
@pytest.mark.parametrize(
    ("shard", "group"),
    [
        ("none", None),
        ("optimizer", None),
        ("gradients", 8),
        ("parameters", 8),
        ("parameters", None),
    ],
)
def test_1_3b_in_each_way(count: int, shard: str, group: int | None) -> None:
    plan = planned("gpt3-1.3b", count, shard, group, global_batch_size=4096, micro_batch_size=1)
    x, memory = plan["exchange"], plan["memory_bytes"]["total"]
    heads = f"| {count} | {shard} | {group or (count if shard == 'parameters' else '–')} | "
    row = (
        "{memory:size} | "
        + MOVED
        + " | {x[seconds]:seconds} | {x[exposed_s]:seconds} | {efficiency:.0%} |"
    )
    row = heads + Figures().format(row, memory=memory, x=x, efficiency=x["compute_s"] / x["step_s"])
    assert row in PAGE, f"expected {row}"


@pytest.mark.parametrize(
    ("model", "lanes", "count"), [("gpt3-1.3b", 128, 512), ("gpt3-6.7b", 512, 2048)]
)
@pytest.mark.parametrize("link_gb", [50, 100, 200, 400])
@pytest.mark.parametrize("shard", ["gradients", "parameters"])
def test_a_lane_of_8192_tokens_for_four_gpus(
    model: str, lanes: int, count: int, link_gb: int, shard: str
) -> None:
    """Beside what eight GPUs take for as many tokens each, on links of so many GB/s."""
    sizes = {"global_batch_size": 4 * lanes, "micro_batch_size": 1, "micro_batches_per_lane": 4}
    few, many = (
        planned(model, size, shard, 8, network_gbit_per_s=8 * link_gb, **sizes)["exchange"]
        for size in (8, count)
    )
    row = Figures().format(
        "| {model} | {count:,} | {shard} | {link_gb} GB/s | {x[traffic][num_messages]:,} | {x[compute_s]:seconds} | "
        "{x[exposed_s]:seconds} | {efficiency:.0%} |",
        model=model,
        count=count,
        shard=shard,
        link_gb=link_gb,
        x=many,
        efficiency=8 * few["step_s"] / (count * many["step_s"]),
    )
    assert row in PAGE, f"expected {row}"


GPT_3 = [
    ("gradients", 1024, 1, True),
    ("parameters", 128, 1, True),
    ("parameters", 256, 1, True),
    ("parameters", 256, 2, True),
    ("parameters", 512, 2, True),
    ("parameters", 1024, 2, True),
    ("parameters", 1024, 1, False),
]


@pytest.mark.more
@pytest.mark.parametrize(("shard", "group", "at_a_time", "recompute"), GPT_3)
def test_gpt3_on_1024_gpus(*, shard: str, group: int, at_a_time: int, recompute: bool) -> None:
    sizes = {"global_batch_size": 2048, "micro_batch_size": at_a_time, "recompute": recompute}
    plan = planned("gpt3-175b", 1024, shard, group, **sizes)
    x, memory = plan["exchange"], plan["memory_bytes"]["total"]
    fits = not any("does not fit" in text for text in plan["warnings"])
    assert fits == (memory <= 72e9)
    heads = f"| {shard} | {group:,} | {at_a_time} | {'yes' if recompute else 'no'} | "
    row = (
        "{memory:size}{fits} | "
        + MOVED
        + " | {x[seconds]:seconds} | {x[exposed_s]:seconds} | {x[days]:,.3g} |"
    )
    row = heads + Figures().format(row, memory=memory, fits="" if fits else ", too much", x=x)
    assert row in PAGE, f"expected {row}"


def test_gpt3_as_its_paragraph_says() -> None:
    """The run that fits and has the shortest step."""
    sizes = {"global_batch_size": 2048, "micro_batch_size": 2, "recompute": True}
    plan = planned("gpt3-175b", 1024, "parameters", 512, **sizes)
    x, checkpoint = plan["exchange"], plan["checkpoint"]
    bytes_s = x["seconds"] - x["messages_s"]
    said = Figures().format(
        "A step computes for {x[compute_s]:seconds} and exchanges for {x[seconds]:seconds}: "
        "{x[traffic][card_bytes]:size} through each card in {bytes_s:seconds}, and {x[messages_s]:seconds} of messages. "
        "So it takes {x[step_s]:seconds}, and the run {x[days]:,.3g} days instead of {plan[days]:.2g}.",
        x=x,
        plan=plan,
        bytes_s=bytes_s,
    )
    assert said in PAGE, f"expected {said}"
    enough, without = x["least_sequences"], -int(-bytes_s // (x["compute_s"] / 2))
    said = f"below {enough} sequences that a GPU computes at a time, below {without} if messages cost nothing"
    assert said in PAGE, f"expected {said}"
    said = Figures().format(
        "A checkpoint is {checkpoint[bytes]:size}; its {shards} shards are stored in {checkpoint[store_s]:seconds}",
        checkpoint=checkpoint,
        shards=512,
    )
    assert said in PAGE, f"expected {said}"

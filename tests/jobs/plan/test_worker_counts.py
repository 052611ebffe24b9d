"""How many workers a sharded run uses of those that are possible, by the planner's own formula."""

import re
from typing import Any

import pytest

from cluster.settings.plan import PlanConfig
from cluster.settings.run import RunConfig
from jobs.plan.make_plan import make_plan
from jobs.plan.worker_counts import StepTimes, counts_to_run, hardware_of, uneven_groups

H100 = PlanConfig(gpu="h100")


def run_of_64(**scaling: Any) -> RunConfig:
    """1.3B on eight nodes of eight GPUs, where a group of eight is a node's."""
    train = {
        "precision": "bf16",
        "global_batch_size": 512,
        "micro_batch_size": 4,
        "max_tokens": 10**10,
    }
    sharded = {"shard": "parameters", "shard_group": 8, "use_gpu": True, "max_workers": 64}
    return RunConfig.model_validate(
        {"model": {"preset": "gpt3-1.3b"}, "train": train, "scaling": sharded | scaling}
    )


@pytest.mark.parametrize("num_workers", [15, 56, 61, 64])
def test_a_step_takes_what_the_plan_says(num_workers: int) -> None:
    for options in (H100, PlanConfig(gpu="h100", sustained_tflops=400, network_gbit_per_s=50)):
        plan = make_plan(run_of_64(), options.model_copy(update={"count": num_workers}))
        times = StepTimes(run_of_64(), options)
        assert times.seconds(num_workers) == pytest.approx(plan["exchange"]["step_s"], rel=1e-3)


def test_counts_to_run__are_whole_groups_where_these_are_as_fast() -> None:
    config = run_of_64()
    times = StepTimes(config, H100)
    counts = counts_to_run(config, times)
    assert {counts[possible] for possible in range(57, 64)} == {56}
    assert times.seconds(61) > 1.6 * times.seconds(56)
    assert 15 not in counts, "eight of 15 would take almost twice as long"
    for possible in range(1, 65):
        to_run = counts.get(possible, possible)
        whole = possible - possible % 8
        assert to_run in (possible, whole)
        assert times.seconds(to_run) <= times.seconds(possible)
        assert to_run == possible or times.seconds(to_run) <= times.seconds(whole)


def test_counts_to_run__keep_groups_as_small_as_asked_where_nobody_knows_the_hardware() -> None:
    config = run_of_64(use_gpu=False, max_workers=7, shard_group=2)
    assert counts_to_run(config, None) == {3: 2, 5: 4, 7: 6}


@pytest.mark.parametrize(
    "scaling",
    [
        {"min_workers": 64},
        {"min_workers": 63, "max_workers": 63},  # not elastic
        {"min_workers": 57, "max_workers": 63},  # no whole groups are enough
        {"shard_group": None},
        {"shard": "none", "shard_group": None},
        {"shard_group": 1},
    ],
)
def test_counts_to_run__are_all_where_there_is_no_choice(scaling: dict[str, Any]) -> None:
    config = run_of_64(**scaling)
    assert counts_to_run(config, StepTimes(config, H100)) == counts_to_run(config, None) == {}


@pytest.mark.parametrize(
    ("num_workers", "scaling", "text"),
    [
        (64, {}, None),
        (4, {}, None),  # one group of all, no larger than asked for
        (
            63,
            {},
            r"groups of 9, .* \(0.566 s a step\). An elastic run uses 56 .* \(0.565 s a step\) and keeps 7 spare",
        ),
        (61, {}, r"groups of 61, .* \(0.908 s a step\). An elastic run uses 56"),
        (
            15,
            {},
            r"groups of 15, .* An elastic run uses them all: the 8 that are whole groups are slower \(3.01 s",
        ),
        (
            63,
            {"min_workers": 60},
            r"scaling.min_workers 60 rules out the 56 that are whole groups \(0.565 s a step\)",
        ),
        (15, {"min_workers": 8}, "An elastic run uses them all"),
        (63, {"shard_group": None}, None),
    ],
)
def test_uneven_groups(num_workers: int, scaling: dict[str, Any], text: str | None) -> None:
    config = run_of_64(**scaling)
    warning = uneven_groups(config, StepTimes(config, H100), num_workers)
    plan = make_plan(config, H100.model_copy(update={"count": num_workers}))
    if text is None:
        assert warning is None
        assert not any("does not divide" in line for line in plan["warnings"])
    else:
        assert re.search(text, str(warning)), warning
        assert warning in plan["warnings"]


def test_uneven_groups__say_what_a_run_does_on_unknown_hardware() -> None:
    warning = uneven_groups(run_of_64(use_gpu=False, shard_group=2), None, 3)
    assert (
        "reach across nodes. An elastic run uses 2 in groups of 2 and keeps 1 spare. The planner does not"
        in str(warning)
    )


@pytest.mark.parametrize(
    ("nodes", "found"),
    [
        (
            [{"CPU": 96.0, "GPU": 8.0, "accelerator_type:H100": 1.0}, {"CPU": 4.0}],
            PlanConfig(gpu="h100"),
        ),
        ([{"GPU": 1.0, "accelerator_type:L4": 1.0}] * 3, PlanConfig(gpu="l4", gpus_per_node=1)),
        (
            [{"GPU": 1.0, "accelerator_type:L4": 1.0}, {"GPU": 1.0, "accelerator_type:T4": 1.0}],
            None,
        ),
        ([{"GPU": 1.0, "accelerator_type:H20": 1.0}], None),  # in no table
        ([{"GPU": 1.0}], None),
        ([{"CPU": 8.0, "accelerator_type:H100": 1.0}], None),  # a head without the GPU itself
        ([{"CPU": 8.0}], None),
        ([], None),
    ],
)
def test_hardware_of(nodes: list[dict[str, float]], found: PlanConfig | None) -> None:
    assert hardware_of(nodes) == found


def test_the_least_number_of_workers__may_be_whole_groups() -> None:
    counts = counts_to_run(run_of_64(min_workers=56), None)
    assert counts == dict.fromkeys(range(57, 64), 56)

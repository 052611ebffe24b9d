"""Chooses how many of the workers that are possible a run with `scaling.shard_group` runs; the
others are spares.

Where the group does not divide the workers, all of them form larger groups, which reach across
nodes. Often the largest multiple of `scaling.shard_group` takes a step sooner.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from cluster.settings.plan import PlanConfig
from cluster.settings.run import RunConfig, batch_schedule, seq_len
from jobs.plan.exchange import exchange
from jobs.plan.formulas import parameter_flops
from jobs.plan.memory import layout_of
from model.hardware.gpus import GPUS
from raymill.state.flat_layout import FlatLayout

_ACCELERATOR = "accelerator_type:"
"""Prefix of the resource by which Ray names a node's GPUs."""


def hardware_of(nodes: Sequence[Mapping[str, float]]) -> PlanConfig | None:
    """Returns the GPUs of a cluster from the resources of its living nodes; None where the planner
    does not know them, or where they are of several kinds."""
    kinds: set[str] = set()
    gpus_per_node = 0
    for node in nodes:
        num_gpus = int(node.get("GPU", 0))
        gpus_per_node = max(gpus_per_node, num_gpus)
        for name in node:
            if num_gpus and name.startswith(_ACCELERATOR):
                kinds.add(name.removeprefix(_ACCELERATOR).lower())
    if len(kinds) != 1 or not kinds <= GPUS.keys():
        return None
    return PlanConfig(gpu=kinds.pop(), gpus_per_node=gpus_per_node)


@dataclass(frozen=True)
class StepTimes:
    """The planner's formula for a step of a run on known hardware, by the number of workers."""

    config: RunConfig
    hardware: PlanConfig

    @cached_property
    def _layout(self) -> FlatLayout:
        return layout_of(self.config)

    @cached_property
    def _lane_s(self) -> float:
        config, hardware = self.config, self.hardware
        lane_tokens = batch_schedule(config).lane_tokens
        if hardware.sustained_tflops is not None:
            flops = parameter_flops(
                config.model.num_active_parameters, lane_tokens, recompute=config.train.recompute
            )
            return flops / (hardware.sustained_tflops * 1e12)
        flops = float(config.model.flops_per_token(seq_len(config)) * lane_tokens)
        return flops / (hardware.mfu * hardware.hardware.peak_flops_per_s)

    def seconds(self, num_workers: int) -> float:
        """Returns the seconds of a step, with what computing does not hide of the exchange."""
        lanes = batch_schedule(self.config).full_lanes
        moved = exchange(
            self.config,
            self._layout,
            self.hardware,
            world_size=num_workers,
            num_lanes=lanes,
            lane_s=self._lane_s,
        )
        return moved.step_s


def counts_to_run(config: RunConfig, times: StepTimes | None) -> dict[int, int]:
    """Returns how many workers to run by the number that is possible, for those numbers of which
    some are spares."""
    scaling = config.scaling
    possible = range(scaling.min_workers, scaling.max_workers + 1)
    counts = {number: _count_to_run(config, times, number) for number in possible}
    return {number: count for number, count in counts.items() if count < number}


def _count_to_run(config: RunConfig, times: StepTimes | None, possible: int) -> int:
    """Returns the workers of whole groups where they take a step as soon as all would, and else
    all. Without times nobody can tell: then no group is larger than was asked for."""
    whole = _in_whole_groups(config, possible)
    if whole == possible or whole < config.scaling.min_workers:
        return possible
    if times is not None and times.seconds(possible) < times.seconds(whole):
        return possible
    return whole


def _in_whole_groups(config: RunConfig, num_workers: int) -> int:
    return num_workers - num_workers % (config.scaling.shard_group or 1)


def uneven_groups(config: RunConfig, times: StepTimes | None, num_workers: int) -> str | None:
    """Returns a warning where `scaling.shard_group` does not divide so many workers: what that
    costs, and how many of them an elastic run uses."""
    scaling = config.scaling
    asked, size = scaling.shard_group, scaling.group_size(num_workers)
    if asked is None or size <= asked:
        return None
    whole = _in_whole_groups(config, num_workers)
    to_run = _count_to_run(config, times, num_workers)
    all_take, whole_take = _takes(times, num_workers), _takes(times, whole)
    text = (
        f"scaling.shard_group {asked:,} does not divide {num_workers:,} workers: all of them would form groups of "
        f"{size:,}, which may reach across nodes{all_take}."
    )
    if to_run == whole:
        text += f" An elastic run uses {whole:,} in groups of {asked:,}{whole_take}"
        text += f" and keeps {num_workers - whole:,} spare."
        if times is None:
            text += (
                " The planner does not know this hardware, so no group is larger than asked for."
            )
        return text
    if whole < scaling.min_workers:
        least = f"scaling.min_workers {scaling.min_workers:,}"
        return f"{text} {least} rules out the {whole:,} that are whole groups{whole_take}."
    return f"{text} An elastic run uses them all: the {whole:,} that are whole groups are slower{whole_take}."


def _takes(times: StepTimes | None, num_workers: int) -> str:
    return f" ({times.seconds(num_workers):,.3g} s a step)" if times else ""

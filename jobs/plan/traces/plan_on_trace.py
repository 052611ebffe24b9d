"""Plans a run on spot nodes that come and go as in a trace: time, goodput, money."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from cluster.settings.plan import PlanConfig, TraceConfig
from cluster.settings.run import (
    RunConfig,
    adapted,
    batch_schedule,
    planned_vocabulary,
    with_precision,
)
from jobs.plan.cpu_plan import asks_for_gpus, planned_here
from jobs.plan.plan_warnings import of_the_budget
from jobs.plan.prices import worker_price
from jobs.plan.spot_trace import SpotTrace, read_trace
from jobs.plan.table import Figures, sections, template, warned
from jobs.plan.traces.simulation import Recovery, Simulated, StepSeconds, merged, simulate
from jobs.plan.worker_counts import StepTimes, counts_to_run
from raymill.errors import UserError

_COLUMNS = 72
_BARS = " ▁▂▃▄▅▆▇█"


def planned_on(
    config: RunConfig, options: PlanConfig, asked: TraceConfig, *, measures: bool
) -> dict[str, Any]:
    """Returns figures by name, in seconds and dollars unless the name says otherwise, with their
    `table`. Raises `UserError` where the trace cannot be read or nothing tells a step's time."""
    assert asked.trace is not None, "a trace is asked for"
    trace = read_trace(asked.trace)
    step_s, timed = _step_seconds(config, options, asked, measures=measures)
    scaling, schedule = config.scaling, batch_schedule(config)
    result = simulate(
        usable_workers(config, trace, workers_per_node=asked.workers_per_node),
        step_s,
        Recovery(asked.see_s, asked.detect_s, asked.meet_s, asked.load_s, asked.has_notices),
        num_steps=schedule.max_steps,
        save_every_steps=config.checkpoint.save_every_steps,
    )
    price, priced = worker_price(config, options, is_gpu=asks_for_gpus(config, options))
    held_s = held_worker_s(config, trace, asked.workers_per_node, until_s=result.wall_s)
    undisturbed_s = schedule.max_steps * step_s(scaling.max_workers)
    undisturbed_cost = undisturbed_s * scaling.max_workers / 3600 * price
    plan = asdict(result) | {
        "trace_s": trace.duration,
        "least": min(nodes for _, nodes in trace.changes),
        "most": trace.max_nodes,
        "mean": trace.mean_nodes,
        "num_changes": len(trace.changes) - 1,
        "planned_steps": schedule.max_steps,
        "step_s": step_s(scaling.max_workers),
        "timed": timed,
        "max_workers": scaling.max_workers,
        "goodput": result.steps_worker_s / held_s if held_s else 0.0,
        "wall_goodput": result.steps_s / result.wall_s,
        "worker_hours": held_s / 3600,
        "worker_price": price,
        "priced": priced or "assumed",
        "cost": held_s / 3600 * price,
        "undisturbed_s": undisturbed_s,
        "undisturbed_cost": undisturbed_cost,
    }
    plan["warnings"] = [*of_the_budget(config, plan["cost"])]
    return plan | {"table": sections(warned(plan), _table(plan, result))}


def usable_workers(
    config: RunConfig, trace: SpotTrace, *, workers_per_node: int
) -> Iterator[tuple[float, float, int]]:
    """Yields (start, end, workers that train) of each interval; 0 where they are too few."""
    scaling, counts = config.scaling, counts_to_run(config, None)
    for start, end, nodes in trace.intervals():
        possible = min(nodes * workers_per_node, scaling.max_workers)
        is_enough = possible >= scaling.min_workers
        yield start, end, counts.get(possible, possible) if is_enough else 0


def held_worker_s(
    config: RunConfig, trace: SpotTrace, workers_per_node: int, *, until_s: float
) -> float:
    """Returns the seconds of all workers' devices that are held until then, also while they wait
    for others; nodes beyond scaling.max_workers are not hired."""
    held_s = 0.0
    for start, end, nodes in trace.intervals():
        held = min(nodes * workers_per_node, config.scaling.max_workers)
        held_s += held * max(0.0, min(end, until_s) - start)
    return held_s


def _step_seconds(
    config: RunConfig, options: PlanConfig, asked: TraceConfig, *, measures: bool
) -> tuple[StepSeconds, str]:
    """Returns the time of a step by the number of workers, and where it is from."""
    if asked.step_seconds is not None:
        return _by_lanes(config, asked.step_seconds), "--step-seconds"
    if asks_for_gpus(config, options):
        planned = planned_vocabulary(config)
        planned = planned.model_copy(update={"model": adapted(planned.model, planned.train)})
        planned = with_precision(planned, options.hardware.fast_numerics.name)
        return StepTimes(planned, options).seconds, f"planned for {options.gpu}"
    figures = planned_here(config, measures=measures, is_whole=False)
    if figures["step_s"] is None:
        raise UserError(f"a step's time is not known: {figures['timed']}; --step-seconds says it")
    return _by_lanes(config, figures["step_s"]), f"by {figures['timed']}"


def _by_lanes(config: RunConfig, step_s: float) -> StepSeconds:
    """Returns the time by the lanes of the worker that has most of them, given that of all
    workers."""
    lanes = batch_schedule(config).full_lanes
    most = math.ceil(lanes / config.scaling.max_workers)
    return lambda num_workers: step_s * math.ceil(lanes / num_workers) / most


def _table(plan: dict[str, Any], result: Simulated) -> str:
    wall_s = result.wall_s
    parts: dict[str, Any] = {}
    for name in ("steps", "lost", "recovery", "waiting"):
        seconds = plan[f"{name}_s"]
        parts |= {f"{name}_time": seconds, f"{name}_share": seconds / wall_s}
    end = (
        "done after {wall_s:time}"
        if result.is_done
        else "NOT DONE when the trace ends, after {wall_s:time}; what follows is of that time"
    )
    return Figures().format(
        template("trace.txt"),
        drawn=drawn(result.timeline, most=plan["max_workers"]),
        end=Figures().format(end, wall_s=wall_s),
        undisturbed_time=plan["undisturbed_s"],
        **parts,
        **plan,
    )


def drawn(timeline: list[tuple[float, float, int]], *, most: int) -> str:
    """Returns the workers over the time as a row of bars, each as high as the mean of its part."""
    column_s = timeline[-1][1] / _COLUMNS
    sums = [0.0] * _COLUMNS
    for start, end, workers in merged(iter(timeline)):
        for column in range(int(start / column_s), min(_COLUMNS, math.ceil(end / column_s))):
            left, right = column * column_s, (column + 1) * column_s
            sums[column] += workers * max(0.0, min(end, right) - max(start, left))
    heights = [round(total / column_s / most * (len(_BARS) - 1)) for total in sums]
    return "".join(_BARS[height] for height in heights)

"""Plans a run before a GPU is hired: operations, days, cost, memory, checkpoints, exchange and data
rates.

It imports neither PyTorch nor Ray, so that `raymill plan` answers at once.
"""

import math
from dataclasses import asdict
from typing import Any

from cluster.settings.plan import PlanConfig
from cluster.settings.run import (
    RunConfig,
    adapted,
    batch_schedule,
    planned_vocabulary,
    seq_len,
    state_scaling,
    warmup_tokens,
    with_precision,
)
from cluster.settings.train import TrainConfig
from jobs.exact.audits.audit import cost_of_audits, steps_between
from jobs.exact.run_values import run_sharding
from jobs.plan.exchange import Exchange, exchange
from jobs.plan.formulas import (
    DAY_S,
    TEXT_BYTES_PER_TOKEN,
    checkpoint_interval_s,
    goodput,
    gpu_days,
    mean_time_between_failures_s,
    parameter_flops,
    storing_s,
)
from jobs.plan.memory import gpu_memory, host_memory, layout_of
from jobs.plan.plan_warnings import FULL_MEMORY, TOLERATED_EXPOSURE, warnings
from jobs.plan.prices import worker_price
from jobs.plan.table import sections, table, warned, what_matters
from jobs.plan.update import stored_bytes, update_flops
from jobs.tokens.token_store import token_dtype
from raymill.state.flat_layout import FlatLayout
from raymill.sums.step_plan import StepPlan


def make_plan(config: RunConfig, options: PlanConfig) -> dict[str, Any]:
    """Returns figures by name, in FLOPs, seconds, bytes and dollars unless the name says
    otherwise."""
    count = options.count or config.scaling.max_workers
    config = config.model_copy(update={"model": adapted(config.model, config.train)})
    config = with_precision(config, options.hardware.fast_numerics.name)
    layout = layout_of(config)
    plan = _computing(config, options, count)
    step_s = plan["step_s"]
    plan["memory_bytes"] = _memory(config, layout, count)
    plan["gpu_memory_bytes"] = options.hardware.memory_bytes
    plan["advice"] = _advice(config, options, layout, count, step_s)
    plan["host_memory_bytes"] = host_memory(
        config, layout, world_size=count, gpus_per_node=options.gpus_per_node
    )
    moved = _exchange(config, options, layout, count, step_s)
    plan["exchange"] = asdict(moved) | {
        "messages_s": moved.traffic.messages_s,
        "step_s": moved.step_s,
        "days": moved.step_s * plan["steps"] / DAY_S,
        "advice": _faster(config, options, layout, count, step_s),
    }
    plan["checkpoint"] = _checkpoint(config, options, count, step_s)
    plan["audits"] = _audits(config, count)
    plan["data"] = _data(config, plan["tokens_per_s"])
    plan["warnings"] = warnings(config, options, plan)
    return plan


def work(config: RunConfig) -> dict[str, Any]:
    """Returns the shape of the model, and the operations of the run."""
    schedule = batch_schedule(config)
    num_tokens = config.train.max_tokens
    size = config.model.num_parameters
    active = config.model.num_active_parameters
    # Two counts of the same work. A sustained rate goes with 6 N D, as in papers; an MFU is a share
    # of the model's own operations, attention's scores among them, as in the ledger.
    total_flops = parameter_flops(active, num_tokens)
    model_flops = float(config.model.flops_per_token(seq_len(config)) * num_tokens)
    return {
        "n_layer": config.model.n_layer,
        "n_head": config.model.n_head,
        "n_embd": config.model.n_embd,
        "seq_len": seq_len(config),
        "parameters": size,
        "active_parameters": active,
        "tokens": num_tokens,
        "tokens_per_parameter": num_tokens / size,
        "step_tokens": schedule.step_tokens(schedule.max_steps),
        "steps": schedule.max_steps,
        "precision": config.train.precision,
        "total_flops": total_flops,
        "model_flops": model_flops,
        "optimizer": config.train.optimizer,
        "learning_rate": config.train.learning_rate,
        "warmup_tokens": warmup_tokens(config),
        "update_flops": update_flops(config),
        "update_share": update_flops(config) * schedule.max_steps / model_flops,
        "petaflop_s_days": gpu_days(total_flops, 1e15),
    }


def _computing(config: RunConfig, options: PlanConfig, count: int) -> dict[str, Any]:
    """Returns the operations of the run, and what they take of so many GPUs that compute all the
    time."""
    gpu = options.hardware
    plan = work(config)
    num_tokens, steps = plan["tokens"], plan["steps"]
    active, model_flops = plan["active_parameters"], plan["model_flops"]
    if options.sustained_tflops is not None:
        rate = options.sustained_tflops * 1e12
        days = gpu_days(parameter_flops(active, num_tokens, recompute=config.train.recompute), rate)
    else:
        rate = options.mfu * gpu.peak_flops_per_s
        days = gpu_days(model_flops, rate)
    price, priced = worker_price(config, options, is_gpu=True)
    run_s = days / count * DAY_S
    return plan | {
        "gpu": options.gpu,
        "count": count,
        "flops_per_s_per_gpu": rate,
        "mfu": model_flops / (days * DAY_S * gpu.peak_flops_per_s),
        "gpu_days": days,
        "days": days / count,
        "price_per_gpu_hour": price,
        "priced": priced,
        "cost": days * 24 * price,
        "step_s": run_s / steps,
        "tokens_per_s": num_tokens / run_s,
    }


def _audits(config: RunConfig, count: int) -> dict[str, Any]:
    """Returns how often so many GPUs check one another, what that costs of a step's time, and in
    how many steps a GPU is found that is wrong in one lane of a hundred."""
    sharding = run_sharding(state_scaling(config), rank=0, world_size=count)
    lanes = batch_schedule(config).full_lanes
    every_steps = config.train.audit_every_steps
    if not config.train.exact or every_steps == 0 or sharding.num_groups > lanes:
        return {"every_steps": 0, "cost": 0.0, "found_after_steps": 0}
    full_step = StepPlan(sharding, lanes, config.train.micro_batches_per_lane)
    every_steps = every_steps or steps_between(full_step)
    return {
        "every_steps": every_steps,
        "cost": cost_of_audits(full_step, every_steps),
        "found_after_steps": 100 * every_steps,
    }


def data_sizes(config: RunConfig) -> dict[str, float]:
    """Returns the bytes of the tokens that a run trains on, and of their text."""
    num_tokens = config.train.max_tokens
    return {
        "store_bytes": token_dtype(config.model.vocab_size).itemsize * num_tokens,
        "text_bytes": TEXT_BYTES_PER_TOKEN * num_tokens,
    }


def _data(config: RunConfig, tokens_per_s: float) -> dict[str, float]:
    id_bytes = token_dtype(config.model.vocab_size).itemsize
    return data_sizes(config) | {
        "read_bytes_per_s": id_bytes * tokens_per_s,
        "text_bytes_per_s": TEXT_BYTES_PER_TOKEN * tokens_per_s,
    }


_LEAST = {"recompute": True, "micro_batch_size": 1, "micro_batches_per_lane": 1}
"""Settings with which a lane takes least memory."""


def _advice(
    config: RunConfig, options: PlanConfig, layout: FlatLayout, count: int, step_s: float
) -> dict[str, Any] | None:
    """Returns what to set so that the run fits its GPUs, with the memory that it then takes: the
    sharding that leaves least of the exchange exposed, if need be with `_LEAST`. None where it fits
    as set, or never."""
    if _fits(_memory(config, layout, count), options):
        return None
    ways_to_shard = _ways_to_shard(options, count)
    for train in ({}, {"recompute": True}, _LEAST):
        changed = _different(train, config.train)
        least_exposed_s = math.inf
        advice = None
        for scaling in ways_to_shard:
            way = _changed(config, train=train, scaling=scaling)
            memory = _memory(way, layout, count)
            if not _fits(memory, options):
                continue
            exposed_s = _exchange(way, options, layout, count, step_s).exposed_s
            if exposed_s < least_exposed_s:
                least_exposed_s = exposed_s
                advice = {"scaling": scaling, "train": changed, "memory_bytes": memory}
        if advice is not None:
            return advice
    return None


def _different(changes: dict[str, Any], settings: TrainConfig) -> dict[str, Any]:
    return {name: value for name, value in changes.items() if value != getattr(settings, name)}


def _ways_to_shard(options: PlanConfig, count: int) -> list[dict[str, Any]]:
    """Returns the settings by which so many GPUs can divide the state, in groups that fill nodes or
    parts of one."""
    near = options.gpus_per_node
    sizes = [
        n
        for n in range(2, count + 1)
        if count % n == 0 and (n == count or n % near == 0 or near % n == 0)
    ]
    ways: list[dict[str, Any]] = [{"shard": "optimizer", "shard_group": None}]
    for shard in ("gradients", "parameters"):
        ways += [{"shard": shard, "shard_group": size} for size in sizes]
    return ways


def _faster(
    config: RunConfig, options: PlanConfig, layout: FlatLayout, count: int, step_s: float
) -> dict[str, Any] | None:
    """Returns the sharding that fits and leaves least of the exchange exposed, with the seconds of
    its step, where the exchange now adds more than `TOLERATED_EXPOSURE` to computing; None where it
    does not, or where nothing helps."""
    moved = _exchange(config, options, layout, count, step_s)
    if moved.exposed_s <= TOLERATED_EXPOSURE * moved.compute_s:
        return None
    fastest, least_s = None, moved.step_s
    for scaling in _ways_to_shard(options, count):
        way = _changed(config, train={}, scaling=scaling)
        if _fits(_memory(way, layout, count), options):
            way_s = _exchange(way, options, layout, count, step_s).step_s
            if way_s < least_s:
                fastest, least_s = {"scaling": scaling, "step_s": way_s}, way_s
    return fastest


def _changed(config: RunConfig, *, train: dict[str, Any], scaling: dict[str, Any]) -> RunConfig:
    branches = {
        "train": config.train.model_copy(update=train),
        "scaling": config.scaling.model_copy(update=scaling),
    }
    return config.model_copy(update=branches)


def _fits(memory: dict[str, float], options: PlanConfig) -> bool:
    return memory["total"] <= FULL_MEMORY * options.hardware.memory_bytes


def _memory(config: RunConfig, layout: FlatLayout, count: int) -> dict[str, float]:
    on_gpus = config.model_copy(
        update={"scaling": config.scaling.model_copy(update={"use_gpu": True})}
    )
    parts = gpu_memory(on_gpus, layout, world_size=count)
    return parts | {"total": sum(parts.values())}


def _exchange(
    config: RunConfig, options: PlanConfig, layout: FlatLayout, count: int, step_s: float
) -> Exchange:
    """Returns the exchange of a step that takes so long if all GPUs compute all the time."""
    lanes = batch_schedule(config).full_lanes
    return exchange(
        config, layout, options, world_size=count, num_lanes=lanes, lane_s=step_s * count / lanes
    )


def _checkpoint(
    config: RunConfig, options: PlanConfig, count: int, step_s: float
) -> dict[str, float]:
    num_bytes = stored_bytes(config)
    writers = run_sharding(state_scaling(config), rank=0, world_size=count).num_holders
    cost_s = num_bytes / writers / options.hardware.host_bytes_per_s
    mtbf_s = mean_time_between_failures_s(options.mtbf_gpu_hours, count)
    store_s = storing_s(num_bytes, options, writers=writers)
    interval_s = max(checkpoint_interval_s(cost_s, mtbf_s), store_s, step_s)
    return {
        "bytes": num_bytes,
        "kept_bytes": num_bytes * config.checkpoint.num_to_keep,
        "copy_s": cost_s,
        "store_s": store_s,
        "mtbf_s": mtbf_s,
        "interval_s": interval_s,
        "interval_steps": max(1, round(interval_s / step_s)),
        "goodput": goodput(
            interval_s=interval_s, cost_s=cost_s, restart_s=options.restart_s, mtbf_s=mtbf_s
        ),
    }


def planned(config: RunConfig, options: PlanConfig, *, is_whole: bool) -> dict[str, Any]:
    """Returns the plan with its `table`: three lines and the warnings, or all of it."""
    plan = make_plan(planned_vocabulary(config), options)
    rest = table(plan, options) if is_whole else warned(plan)
    return plan | {"table": sections(what_matters(plan), rest)}

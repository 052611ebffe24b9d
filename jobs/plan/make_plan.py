"""Plans a run before a GPU is hired: operations, days, cost, memory, checkpoints, exchange and data rates.

It imports neither PyTorch nor Ray, so that `raymill plan` answers at once.
"""

from typing import Any

from cluster.settings.plan import PlanConfig
from cluster.settings.run import RunConfig, batch_schedule, planned_vocabulary, seq_len, with_precision
from cluster.storage.uris import open_storage
from jobs.exact.flat_layout import FlatLayout
from jobs.plan.formulas import (
    STATE_BYTES,
    TEXT_BYTES_PER_TOKEN,
    checkpoint_interval_s,
    exchange,
    goodput,
    gpu_days,
    mean_time_between_failures_s,
    parameter_flops,
)
from jobs.plan.memory import gpu_memory, host_memory, layout_of
from jobs.plan.plan_warnings import FULL_MEMORY, other_work, warnings
from jobs.plan.prediction import predict
from jobs.plan.scale_simulation import scale_table, simulate
from jobs.plan.table import table
from jobs.run.history import recorded_config
from jobs.run.ledger import Ledger
from jobs.tokens.token_store import token_dtype
from model.config import PRESETS, GPTConfig, flops_per_token, num_parameters


def make_plan(config: RunConfig, options: PlanConfig) -> dict[str, Any]:
    """Returns figures by name, in FLOPs, seconds, bytes and dollars unless the name says otherwise."""
    count, gpu = options.count or config.scaling.max_workers, options.hardware
    config = with_precision(config, gpu.fast_precision)
    schedule, num_tokens, size = batch_schedule(config), config.train.max_tokens, num_parameters(config.model)
    layout = layout_of(config.model)

    # Two counts of the same work. A sustained rate goes with 6 N D, as in papers; an MFU is a share of the model's own
    # operations, attention's scores among them, as in the ledger.
    total_flops = parameter_flops(size, num_tokens)
    model_flops = float(flops_per_token(config.model, seq_len(config)) * num_tokens)
    if options.sustained_tflops is not None:
        rate = options.sustained_tflops * 1e12
        days = gpu_days(parameter_flops(size, num_tokens, recompute=config.train.recompute), rate)
    else:
        rate = options.mfu * gpu.peak_flops_per_s
        days = gpu_days(model_flops, rate)
    price = gpu.price_per_hour if options.price is None else options.price
    step_s = days / count * 86_400 / schedule.max_steps

    plan: dict[str, Any] = {
        "parameters": size,
        "tokens": num_tokens,
        "tokens_per_parameter": num_tokens / size,
        "step_tokens": schedule.step_tokens(schedule.max_steps),
        "steps": schedule.max_steps,
        "precision": config.train.precision,
        "total_flops": total_flops,
        "model_flops": model_flops,
        "petaflop_s_days": gpu_days(total_flops, 1e15),
        "gpu": options.gpu,
        "count": count,
        "flops_per_s_per_gpu": rate,
        "mfu": model_flops / (days * 86_400 * gpu.peak_flops_per_s),
        "gpu_days": days,
        "days": days / count,
        "price_per_gpu_hour": price,
        "cost": days * 24 * price,
        "step_s": step_s,
        "tokens_per_s": num_tokens / (days / count * 86_400),
    }
    plan["memory_bytes"] = _memory(config, layout, count, is_sharded=config.scaling.shard != "none")
    plan["memory_bytes_sharded"] = _memory(config, layout, count, is_sharded=True)
    plan["gpu_memory_bytes"] = gpu.memory_bytes
    plan["largest_preset"] = largest_preset(config, options)
    plan["host_memory_bytes"] = host_memory(
        config,
        layout,
        world_size=count,
        gpus_per_node=options.gpus_per_node,
        shard_optimizer=config.scaling.shard != "none",
    )
    plan["exchange"] = _exchange(config, options, layout, count)
    plan["checkpoint"] = _checkpoint(config, options, size, count, step_s)
    plan["data"] = _data(config, plan["tokens_per_s"])
    plan["warnings"] = warnings(config, options, plan)
    return plan


def largest_preset(config: RunConfig, options: PlanConfig) -> str | None:
    """Returns the preset of most parameters that fits one GPU in bf16, a sequence at a time."""
    least = {"precision": "bf16", "seq_len": None, "micro_batch_size": 1, "global_batch_size": 1}
    least |= {"micro_batches_per_lane": 1}
    config = config.model_copy(update={"train": config.train.model_copy(update=least)})
    fitting = {}
    for name, shape in PRESETS.items():
        model = GPTConfig(**shape)
        total = _memory(config.model_copy(update={"model": model}), layout_of(model), 1)["total"]
        if total <= FULL_MEMORY * options.hardware.memory_bytes:
            fitting[num_parameters(model)] = name
    return fitting[max(fitting)] if fitting else None


def _memory(config: RunConfig, layout: FlatLayout, count: int, *, is_sharded: bool = False) -> dict[str, float]:
    on_gpus = config.model_copy(update={"scaling": config.scaling.model_copy(update={"use_gpu": True})})
    parts = gpu_memory(on_gpus, layout, world_size=count, shard_optimizer=is_sharded)
    return parts | {"total": sum(parts.values())}


def _exchange(config: RunConfig, options: PlanConfig, layout: FlatLayout, count: int) -> dict[str, float]:
    schedule = batch_schedule(config)
    found = exchange(layout, options, world_size=count, num_lanes=schedule.num_lanes(schedule.max_steps))
    return {
        "bytes_per_step": found.num_bytes,
        "messages_per_step": found.num_messages,
        "seconds_per_step": found.seconds,
    }


def _checkpoint(config: RunConfig, options: PlanConfig, size: int, count: int, step_s: float) -> dict[str, float]:
    num_bytes = STATE_BYTES * size
    cost_s = num_bytes / options.hardware.host_bytes_per_s
    mtbf_s = mean_time_between_failures_s(options.mtbf_gpu_hours, count)
    store_s = num_bytes / options.storage_bytes_per_s
    interval_s = max(checkpoint_interval_s(cost_s, mtbf_s), store_s, step_s)
    return {
        "bytes": num_bytes,
        "kept_bytes": num_bytes * config.checkpoint.num_to_keep,
        "copy_s": cost_s,
        "store_s": store_s,
        "mtbf_s": mtbf_s,
        "interval_s": interval_s,
        "interval_steps": max(1, round(interval_s / step_s)),
        "goodput": goodput(interval_s=interval_s, cost_s=cost_s, restart_s=options.restart_s, mtbf_s=mtbf_s),
    }


def _data(config: RunConfig, tokens_per_s: float) -> dict[str, float]:
    id_bytes = token_dtype(config.model.vocab_size).itemsize
    return {
        "read_bytes_per_s": id_bytes * tokens_per_s,
        "store_bytes": id_bytes * config.train.max_tokens,
        "text_bytes": TEXT_BYTES_PER_TOKEN * config.train.max_tokens,
        "text_bytes_per_s": TEXT_BYTES_PER_TOKEN * tokens_per_s,
    }


def simulated(config: RunConfig, options: PlanConfig) -> dict[str, Any]:
    """Simulates the run at 8 to 4,096 GPUs, and returns the figures with their `table`."""
    found = simulate(planned_vocabulary(config), options)
    return found | {"table": scale_table(found)}


def planned(config: RunConfig, options: PlanConfig, *, rehearsal: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the plan with its `table`; given a rehearsal's figures, also with the prediction that they allow."""
    plan = make_plan(planned_vocabulary(config), options)
    if rehearsal is not None:
        run = open_storage(rehearsal["run_dir"])
        found = predict(rehearsal, Ledger.read(run), rehearsed=recorded_config(run), planned=config)
        plan["calibration"] = found
        plan["warnings"] = [*other_work(found), *plan["warnings"]]
    return plan | {"table": table(plan, options)}

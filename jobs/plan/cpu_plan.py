"""Plans a run on the processors of this machine: how long it takes, its memory and its disk."""

import math
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from cluster.output.progress import reports_shown, say
from cluster.settings.plan import PlanConfig
from cluster.settings.run import (
    RunConfig,
    adapted,
    batch_schedule,
    planned_vocabulary,
    with_precision,
)
from cluster.storage.uris import open_storage
from jobs.plan.formulas import DAY_S
from jobs.plan.make_plan import data_sizes, work
from jobs.plan.memory import PROCESS_BYTES, gpu_memory, host_memory, layout_of
from jobs.plan.pace import NUM_STEPS, Pace, recorded_pace
from jobs.plan.plan_warnings import of_the_budget, of_the_schedule
from jobs.plan.prices import worker_price
from jobs.plan.table import (
    Figures,
    about,
    few_lines,
    listed,
    sections,
    size,
    template,
    warned,
    work_in_words,
)
from jobs.plan.update import stored_bytes
from jobs.run.costs.budget import in_money
from model.hardware.processor import fast_precision

_LONG_S = 7 * DAY_S
_rough = partial(size, digits=3)
_SHARED = 0.8  # of a processor: with less, others have the rest


def asks_for_gpus(config: RunConfig, options: PlanConfig) -> bool:
    """Reports whether a plan is for GPUs: the run is set to use them, or an option speaks of
    them."""
    return config.scaling.use_gpu or bool(options.model_fields_set)


def planned_here(config: RunConfig, *, measures: bool, is_whole: bool) -> dict[str, Any]:
    """Returns figures by name, in FLOPs, seconds and bytes unless the name says otherwise, with
    their `table`: three lines, or all of it. What no run of the storage tells of the time is
    measured, if that may be."""
    config = with_precision(_with_model(config), fast_precision("cpu"))
    plan = work(config) | {
        "workers": config.scaling.max_workers,
        "threads_per_worker": config.scaling.threads_per_worker,
        "processors": num_processors(),
    }
    plan |= _memory(config) | _disk(config)
    pace, why_unknown = _pace(config, measures=measures)
    step_s = pace.step_s if pace else None
    plan |= {
        "step_s": step_s,
        "tokens_per_s": plan["step_tokens"] / step_s if step_s else None,
        "days": plan["steps"] * step_s / DAY_S if step_s else None,
        "timed": pace.timed if pace else why_unknown,
        "processor": pace.processor if pace else None,
    }
    price, priced = worker_price(config, PlanConfig(), is_gpu=False)
    if priced and step_s:
        hours = plan["days"] * DAY_S / 3600 * config.scaling.max_workers
        plan |= {"cost": hours * price, "price_per_worker_hour": price}
    plan["warnings"] = [*_warnings(config, plan)]
    rest = _rest(plan) if is_whole else ""
    return plan | {"table": sections(few_lines(_lines(config, plan)), warned(plan), rest)}


def num_processors() -> int:
    """Returns how many processors this process may use."""
    return len(os.sched_getaffinity(0))


def _with_model(config: RunConfig) -> RunConfig:
    """Returns the run with its vocabulary and its adapter; says which vocabulary that is where no
    corpus is named yet."""
    config = planned_vocabulary(config)
    if not config.data.source and config.data.tokenizer is None:
        model = config.model
        if not model.by_transformers:
            model = model.with_vocabulary(config.data.vocab_size)
            config = config.model_copy(update={"model": model})
            ids = f"{model.vocab_size:,} ids that its tokenizer will have (data.vocab_size)"
        else:
            ids = f"model's {model.vocab_size:,} ids"
        say(f"no corpus is named (data.source): this counts with the {ids}")
    return config.model_copy(update={"model": adapted(config.model, config.train)})


def _memory(config: RunConfig) -> dict[str, Any]:
    """Returns the bytes of each worker by part, of what the node keeps besides, of all, and those
    of this machine."""
    workers = config.scaling.max_workers
    layout = layout_of(config)
    parts = gpu_memory(config, layout, world_size=workers) | {"process": PROCESS_BYTES}
    parts["total"] = sum(parts.values())
    has = psutil.virtual_memory()
    kept = host_memory(config, layout, world_size=workers, gpus_per_node=workers)
    del kept["pieces"]  # of a GPU's copies
    if kept["snapshots"] > has.total / 2:
        kept["snapshots"] = 0.0  # which are not made then
    return {
        "memory_bytes": parts,
        "host_memory_bytes": kept,
        "total_memory_bytes": workers * parts["total"] + sum(kept.values()),
        "machine_memory_bytes": has.total,
        "free_memory_bytes": has.available,
    }


def _disk(config: RunConfig) -> dict[str, Any]:
    """Returns the bytes that the storage takes, and how many are free there, None where that is
    not known."""
    num_bytes = stored_bytes(config)
    num_kept = max(2, config.checkpoint.num_to_keep) + config.checkpoint.keep_best
    return {
        "checkpoint": {"bytes": num_bytes, "kept_bytes": num_bytes * (num_kept + 1)},
        "data": data_sizes(config),
        "free_disk_bytes": _free_bytes(open_storage(config.storage.uri).local_path("")),
    }


def _free_bytes(folder: Path | None) -> int | None:
    if folder is None:
        return None
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _pace(config: RunConfig, *, measures: bool) -> tuple[Pace | None, str]:
    """Returns the pace of a run like this one, or else the one that is measured; None, and why,
    where there is neither."""
    recorded = recorded_pace(config)
    if recorded is not None:
        return recorded, ""
    if not measures:
        return None, f"no run like this one is in {config.storage.uri}, and --no-measure was given"
    if config.train.lora_rank is not None:
        return None, "steps of an adapter are not measured before its run has begun"
    needed = PROCESS_BYTES + sum(gpu_memory(config, layout_of(config), world_size=1).values())
    free = psutil.virtual_memory().available
    if needed > free:
        return (
            None,
            f"nothing was measured, as that needs {_rough(needed)}, and {_rough(free)} are free",
        )
    say(f"plan: measuring up to {NUM_STEPS} lanes of a step here (--no-measure leaves it out)")

    from jobs.plan.measured_steps import measured_pace  # noqa: PLC0415 (PyTorch takes seconds)

    with reports_shown():
        return measured_pace(config), ""


def _warnings(config: RunConfig, plan: dict[str, Any]) -> Iterator[str]:
    """Yields what does not fit this machine, or each other, the gravest first."""
    needed, has = plan["total_memory_bytes"], plan["machine_memory_bytes"]
    left = plan["free_memory_bytes"]
    if needed > has:
        yield (
            f"The run does not fit this machine: it needs {_rough(needed)}, and there are {_rough(has)}. A smaller "
            "train.micro_batch_size, train.seq_len, scaling.max_workers or model.preset needs less."
        )
    elif needed > left:
        yield (
            f"The run needs {_rough(needed)} of memory, and other programs leave {_rough(left)} now."
        )
    stored, free = _stored_bytes(plan), plan["free_disk_bytes"]
    if free is not None and stored > free:
        yield f"The run needs {_rough(stored)} in {config.storage.uri}, and {_rough(free)} are free there."
    if plan["days"] is not None and plan["days"] * DAY_S > _LONG_S:
        yield (
            f"That are {plan['days']:,.0f} days on this machine. Fewer train.max_tokens or a smaller model.preset take "
            "less; `raymill plan --gpu KIND` says what GPUs take."
        )
    workers, threads = plan["workers"], plan["threads_per_worker"]
    if workers * threads > plan["processors"]:
        yield (
            f"{workers} workers of {threads} threads want {workers * threads} processors, and this machine has "
            f"{plan['processors']}: they take turns (scaling.max_workers, scaling.threads_per_worker)."
        )
    lanes = batch_schedule(config).full_lanes
    most = math.ceil(lanes / workers)
    if lanes % workers:
        yield (
            f"{lanes} lanes do not divide among {workers} workers: some compute {most} a step, others "
            f"{lanes // workers} and wait."
        )
    if config.cluster.address is not None:
        yield f"The run trains at {config.cluster.address}: the figures are those of this machine."
    yield from of_the_budget(config, plan.get("cost", 0.0))
    yield from of_the_schedule(config)


def _stored_bytes(plan: dict[str, Any]) -> float:
    return float(plan["checkpoint"]["kept_bytes"] + plan["data"]["store_bytes"])


def _lines(config: RunConfig, plan: dict[str, Any]) -> dict[str, str]:
    """Returns what matters most, in words: time, memory and disk."""
    workers, free = plan["workers"], plan["free_disk_bytes"]
    worker = _rough(plan["memory_bytes"]["total"])
    each = f"{worker} for " + ("one worker" if workers == 1 else f"each of {workers} workers")
    has, left = _rough(plan["machine_memory_bytes"]), _rough(plan["free_memory_bytes"])
    checkpoint, tokens = _rough(plan["checkpoint"]["bytes"]), _rough(plan["data"]["store_bytes"])
    left_there = "" if free is None else f"; {_rough(free)} are free there"
    price = plan.get("price_per_worker_hour")
    costs = (
        {"cost": f"about ${in_money(plan['cost'])} at ${price:g} for a worker's hour"}
        if price
        else {}
    )
    return {
        "time": _time_in_words(plan),
        "memory": (
            f"about {_rough(plan['total_memory_bytes'])}, of them {each}; this machine has {has}, {left} of it free"
        ),
        "disk": (
            f"about {_rough(_stored_bytes(plan))} in {config.storage.uri}: a checkpoint is {checkpoint}, the tokens "
            f"are {tokens}{left_there}"
        ),
        **costs,
    }


def _time_in_words(plan: dict[str, Any]) -> str:
    steps = f"{plan['steps']:,} steps of {plan['step_tokens']:,} tokens"
    if plan["days"] is None:
        return f"not known for {steps}: {plan['timed']}"
    run_s = plan["days"] * DAY_S
    words = f"about {about(run_s)} for {steps}, {plan['tokens_per_s']:,.0f} tokens/s, by {plan['timed']}"
    if plan["processor"] < _SHARED:
        alone = about(run_s * plan["processor"])
        words += f". Other programs left it {plan['processor']:.0%} of a processor: without them it is about {alone}"
    return words


def _rest(plan: dict[str, Any]) -> str:
    figures = Figures().format(
        template("cpu_plan.txt"),
        step=plan["timed"] if plan["step_s"] is None else f"{plan['step_s']:,.3g} s",
        run=_time_in_words(plan),
        worker_memory=listed(plan["memory_bytes"]),
        node_memory=listed(plan["host_memory_bytes"]),
        **plan,
    )
    return sections(work_in_words(plan), figures)

"""Warns where the inputs of a plan disagree with each other, or with what raymill can do: a
sentence each."""

from collections.abc import Iterator, Mapping
from typing import Any

from cluster.settings.plan import PlanConfig
from cluster.settings.run import RunConfig, batch_schedule, seq_len, warmup_tokens
from jobs.plan.worker_counts import StepTimes, uneven_groups

FULL_MEMORY = 0.9
"""Share of a GPU's memory that a plan may fill: allocator and libraries take the rest."""

TOLERATED_EXPOSURE = 0.2
"""Seconds of exchange that nothing hides, for each second of computing, from which on a plan
warns."""


def warnings(config: RunConfig, options: PlanConfig, plan: dict[str, Any]) -> list[str]:
    """Returns the warnings, the gravest first; none where all agrees."""
    return [
        *_memory(options, plan),
        *_on_gpus(config, options, plan),
        *of_the_budget(config, plan["cost"]),
        *_sharding(config, options, plan),
        *of_the_schedule(config),
    ]


def _memory(options: PlanConfig, plan: dict[str, Any]) -> Iterator[str]:
    needed = plan["memory_bytes"]["total"]
    has = options.hardware.memory_bytes
    advice = plan["advice"]
    if needed <= FULL_MEMORY * has:
        return
    way_out = f"No sharding makes it fit {plan['count']:,} of them. What follows is arithmetic."
    if advice is not None:
        flags = f"{_flags('scaling', advice['scaling'])} {_flags('train', advice['train'])}"
        way_out = f"{flags.strip()} makes it {advice['memory_bytes']['total'] / 1e9:,.1f} GB."
    yield (
        f"The run does not fit its GPUs: each needs {needed / 1e9:,.1f} GB, and the {options.gpu} has "
        f"{has / 1e9:,.0f} GB, a tenth of it for allocator and libraries. {way_out}"
    )


def _flags(branch: str, settings: Mapping[str, Any]) -> str:
    flags = [
        f"--{branch}.{name.replace('_', '-')} {value}" for name, value in settings.items() if value
    ]
    return " ".join(flags).replace("True", "true")


def _on_gpus(config: RunConfig, options: PlanConfig, plan: dict[str, Any]) -> Iterator[str]:
    yield from _lanes(config, plan["count"])
    if options.sustained_tflops is None:
        yield from _share_of_peak(config, options)
    moved = plan["exchange"]
    if moved["seconds"] > moved["compute_s"]:
        yield (
            f"The run is bound by the network: a step exchanges for {moved['seconds']:,.3g} s, of it "
            f"{moved['messages_s']:,.3g} s for messages, and computes for {moved['compute_s']:,.3g} s, so it takes "
            f"{moved['step_s']:,.3g} s. That is so below {moved['least_sequences']:,} sequences "
            f"({moved['counted_in']}). More of them, fewer GPUs or a faster network helps."
        )
    workers = config.scaling.max_workers
    # 2 is the default, which nobody chose
    if options.count is not None and workers not in (options.count, 2):
        yield (
            f"--count is {options.count:,} and scaling.max_workers {workers:,}: the plan has other GPUs than the run "
            "would have workers."
        )
    yield from _keeping(config, plan)


def of_the_budget(config: RunConfig, cost: float) -> Iterator[str]:
    """Yields what becomes of a run that costs more than it may."""
    most = config.scaling.max_cost
    if most is not None and cost > most:
        yield (
            f"The run costs about {cost:,.2f}, and scaling.max_cost {most:g} ends it before: after about "
            f"{most / cost:.0%} of its steps."
        )


def _lanes(config: RunConfig, count: int) -> Iterator[str]:
    lanes = batch_schedule(config).num_lanes(1)
    if count > lanes:
        yield (
            f"{count:,} GPUs for {lanes:,} lanes: train.global_batch_size {config.train.global_batch_size:,} / "
            f"train.micro_batch_size {config.train.micro_batch_size} gives only {lanes:,} of them work, while the days "
            f"below assume that {count:,} are busy. That takes a batch of at least "
            f"{count * config.train.micro_batch_size:,} sequences."
        )
    elif lanes % count:
        most = -(-lanes // count)
        busy = lanes / count / most
        yield (
            f"{lanes:,} lanes do not divide among {count:,} GPUs: some compute {most} a step, others "
            f"{lanes // count} and wait: {1 - busy:.0%} of the GPUs' time is lost, which the days below leave out."
        )


def _share_of_peak(config: RunConfig, options: PlanConfig) -> Iterator[str]:
    numerics, fast = config.train.numerics, options.hardware.fast_numerics
    if not numerics.is_rounded:
        name_of_peak = fast.name if fast.is_rounded else "fp16"
        advice = f"set --train.precision {fast.name}, or " if fast.is_rounded else ""
        yield (
            f"train.precision is {numerics.name}, and the MFU is a share of the peak of "
            f"{name_of_peak}, {options.hardware.peak_flops_per_s / 1e12:,.0f} TFLOP/s: "
            f"{advice}say with --sustained-tflops what {numerics.name} sustains."
        )
    if config.train.recompute:
        yield (
            "train.recompute changes no days with --mfu, which does not count repeated operations; it does with "
            "--sustained-tflops."
        )


def _keeping(config: RunConfig, plan: dict[str, Any]) -> Iterator[str]:
    """Warns of snapshots without room, and of checkpoints that come too often."""
    host = plan["host_memory_bytes"]
    snapshots = host["snapshots"] + host["copies_of_another_node"]
    allowed = config.checkpoint.snapshot_bytes
    if allowed is not None and 0 < allowed < snapshots:
        yield (
            f"Snapshots need {snapshots / 1e9:,.1f} GB of each node's memory and checkpoint.snapshot_bytes allows "
            f"{allowed / 1e9:,.1f} GB: without them a failure costs all steps since the last checkpoint."
        )
    between_s = config.checkpoint.save_every_steps * plan["step_s"]
    store_s = plan["checkpoint"]["store_s"]
    if between_s < store_s:
        yield (
            f"Checkpoints come every {between_s:,.3g} s, {config.checkpoint.save_every_steps:,} steps, and storing one "
            f"takes {store_s:,.3g} s: those that come meanwhile are passed over "
            "(checkpoint.save_every_steps)."
        )


def _sharding(config: RunConfig, options: PlanConfig, plan: dict[str, Any]) -> Iterator[str]:
    uneven = uneven_groups(config, StepTimes(config, options), plan["count"])
    if uneven:
        yield uneven
        return
    moved, advice = plan["exchange"], plan["exchange"]["advice"]
    exposed = moved["exposed_s"] / moved["compute_s"]
    if exposed <= TOLERATED_EXPOSURE:
        return
    way_out = "No other sharding that fits makes it shorter."
    if advice is not None:
        way_out = f"{_flags('scaling', advice['scaling'])} makes it {advice['step_s']:,.3g} s, with the same bits."
    yield (
        f"Computing does not hide the exchange: a step computes for {moved['compute_s']:,.3g} s and waits another "
        f"{moved['exposed_s']:,.3g} s, {exposed:.0%} more, so it takes {moved['step_s']:,.3g} s. {way_out}"
    )


def of_the_schedule(config: RunConfig) -> Iterator[str]:
    """Warns of a learning rate that the run does not reach, and of positions that it never
    trains."""
    train = config.train
    horizon = train.decay_tokens or train.max_tokens
    warmup = warmup_tokens(config)
    if warmup >= train.max_tokens:
        yield (
            f"The warm-up of {warmup:,} tokens is as long as the run of {train.max_tokens:,}: the learning rate never "
            "reaches its peak."
        )
    if horizon > train.max_tokens:
        yield (
            f"The learning rate falls until {horizon:,} tokens (train.decay_tokens), and the run ends at "
            f"{train.max_tokens:,}: it never reaches its least."
        )
    elif horizon < train.max_tokens:
        yield (
            f"The learning rate is at its least from {horizon:,} tokens on (train.decay_tokens), for the last "
            f"{1 - horizon / train.max_tokens:.0%} of the run."
        )
    if seq_len(config) < config.model.n_positions:
        yield (
            f"train.seq_len {seq_len(config):,} is less than model.n_positions {config.model.n_positions:,}: later "
            "positions are never trained, and a served model accepts them all the same."
        )

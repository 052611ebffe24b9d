"""Simulates training at 8 to 4,096 GPUs, from the bytes that the code moves and the speeds of a
plan.

The global batch stays the same, as a run's does in raymill, so more GPUs have fewer lanes each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.settings.plan import PlanConfig
from cluster.settings.run import RunConfig, batch_schedule, seq_len, state_scaling, with_precision
from jobs.exact.run_values import run_sharding
from jobs.plan.exchange import exchange
from jobs.plan.formulas import (
    TEXT_BYTES_PER_TOKEN,
    checkpoint_interval_s,
    goodput,
    mean_time_between_failures_s,
    storing_s,
)
from jobs.plan.memory import layout_of
from jobs.plan.table import Figures, template
from jobs.plan.update import state_bytes
from jobs.snapshots.choice import interval
from jobs.tokens.token_store import token_dtype
from raymill.state.flat_layout import FlatLayout

WORLD_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

COPY_BYTES_PER_S = 10e9
"""Speed at which one thread writes a snapshot with its checksum into shared memory: an
assumption."""

HEALTH_CHECK_S = 0.2
"""Interval at which Ray Train's controller asks each worker (`pretrain`)."""

Row = Mapping[str, Any]
"""The figures at one number of GPUs, by name."""


def scales(config: RunConfig, options: PlanConfig) -> list[Row]:
    """Returns a row for each number of GPUs that all have a lane of the batch."""
    config = with_precision(config, options.hardware.fast_numerics.name)
    layout = layout_of(config)
    return [
        _scale(config, options, layout, size)
        for size in WORLD_SIZES
        if size <= batch_schedule(config).full_lanes
    ]


def _scale(config: RunConfig, options: PlanConfig, layout: FlatLayout, size: int) -> Row:
    gpu, schedule = options.hardware, batch_schedule(config)
    lanes = schedule.full_lanes
    step_tokens = lanes * schedule.lane_tokens
    lane_flops = config.model.flops_per_token(seq_len(config)) * schedule.lane_tokens
    lane_s = lane_flops / (options.mfu * gpu.peak_flops_per_s)
    moved = exchange(config, layout, options, world_size=size, num_lanes=lanes, lane_s=lane_s)
    compute_s, step_s = moved.compute_s, moved.step_s

    sharding = run_sharding(state_scaling(config), rank=0, world_size=size)
    state = state_bytes(config, layout)
    holders = sharding.num_holders
    # A piece moves while another one is written
    copy_bytes_per_s = min(gpu.host_bytes_per_s, COPY_BYTES_PER_S)
    shares = min(size, options.gpus_per_node) if sharding.is_whole else holders
    snapshot_s = state / shares / copy_bytes_per_s  # each rank's share
    snapshot_wait_s = max(0.0, snapshot_s - compute_s)  # copies are taken beside the next step
    snapshot_every = interval(copy_s=snapshot_wait_s, step_s=step_s)
    wait_s = max(0.0, state / holders / copy_bytes_per_s - compute_s)
    mtbf_s = mean_time_between_failures_s(options.mtbf_gpu_hours, size)
    store_s = storing_s(state, options, writers=holders)
    checkpoint_every_s = max(checkpoint_interval_s(wait_s, mtbf_s), store_s)
    snapshots = {"interval_s": snapshot_every * step_s, "cost_s": snapshot_wait_s, "mtbf_s": mtbf_s}
    checkpoints = {"interval_s": checkpoint_every_s, "cost_s": wait_s, "mtbf_s": mtbf_s}
    # Until a lost node is replaced, training continues without its share of the throughput.
    continuing_s = options.restart_s + min(1.0, options.gpus_per_node / size) * options.replace_s
    return {
        "num_gpus": size,
        "lanes_per_gpu": lanes / size,
        "compute_s": compute_s,
        "exchange_s": moved.seconds,  # bytes and messages, hidden or not
        "exposed_s": moved.exposed_s,  # the part that computing does not hide
        "card_bytes": moved.traffic.card_bytes,  # through each network card
        "messages": moved.traffic.num_messages,
        "messages_s": moved.traffic.messages_s,
        "step_s": step_s,
        "efficiency": compute_s / step_s,
        "snapshot_s": snapshot_s,  # for one snapshot
        "snapshot_wait_s": snapshot_wait_s,  # of it, after the next step's backward
        "snapshot_every": snapshot_every,  # steps
        "checkpoint_wait_s": wait_s,  # for which all wait
        "checkpoint_store_s": store_s,
        # The best interval, by failures, or what storing allows
        "checkpoint_every_s": checkpoint_every_s,
        "mtbf_s": mtbf_s,
        # By all GPUs
        "read_bytes_per_s": token_dtype(config.model.vocab_size).itemsize * step_tokens / step_s,
        # For tokenizing while training
        "text_bytes_per_s": TEXT_BYTES_PER_TOKEN * step_tokens / step_s,
        "health_calls_per_s": size / HEALTH_CHECK_S,
        "goodput": goodput(**snapshots, restart_s=continuing_s),
        "goodput_elastic": goodput(**checkpoints, restart_s=continuing_s),  # with checkpoints alone
        "goodput_waiting": goodput(**checkpoints, restart_s=options.restart_s + options.replace_s),
    }


def scale_table(rows: Sequence[Row]) -> str:
    """Formats the tables of `scales.txt` over the numbers of GPUs."""
    tables = []
    for table in template("scales.txt").split("\n\n"):
        heads, line = table.splitlines()
        lines = [heads]
        for row in rows:
            lines.append(Figures().format(line, **row, mtbf_h=row["mtbf_s"] / 3600))
        tables.append(_aligned(lines))
    return "\n\n".join(tables)


def _aligned(lines: Sequence[str]) -> str:
    """Returns the lines of a table with columns of one width, and a rule below the first line."""
    heads, *rows = [line.strip("| ").split(" | ") for line in lines]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    aligned = []
    for cells in (heads, rule, *rows):
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        aligned.append(f"| {' | '.join(padded)} |")
    return "\n".join(aligned)

"""Compares what a run was planned to take with what it took."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig, batch_schedule, max_steps, seq_len
from cluster.storage.uris import open_storage
from jobs.plan.formulas import STATE_BYTES
from jobs.plan.table import size
from jobs.run.history import duration, worker_hours
from jobs.run.ledger import Ledger
from model.config import flops_per_token, num_parameters

Row = tuple[str, str, str]
"""The name of a figure, its planned value and its actual one."""


def read_plan(path: Path) -> dict[str, Any]:
    """Reads what `raymill plan --json` printed. Raises `ConfigError`."""
    try:
        plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
        float(plan["tokens_per_s"])
    except (OSError, ValueError, IndexError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} holds no plan ({error}); expected what `raymill plan --json` prints") from None
    return plan


def plan_rows(ledger: Ledger, config: RunConfig, plan: Mapping[str, Any] | None) -> list[Row]:
    """Returns what the settings alone plan, and what a plan adds where there is one: for this machine if it was
    calibrated, else for its GPUs."""
    last, taken = ledger.steps[-1], [line for line in ledger.lines if "event" not in line]
    per_token = flops_per_token(config.model, seq_len(config))
    computed = sum(batch_schedule(config).step_tokens(line["step"]) for line in taken)
    rows = [
        ("Tokens", f"{config.train.max_tokens:,}", f"{last['tokens_seen']:,}"),
        ("Steps", f"{max_steps(config):,}", f"{len(ledger.steps):,}, {len(taken):,} with those taken again"),
        ("Operations", f"{per_token * config.train.max_tokens:.4g} FLOPs", f"{per_token * computed:.4g} FLOPs"),
    ]
    if checkpoints := ledger.events("checkpoint"):
        stored = sum(entry.size for entry in open_storage(checkpoints[-1]["checkpoint"]).list())
        planned = STATE_BYTES * num_parameters(config.model)
        rows.append(("A checkpoint", size(planned), size(stored) if stored else "removed since"))
    if plan is None:
        return rows
    wall_s = ledger.wall_s
    useful_s = sum(line["wall_s"] for line in ledger.steps)
    speed = f"{last['tokens_seen'] / useful_s:,.0f} tokens/s"
    kind, hours = worker_hours(ledger, config)
    if calibration := plan.get("calibration"):
        stage_s = calibration["stage_s"]["train"]
        rows.append(("Wall time of training", duration(stage_s), f"{duration(wall_s)}, without the job's start"))
        return [*rows, ("Throughput", f"{calibration['tokens_per_s']:,.0f} tokens/s", speed)]
    mfu = [line["mfu"] for line in ledger.steps if line["mfu"] is not None]
    return [
        *rows,
        ("Wall time", duration(plan["days"] * 86_400), duration(wall_s)),
        (f"{kind}-hours", f"{plan['gpu_days'] * 24:,.4g}", f"{hours:,.4g}"),
        ("Throughput", f"{plan['tokens_per_s']:,.0f} tokens/s", speed),
        ("MFU", f"{plan['mfu']:.1%}", f"{sum(mfu) / len(mfu):.1%}" if mfu else "not known on this hardware"),
        ("Cost", f"${plan['cost']:,.2f}", f"${hours * plan['price_per_gpu_hour']:,.2f} at the plan's price"),
    ]

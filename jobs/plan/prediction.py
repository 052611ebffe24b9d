"""Predicts how long a run takes on this machine, stage by stage, from a rehearsal of it: a pure function.

A rehearsal is the run in small (`cluster/commands/rehearsal.py`). What it did once counts as long in the run; what the
run does more of, steps, validations and bytes of text, is multiplied.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.settings.run import RunConfig, batch_schedule, max_steps
from jobs.run.ledger import Ledger, Line

_LANE_PHASES = ("load", "forward", "loss", "backward")
_APART = ("validation", "checkpoint")
Faults = Sequence[Mapping[str, Any]]
FIRST_STEPS = 3
"""The first steps of an attempt, which take longer and are counted with the start."""


@dataclass(frozen=True)
class Pace:
    """The seconds that a rehearsal's steps took."""

    step_s: dict[int, float]  # by world size
    validation_s: float
    checkpoint_s: float
    around_s: float  # of the stage, before the first steps and after the last one
    recovery_s: list[float]  # of each restart
    join_s: float  # from asking for a node until training grew


def pace(found: Mapping[str, Any], ledger: Ledger, *, rehearsed: RunConfig, planned: RunConfig) -> Pace:
    """Returns the pace of the rehearsal `found`; a step's seconds are scaled to the planned run's lanes."""
    lines, last_start = [line for line in ledger.lines if "event" not in line], ledger.events("start")[-1]
    first_of = {line["attempt"]: line["step"] for line in reversed(lines)}
    usual = [line for line in lines if line["step"] >= first_of[line["attempt"]] + FIRST_STEPS]
    # A run's first steps are slower: the mean of the demo's first 120 was 80 ms, their median 73.5, as the mean of all.
    step_s = {
        size: float(np.median([_scaled(line, rehearsed, planned) for line in usual if line["world_size"] == size]))
        for size in {line["world_size"] for line in usual}
    }
    recovery_s = [recovery.seconds for recovery in ledger.recoveries()]
    # A recovery lasts until the first step after it is done; the run's first steps count as the start.
    begun = {attempt: step + (FIRST_STEPS if attempt == 1 else 1) for attempt, step in first_of.items()}
    inside_s = sum(line["wall_s"] for line in lines if line["step"] >= begun[line["attempt"]])
    add_step = _step_of(found["rehearsed_faults"], "add")
    joining = [] if add_step is None else [n for n in lines if add_step < n["step"] <= last_start["step"]]
    whole = [line for line in lines if line["world_size"] == max(step_s)]
    return Pace(
        step_s=step_s,
        validation_s=_mean_of(whole, "validation"),
        checkpoint_s=_mean_of(whole, "checkpoint"),
        around_s=found["stage_s"]["train"] - inside_s - sum(recovery_s),
        recovery_s=recovery_s,
        join_s=sum(line["wall_s"] for line in joining),
    )


def _mean_of(lines: Sequence[Line], phase: str) -> float:
    """Returns the mean seconds of the phase in the lines that have it; 0 where none has."""
    found = [line["seconds"][phase] for line in lines if phase in line["seconds"]]
    return float(np.mean(found)) if found else 0.0


def _scaled(line: Line, rehearsed: RunConfig, planned: RunConfig) -> float:
    """Returns the step's seconds with as many lanes as a rank of the planned run has, at most."""
    seconds, size = line["seconds"], line["world_size"]
    training_s = line["wall_s"] - sum(seconds.get(name, 0.0) for name in _APART)
    lanes_s = sum(seconds.get(name, 0.0) for name in _LANE_PHASES)
    had, has = (-(-batch_schedule(config).full_lanes // size) for config in (rehearsed, planned))
    return training_s + lanes_s * (has / had - 1)


def predict(found: Mapping[str, Any], ledger: Ledger, *, rehearsed: RunConfig, planned: RunConfig) -> dict[str, Any]:
    """Returns the planned run's `wall_s`, its parts `stage_s`, and what was measured, from the rehearsal `found`."""
    stage_s = dict(found["stage_s"])
    evaluation = found["evaluation"]
    start_s = stage_s["evaluate"] - evaluation["tokens"] / evaluation["tokens_per_s"]  # as of any job
    more_text = found["source_bytes"] / found["rehearsed_bytes"]
    stage_s["tokenize"] = start_s + (stage_s["tokenize"] - start_s) * more_text
    measured = pace(found, ledger, rehearsed=rehearsed, planned=planned)
    stage_s["train"] = _training_s(measured, found["faults"], rehearsed=rehearsed, planned=planned)
    largest = max(measured.step_s)
    tokens = batch_schedule(planned).step_tokens(max_steps(planned))
    return {
        "wall_s": round(sum(stage_s.values()), 1),
        "stage_s": {name: round(seconds, 1) for name, seconds in stage_s.items()},
        "precision": rehearsed.train.precision,
        "tokens_per_s": round(tokens / measured.step_s[largest], 1),
        "step_s": {str(size): round(seconds, 5) for size, seconds in sorted(measured.step_s.items())},
        "validation_s": round(measured.validation_s, 3),
        "checkpoint_s": round(measured.checkpoint_s, 3),
        "job_start_s": round(start_s, 1),
        "recovery_s": [round(seconds, 1) for seconds in measured.recovery_s],
        "took_s": found["took_s"],
        "busy_before": found["busy_before"],
    }


def _training_s(measured: Pace, faults: Faults, *, rehearsed: RunConfig, planned: RunConfig) -> float:
    kill_step, add_step = (_step_of(faults, kind) for kind in ("kill", "add"))
    num_steps, every = max_steps(planned), planned.train.eval_every_steps
    largest, smallest = measured.step_s[max(measured.step_s)], measured.step_s[min(measured.step_s)]
    few_steps = 0.0  # that the smaller group takes
    if kill_step is not None:
        few_steps = num_steps - kill_step if add_step is None else add_step - kill_step + measured.join_s / smallest
    validations = -(-num_steps // every)
    checkpoints = -(-num_steps // planned.checkpoint.save_every_steps)
    more_rows = planned.train.eval_max_tokens / rehearsed.train.eval_max_tokens
    return (
        measured.around_s
        + (num_steps - FIRST_STEPS - few_steps) * largest
        + few_steps * smallest
        + validations * measured.validation_s * more_rows
        + checkpoints * measured.checkpoint_s
        + sum(measured.recovery_s)
    )


def _step_of(faults: Faults, kind: str) -> int | None:
    return next((fault["step"] for fault in faults if fault["kind"].startswith(kind)), None)

"""The cost of audits: the same steps with an audit in each and with none, taking turns in one
process.

    python -m tests.benchmarks.bench_sentinel [tiny|small-10m]

Prints one JSON object for each model. `by_default` is the share of the time that audits take at the
interval that a run chooses by itself.
"""

import json
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jobs.training.attempt import Attempt
from jobs.training.open_attempt import open_attempt
from jobs.workers.worker_group import WorkerGroup
from tests.jobs.runs import tiny_plan

NUM_STEPS = {"tiny": 200, "small-10m": 40}
SIDES = {"with": 1, "without": 0, "by default": None}
NUM_LANES = 8


def attempt_of(side: str, preset: str, folder: Path) -> Attempt:
    seq_len = 32 if preset == "tiny" else 128
    train = {
        "sample_prompts": [],
        "seq_len": seq_len,
        "micro_batch_size": 2,
        "global_batch_size": 2 * NUM_LANES,
        "max_tokens": 10_000 * 2 * NUM_LANES * seq_len,
        "audit_every_steps": SIDES[side],
    }
    model = {"preset": preset, "n_positions": seq_len, "vocab_size": 300}
    plan = tiny_plan(str(folder / side), tokens_in=str(folder), train=train, model=model)
    attempt = open_attempt(plan, WorkerGroup(0, 1), ExitStack(), signals=lambda: None)
    assert isinstance(attempt, Attempt)
    return attempt


def seconds_of_step(attempt: Attempt, step: int) -> tuple[float, float]:
    """Returns (wall, CPU of this thread) of a step up to its update."""
    wall, cpu = time.perf_counter(), time.thread_time()
    measured = attempt.measure(step)
    assert measured is not None
    attempt.state.apply(norm=measured.norm, learning_rate=1e-4)
    return time.perf_counter() - wall, time.thread_time() - cpu


def measure(preset: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="raymill-bench-") as folder:
        attempts = {side: attempt_of(side, preset, Path(folder)) for side in SIDES}
        every_steps = attempts.pop("by default").gradient.audits.every_steps
        spent: dict[str, list[tuple[float, float]]] = {side: [] for side in attempts}
        for step in range(1, NUM_STEPS[preset] + 1):
            for side in sorted(attempts, reverse=step % 2 == 0):
                spent[side].append(seconds_of_step(attempts[side], step))
    figures: dict[str, Any] = {"preset": preset, "lanes": NUM_LANES, "every_steps": every_steps}
    for clock, name in enumerate(("wall", "cpu")):
        step_s = statistics.median(pair[clock] for pair in spent["without"])
        pairs = zip(spent["with"], spent["without"], strict=True)
        audit_s = statistics.median(audited[clock] - usual[clock] for audited, usual in pairs)
        figures |= {
            f"{name}_step_ms": round(1000 * step_s, 3),
            f"{name}_of_an_audit": round(audit_s / step_s, 4),
            f"{name}_by_default": round(audit_s / step_s / every_steps, 5),
        }
    return figures


if __name__ == "__main__":
    for preset in sys.argv[1:] or NUM_STEPS:
        sys.stdout.write(json.dumps(measure(preset)) + "\n")

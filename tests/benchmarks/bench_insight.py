"""The cost of timing and layer statistics: the same steps with both and with neither, taking turns
in one process.

    python -m tests.benchmarks.bench_insight [tiny|small-10m]

Prints one JSON object. CPU seconds of the training thread say it best, as other processes hardly
change them.
"""

import json
import statistics
import sys
import tempfile
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from cluster.settings.train import TrainConfig
from jobs.training.attempt import Attempt
from jobs.training.open_attempt import open_attempt
from raymill.phases import Phase
from raymill.step_timer import StepTimer
from raymill.workers.worker_group import WorkerGroup
from tests.jobs.runs import tiny_plan

EVERY_STEPS = 10
NUM_STEPS = {"tiny": 200, "small-10m": 60}
DEFAULT_EVERY_STEPS = TrainConfig().layer_statistics_every_steps
SIDES: dict[str, dict[str, Any]] = {
    "with": {"layer_statistics_every_steps": EVERY_STEPS},
    "without": {"layer_statistics_every_steps": 0},
}


class Untimed(StepTimer):
    """Knows the whole time of a step only."""

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        return nullcontext()


def attempt_of(side: str, preset: str, folder: Path) -> Attempt:
    seq_len = 32 if preset == "tiny" else 64
    train = {"sample_prompts": [], "seq_len": seq_len, "max_tokens": 10_000 * 4 * seq_len}
    model = {"preset": preset, "n_positions": seq_len, "vocab_size": 300}
    plan = tiny_plan(
        str(folder / side), tokens_in=str(folder), train=train | SIDES[side], model=model
    )
    attempt = open_attempt(plan, WorkerGroup(0, 1), ExitStack(), signals=lambda: None)
    assert isinstance(attempt, Attempt)
    if side == "without":
        attempt.record.timer = Untimed()
    return attempt


def seconds_of_step(attempt: Attempt, step: int) -> tuple[float, float]:
    """Returns (wall, CPU of this thread) of a step as the training loop takes it, except for
    validation and saving."""
    wall, cpu = time.perf_counter(), time.thread_time()
    timer = attempt.record.timer
    measured = attempt.gradient.of_step(step, timer)
    with timer.phase("update"), attempt.record.layers.around_update(step):
        attempt.state.apply(norm=measured.norm, learning_rate=1e-4)
    attempt.record.write(step, measured, lr=1e-4)
    attempt.record.compare_ranks(step)
    return time.perf_counter() - wall, time.thread_time() - cpu


def measure(preset: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="raymill-bench-") as folder:
        attempts = {side: attempt_of(side, preset, Path(folder)) for side in SIDES}
        spent: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
        for step in range(1, NUM_STEPS[preset] + 1):
            for side in sorted(SIDES, reverse=step % 2 == 0):
                spent[side].append(seconds_of_step(attempts[side], step))
    figures: dict[str, Any] = {"preset": preset, "steps": NUM_STEPS[preset]}
    for clock, name in enumerate(("wall", "cpu")):
        step_s = statistics.median(pair[clock] for pair in spent["without"])
        # In each turn
        more_s = [a[clock] - b[clock] for a, b in zip(spent["with"], spent["without"], strict=True)]
        measuring = slice(EVERY_STEPS - 1, None, EVERY_STEPS)
        usual_s = statistics.median(
            value for step, value in enumerate(more_s, start=1) if step % EVERY_STEPS
        )
        figures |= {
            f"{name}_step_ms": round(1000 * step_s, 3),
            f"{name}_timing_overhead": round(usual_s / step_s, 5),
            f"{name}_statistics_overhead": round(
                statistics.median(more_s[measuring]) / DEFAULT_EVERY_STEPS / step_s, 5
            ),
        }
    return figures


if __name__ == "__main__":
    for preset in sys.argv[1:] or NUM_STEPS:
        sys.stdout.write(json.dumps(measure(preset)) + "\n")

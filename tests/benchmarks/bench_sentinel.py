"""The cost of audits: the same steps with an audit in each and with none, taking turns in one
process, or with several workers in one run that audits every second step.

    python -m tests.benchmarks.bench_sentinel [tiny|small-10m] [--workers 2]
        [--optimizer muon] [--shard optimizer]

Prints one JSON object for each model. `by_default` is the share of the time that audits take at the
interval that a run chooses by itself, and `between` that of a step without an audit in a run that
has them, which is ready to look a second time at what looks wrong. Of several workers the processor time is told, of all their
threads together: on a busy machine they wait for each other. Where each of them keeps its own part
of the state (`--shard`), an audit also makes a part of the update again, and with Muon that of a
matrix.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.settings.run import state_scaling
from jobs.exact.audits.audit import steps_between
from jobs.exact.run_values import run_sharding
from jobs.run.run_plan import RunPlan
from jobs.training.attempt import Attempt
from jobs.training.open_attempt import open_attempt
from raymill.sums.step_plan import StepPlan
from raymill.workers.worker_group import WorkerGroup
from tests.jobs.runs import tiny_plan
from tests.jobs.worker_processes import exit_code, into_log, worker_process

NUM_STEPS = {"tiny": 200, "small-10m": 40}
SIDES = {"with": 1, "without": 0, "between": 1_000_000, "by default": None}
NUM_LANES = 8


def plan_of(
    preset: str,
    folder: Path,
    *,
    every_steps: int | None,
    workers: int = 1,
    optimizer: str = "adamw",
    shard: str = "none",
) -> RunPlan:
    seq_len = 32 if preset == "tiny" else 128
    train = {
        "sample_prompts": [],
        "seq_len": seq_len,
        "micro_batch_size": 2,
        "global_batch_size": 2 * NUM_LANES,
        "max_tokens": 10_000 * 2 * NUM_LANES * seq_len,
        "audit_every_steps": every_steps,
        "optimizer": optimizer,
    }
    model = {"preset": preset, "n_positions": seq_len, "vocab_size": 300}
    return tiny_plan(
        str(folder / str(every_steps)),
        tokens_in=str(folder),
        train=train,
        model=model,
        scaling={"max_workers": workers, "shard": shard},
    )


def opened(plan: RunPlan, group: WorkerGroup) -> Attempt:
    attempt = open_attempt(plan, group, ExitStack(), signals=lambda: None)
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
        attempts: dict[str, Attempt] = {}
        for side, every in SIDES.items():
            plan = plan_of(preset, Path(folder), every_steps=every)
            attempts[side] = opened(plan, WorkerGroup(0, 1))
        every_steps = attempts.pop("by default").gradient.audits.every_steps
        spent: dict[str, list[tuple[float, float]]] = {side: [] for side in attempts}
        for step in range(1, NUM_STEPS[preset] + 1):
            sides = [*attempts]
            for side in sides[step % 3 :] + sides[: step % 3]:
                spent[side].append(seconds_of_step(attempts[side], step))
    figures: dict[str, Any] = {"preset": preset, "lanes": NUM_LANES, "every_steps": every_steps}
    for clock, name in enumerate(("wall", "cpu")):
        step_s = statistics.median(pair[clock] for pair in spent["without"])
        shares: dict[str, float] = {}
        for side in ("with", "between"):
            pairs = zip(spent[side], spent["without"], strict=True)
            extra_s = statistics.median(other[clock] - usual[clock] for other, usual in pairs)
            shares[side] = extra_s / step_s
        figures |= {
            f"{name}_step_ms": round(1000 * step_s, 3),
            f"{name}_of_an_audit": round(shares["with"], 4),
            f"{name}_by_default": round(shares["with"] / every_steps, 5),
            f"{name}_between": round(shares["between"], 5),
        }
    return figures


def take_steps(
    plan: RunPlan, rank: int, workers: int, num_steps: int, folder: Path, log: Path
) -> None:
    """One of several workers: writes the processor seconds of each of its steps."""
    into_log(log)
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=workers)
    attempt = opened(plan, WorkerGroup(rank, workers))
    spent: list[float] = []
    for step in range(1, num_steps + 1):
        begun = time.process_time()
        measured = attempt.measure(step)
        assert measured is not None
        attempt.update(step, measured)
        spent.append(time.process_time() - begun)
    (folder / f"{rank}.json").write_text(json.dumps(spent))
    attempt.group.gather("done")
    dist.destroy_process_group()


def measure_workers(preset: str, workers: int, *, optimizer: str, shard: str) -> dict[str, Any]:
    """Audits every second step: an audited step beside the mean of the two around it."""
    num_steps = NUM_STEPS[preset] | 1
    with tempfile.TemporaryDirectory(prefix="raymill-bench-") as name:
        folder = Path(name)
        plan = plan_of(
            preset, folder, every_steps=2, workers=workers, optimizer=optimizer, shard=shard
        )
        processes = []
        for rank in range(workers):
            log = folder / f"{rank}.log"
            processes.append(
                worker_process(take_steps, plan, rank, workers, num_steps, folder, log)
            )
        for process in processes:
            process.start()
        codes = {exit_code(process, timeout_s=900) for process in processes}
        assert codes == {0}, (folder / "0.log").read_text()
        of_ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(workers)]
    step_s = [sum(spent) for spent in zip(*of_ranks, strict=True)]
    extra_s: list[float] = []
    usual_s: list[float] = []
    for place in range(3, num_steps - 1, 2):  # the first ones warm up
        around_s = (step_s[place - 1] + step_s[place + 1]) / 2
        usual_s.append(around_s)
        extra_s.append(step_s[place] - around_s)
    share = statistics.median(extra_s) / statistics.median(usual_s)
    sharding = run_sharding(state_scaling(plan.config), rank=0, world_size=workers)
    every_steps = steps_between(
        StepPlan(sharding, NUM_LANES, plan.config.train.micro_batches_per_lane)
    )
    return {
        "preset": preset,
        "lanes": NUM_LANES,
        "workers": workers,
        "optimizer": optimizer,
        "shard": shard,
        "every_steps": every_steps,
        "cpu_step_ms": round(1000 * statistics.median(usual_s), 3),
        "cpu_of_an_audit": round(share, 4),
        "cpu_by_default": round(share / every_steps, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("presets", nargs="*", default=[*NUM_STEPS])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--optimizer", default="adamw", help="of several workers")
    parser.add_argument("--shard", default="none", help="of several workers")
    arguments = parser.parse_args()
    for preset in arguments.presets:
        if arguments.workers == 1:
            figures = measure(preset)
        else:
            figures = measure_workers(
                preset, arguments.workers, optimizer=arguments.optimizer, shard=arguments.shard
            )
        sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()

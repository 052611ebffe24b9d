"""How many steps a run takes to find a worker that computes a share of its lanes wrong.

    python -m tests.benchmarks.bench_finding [--runs 6]

Two real workers of four lanes each, of which one flips a random bit of a share q of its gradients,
are audited every K steps; each run ends when the first audit disagrees. Beside the measured mean
stands K/q, where an audit sees one of that worker's lanes. Here it sees two, as the worker computes
one of its neighbor's too: K / (1 - (1 - q)^2), and half an interval less as the first one comes
early. Prints a table.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from tests.jobs.faulty_runs import FAULTY, Fault, work
from tests.jobs.runs import tiny_plan
from tests.jobs.worker_processes import worker_process

_EVERY_STEPS = 5
_SHARES = (1.0, 0.3, 0.1, 0.03)
_LANES, _SEQ_LEN = 8, 32
_MOST_TIMES = 12  # K/q, which no run takes
_POLL_S = 0.2


def plan_of(folder: Path, *, share: float, seed: int) -> RunPlan:
    num_steps = round(_MOST_TIMES * _EVERY_STEPS / share)
    train = {
        "global_batch_size": 2 * _LANES,
        "max_tokens": num_steps * 2 * _LANES * _SEQ_LEN,
        "sample_prompts": [],
        "eval_every_steps": num_steps,
        "audit_every_steps": _EVERY_STEPS,
        "seed": seed,
    }
    return tiny_plan(str(folder / "storage"), train=train, scaling={"max_workers": 2})


def steps_to_find(folder: Path, *, share: float, seed: int) -> int:
    """Returns the first step whose audit disagreed."""
    plan = plan_of(folder, share=share, seed=seed)
    fault = Fault(rank=1, failpoint=f"gradient:{share}:flip")
    nodes, meeting = ["node-0", FAULTY], str(folder / "meeting")
    processes = [
        worker_process(work, plan, fault, rank, nodes, meeting, folder / f"{rank}.log")
        for rank in range(len(nodes))
    ]
    for process in processes:
        process.start()
    try:
        while True:
            found = Ledger.read(plan.run).events("corruption", "undecided")
            if found:
                return int(found[0]["step"])
            if not any(process.is_alive() for process in processes):
                raise SystemExit(f"share {share}, seed {seed}: the run ended before it was found")
            time.sleep(_POLL_S)
    finally:
        for process in processes:
            process.kill()
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=6, help="of each share, with other seeds")
    arguments = parser.parse_args()
    print("share of lanes   steps, mean (least to most)   K/q   of two lanes an audit")
    for share in _SHARES:
        steps: list[int] = []
        for seed in range(arguments.runs):
            with tempfile.TemporaryDirectory(prefix="raymill-bench-") as folder:
                steps.append(steps_to_find(Path(folder), share=share, seed=seed))
        of_two = _EVERY_STEPS / (1 - (1 - share) ** 2)
        print(
            f"{share:14.0%}   {statistics.fmean(steps):11.1f} ({min(steps)} to {max(steps)})"
            f"   {_EVERY_STEPS / share:5.0f}   {of_two:5.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

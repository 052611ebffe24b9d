"""The memory of a worker that goes on after lost workers: one process loses its peers again and
again in a step.

    python -m tests.benchmarks.bench_attempt_memory [NUM_LOSSES [strong]]

Prints one JSON object. With `strong` autograd's hooks hold the sums of an attempt, as they did at
first: what that costs. `picture_of_memory` draws both.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from jobs.report.page import ACCENT, SERIES, new_figure, png, titled
from jobs.training.train_loop import train
from jobs.workers.heartbeat import Pulse
from jobs.workers.rendezvous import Rendezvous, meeting_place
from raymill.state.train_state import TrainState
from raymill.sums import lane_sums
from tests.benchmarks.worker_memory import give_back, resident_bytes
from tests.jobs.runs import tiny_plan
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

NUM_LOSSES = 10
MODEL = {"n_embd": 256, "n_layer": 6, "n_head": 4}


@dataclass(frozen=True)
class AttemptMemory:
    parameters_mb: float  # of the weights alone
    resident_mb: Sequence[float]  # of the process after each loss


def memory_after_losses(folder: Path, *, num_losses: int = NUM_LOSSES) -> AttemptMemory:
    """Trains a run that is cut off, as by gloo, in the second step of each attempt."""
    settings: dict[str, Any] = {
        "model": {"preset": "tiny", "n_positions": 48, "vocab_size": 300} | MODEL,
        "train": {"sample_prompts": [], "eval_every_steps": 10**6},
        # The thread of a checkpoint would go on with its copy for a while
        "checkpoint": {"save_every_steps": 10**6},
        "scaling": {"max_workers": 1, "max_fruitless_attempts": 2 * num_losses},
    }
    plan = tiny_plan(str(folder), num_steps=10**4, **settings)
    pulse, calls, parameters_mb = Pulse({}), count(1), list[float]()
    update = TrainState.apply

    def cut_off(state: TrainState, **options: Any) -> None:
        parameters_mb[:] = [4e-6 * state.layout.size]
        if next(calls) % 2 == 0:
            raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
        update(state, **options)

    TrainState.apply = cut_off  # type: ignore[method-assign, assignment]
    resident_mb = []
    try:
        with meeting_place("127.0.0.1") as address:
            rendezvous = Rendezvous(
                address, group="group", seat=0, num_seats=1, max_fruitless=2 * num_losses
            )
            work = partial(train, plan, pulse=pulse, rank=0, world_size=1)
            for _ in range(num_losses):
                assert not rendezvous.attend(lambda meeting: work(meeting=meeting)), (
                    "the run came to its end"
                )
                give_back()
                resident_mb.append(round(resident_bytes() / 1e6, 1))
    finally:
        TrainState.apply = update  # type: ignore[method-assign]
    return AttemptMemory(round(parameters_mb[0], 1), resident_mb)


def in_own_process(*, num_losses: int = NUM_LOSSES, strong: bool = False) -> AttemptMemory:
    """Measures in a process of its own, which nothing else has used."""
    words = [f"{num_losses}", *["strong"][: int(strong)]]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.bench_attempt_memory", *words],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        timeout=limit_s(120),
        check=True,
    )
    return AttemptMemory(**json.loads(done.stdout))


def picture_of_memory() -> bytes:
    """Returns the two curves as PNG."""
    figure = new_figure()
    axes = titled(
        figure,
        "What a worker holds after it lost others",
        x="lost workers",
        y="resident memory, MB",
    )
    numbers = range(1, NUM_LOSSES + 1)
    strong = in_own_process(strong=True).resident_mb
    axes.plot(
        numbers,
        strong,
        "--",
        color=ACCENT,
        marker="^",
        label="if autograd's hooks held an attempt's sums",
    )
    axes.plot(numbers, in_own_process().resident_mb, color=SERIES, marker="o", label="as it is")
    axes.set_ylim(0)
    axes.set_xticks(numbers)
    return png(figure)


def main() -> None:
    num_losses = int(sys.argv[1]) if sys.argv[1:] else NUM_LOSSES
    if sys.argv[2:] == ["strong"]:
        lane_sums.WeakMethod = lambda method: lambda: method  # type: ignore[assignment, misc]
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(asdict(memory_after_losses(Path(scratch), num_losses=num_losses))))


if __name__ == "__main__":
    main()

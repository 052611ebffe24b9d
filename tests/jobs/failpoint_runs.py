"""Crashes a tiny run at each failpoint and resumes it, in forked processes: NUM_SEEDS crashes of
each.

`python -m tests.jobs.failpoint_runs STORAGE_URI TOKENS_IN NUM_SEEDS FAILPOINT …`

Prints a line of JSON for each: what the crash left, where a fresh process resumed, and the hash at
the run's end.
"""

import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from jobs.run.checkpoints import RunCheckpoints, step_of
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.saving.checkpoint_writer import CheckpointWriter
from jobs.training.train_loop import train
from model.files.checkpoint_folder import verify_checkpoint
from model.files.failpoints import VARIABLE
from tests.jobs.runs import tiny_plan

# Once a checkpoint
SAVING = ("before_manifest", "mid_manifest", "after_manifest", "before_rename", "after_rename")
NUM_STEPS = 10

save = CheckpointWriter.save


def save_and_wait(self: CheckpointWriter, *arguments: Any, must: bool) -> None:
    """Waits until each step's checkpoint is written, however slow this machine is."""
    save(self, *arguments, must=must)
    while self._thread.is_alive() and (self._pending or self._begun or not self._free):
        time.sleep(0.001)


def in_child(work: Callable[[], None]) -> int:
    """Returns the exit code of a forked process that does the work."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def crash(plan: RunPlan, failpoint: str, seed: int) -> dict[str, Any]:
    """The seed decides at which of its visits to the failpoint the process dies."""
    visits = {"after_lease": 1, "mid_delete": 3, "before_upload_complete": 5, "none": 1}
    visits |= dict.fromkeys(SAVING, 5)
    nth = random.Random(f"{failpoint} {seed}").randint(1, visits.get(failpoint, 30))

    def until_the_failpoint() -> None:
        os.environ[VARIABLE] = f"{failpoint}:{nth}:exit"
        CheckpointWriter.save = save_and_wait  # type: ignore[method-assign]
        train(plan, rank=0, world_size=1)

    code = in_child(until_the_failpoint)
    ledger, checkpoints = Ledger.read(plan.run), RunCheckpoints(plan.run)
    published = [line["step"] for line in ledger.events("checkpoint")]
    complete = checkpoints.names
    with tempfile.TemporaryDirectory() as scratch:
        damaged = [
            name for name in complete if verify_checkpoint(checkpoints.fetch(name, Path(scratch)))
        ]
    ended = in_child(lambda: train(plan, rank=0, world_size=1))
    after = Ledger.read(plan.run)
    return {
        "failpoint": failpoint,
        "seed": seed,
        "nth": nth,
        "code": code,
        "published": max(published, default=0),
        "complete": max(map(step_of, complete), default=0),
        "damaged": damaged,
        "ended": ended,
        "went_on_from": after.events("start")[-1]["step"] if after.events("start") else None,
        "steps": [line["step"] for line in after.steps] == list(range(1, NUM_STEPS + 1)),
        "hash": after.events("checkpoint")[-1]["parameter_hash"],
        "left": [entry.key for entry in plan.run.list("checkpoints/.")],
    }


def main(storage_uri: str, tokens_in: str, num_seeds: int, places: list[str]) -> None:
    torch.set_num_threads(1)  # a forked process has one thread
    checkpoint = {"save_every_steps": 2, "num_to_keep": 1}
    first = tiny_plan(
        storage_uri,
        tokens_in=tokens_in,
        num_steps=NUM_STEPS,
        train={"sample_prompts": []},
        checkpoint=checkpoint,
    )
    for seed in range(-1, num_seeds):
        for failpoint in places if seed >= 0 else ["none"]:
            config = first.config.model_copy(update={"run_id": f"{failpoint}-{seed}"})
            plan = replace(first, config=config)
            print(json.dumps(crash(plan, failpoint, seed)), flush=True)
            if (folder := plan.run.local_path("")) is not None:
                shutil.rmtree(folder)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:])

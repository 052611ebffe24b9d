"""Trains tiny runs in worlds of forked processes over gloo, whose checkpoints are in shards, and
prints lines of JSON.

python -m tests.jobs.sharded_runs STORAGE_URI TOKENS_IN FOLDER 0                     resizes one run
python -m tests.jobs.sharded_runs STORAGE_URI TOKENS_IN FOLDER NUM_SEEDS FAILPOINT …  crashes runs
of two workers
"""

import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.run.checkpoints import RunCheckpoints, checkpoint_name, step_of
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.training.attempt import Attempt
from jobs.training.train_loop import train
from model.files.checkpoint_folder import verify_checkpoint
from model.files.failpoints import VARIABLE
from raymill.phases import Phase
from raymill.state.host_copies import HostCopies, HostCopy, Take
from raymill.state.shard import Shard
from tests.jobs.runs import tiny_plan
from tests.time_limits import limit_s

NUM_STEPS = 12
STAGES: list[tuple[int, Shard, int | None]] = [
    (2, "parameters", None),
    (4, "parameters", 2),
    (1, "none", None),
    (2, "optimizer", None),
    (3, "parameters", None),
    (4, "gradients", 2),
]
"""The world at steps 1 and 2, 3 and 4, and so on; the weights' last checkpoint before each is in
other files."""

WAYS: list[Shard] = ["optimizer", "gradients", "parameters"]
"""To shard a run whose worker crashes."""

VISITS = {
    "after_lease": 1,
    "mid_delete": 3,
    "before_manifest": 6,
    "after_manifest": 6,
    "after_shard": 6,
}
"""How often a rank passes a failpoint, if that is not for each of twelve files; rank 0 alone passes
the first four."""

save = Attempt.save


def save_and_wait(
    self: Attempt, step: int, validation: dict[str, Any], *, must: bool = False
) -> None:
    """Returns once each rank knows the checkpoint to be published."""
    assert len({*self.group.gather(self.number)}) == 1, (
        "or no snapshot of several workers would be whole"
    )
    save(self, step, validation, must=must)
    name, checkpoints = checkpoint_name(step, self.generation), RunCheckpoints(self.plan.run)
    # One asks for all: the server's processor time is the test's
    while not self.group.broadcast(self.group.rank == 0 and name in checkpoints.names):
        time.sleep(0.005)


def train_world(
    plan: RunPlan,
    world_size: int,
    folder: Path,
    *,
    prepare: Callable[[int], None] = lambda rank: None,
) -> list[int]:
    """Returns the exit code of each rank."""
    meeting, children = tempfile.mktemp(dir=folder), []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            try:
                prepare(rank)
                Attempt.save = save_and_wait  # type: ignore[method-assign]
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{meeting}",
                    rank=rank,
                    world_size=world_size,
                    # Gloo may wait for a peer that has died, by itself for half an hour
                    timeout=timedelta(seconds=limit_s(60)),
                )
                train(plan, rank=rank, world_size=world_size)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def sharded(plan: RunPlan, shard: Shard, group: int | None = None, **changes: Any) -> RunPlan:
    scaling = plan.config.scaling.model_copy(update={"shard": shard, "shard_group": group})
    return replace(plan, config=plan.config.model_copy(update={"scaling": scaling}), **changes)


def note_copies(path: Path, rank: int) -> None:
    """Has a rank write down the bytes of each copy that it takes for a checkpoint."""
    start = HostCopies.start

    def noting(self: HostCopies, phase: Phase, tensors: Sequence[Tensor], take: Take) -> HostCopy:
        if phase == "checkpoint":
            with path.open("a") as file:
                print(json.dumps([rank, sum(tensor.nbytes for tensor in tensors)]), file=file)
        return start(self, phase, tensors, take)

    HostCopies.start = noting  # type: ignore[method-assign]


def resizes(plan: RunPlan, folder: Path) -> dict[str, Any]:
    """Returns the exit codes, and for each stage what its ranks copied: a rank and the bytes of one
    copy."""
    codes, copied = [], []
    for stage, (world_size, shard, group) in enumerate(STAGES, start=1):
        path = folder / f"copies-{stage}"
        changed = sharded(plan, shard, group, until=2 * stage)
        codes += train_world(changed, world_size, folder, prepare=partial(note_copies, path))
        copied.append([json.loads(line) for line in path.read_text().splitlines()])
    return {"codes": codes, "copied": copied}


def crash(plan: RunPlan, failpoint: str, seed: int, folder: Path) -> dict[str, Any]:
    """The seed decides which rank dies, and at which of its visits to the failpoint."""
    choice = random.Random(f"{failpoint} {seed}")
    dying = 0 if failpoint in [*VISITS][:4] else choice.randrange(2)
    nth = choice.randint(1, VISITS.get(failpoint, NUM_STEPS))

    def arm(rank: int) -> None:
        if rank == dying:
            os.environ[VARIABLE] = f"{failpoint}:{nth}:exit"

    saved_as = choice.choice(WAYS)
    codes = train_world(sharded(plan, saved_as), 2, folder, prepare=arm)
    checkpoints = RunCheckpoints(plan.run)
    complete = checkpoints.names
    with tempfile.TemporaryDirectory() as scratch:
        damaged = [
            name for name in complete if verify_checkpoint(checkpoints.fetch(name, Path(scratch)))
        ]
    world_size, shard, group = choice.choice(STAGES)
    ended = train_world(sharded(plan, shard, group), world_size, folder)
    after = Ledger.read(plan.run)
    return {
        "failpoint": failpoint,
        "seed": seed,
        "rank": dying,
        "nth": nth,
        "saved_as": saved_as,
        "codes": codes,
        "complete": max(map(step_of, complete), default=0),
        "damaged": damaged,
        "resumed": (world_size, shard, group),
        "ended": ended,
        "went_on_from": after.events("start")[-1]["step"],
        "steps": [line["step"] for line in after.steps] == list(range(1, NUM_STEPS + 1)),
        "hash": after.events("checkpoint")[-1]["parameter_hash"],
        "left": [entry.key for entry in plan.run.list("checkpoints/.")],
        "spooled": [str(path) for path in checkpoints.spool.glob("*")],
    }


def main(
    storage_uri: str, tokens_in: str, folder: Path, seeds: list[int], places: list[str]
) -> None:
    torch.set_num_threads(1)  # a forked process has one thread
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    first = tiny_plan(
        storage_uri,
        tokens_in=tokens_in,
        train={"precision": "bf16", "global_batch_size": 8, "max_tokens": NUM_STEPS * 8 * 32},
        checkpoint={"save_every_steps": 2, "num_to_keep": 1 if seeds else 9},
    )

    def named(run_id: str) -> RunPlan:
        return replace(first, config=first.config.model_copy(update={"run_id": run_id}))

    print(json.dumps({"codes": train_world(named("undisturbed"), 1, folder)}), flush=True)
    if not seeds:
        print(json.dumps(resizes(named("resized"), folder)), flush=True)
    for seed in seeds:
        for failpoint in places:
            print(
                json.dumps(crash(named(f"{failpoint}-{seed}"), failpoint, seed, folder)), flush=True
            )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4]), sys.argv[5:])

"""A step whose messages did not all arrive, though none failed: it is not applied, written or kept,
and no bit is lost."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from jobs.run.ledger import Ledger
from jobs.training.train_loop import train
from raymill.state.shard import Shard
from tests.jobs.runs import tiny_plan
from tests.jobs.runs_in_rounds import CutOff, run_in_rounds

pytestmark = pytest.mark.more

CUT_OFFS = [
    CutOff(1, 3, "zeros"),
    CutOff(0, 5, "stale"),
    CutOff(0, 6, "aborted"),
    CutOff(1, 7, "round"),
]


@pytest.mark.parametrize("shard", get_args(Shard))
def test_a_step_that_is_not_proven_leaves_no_trace(tmp_path: Path, shard: Shard) -> None:
    """The rank that is cut off holds what an aborted gather leaves. The other one has a whole step,
    and may write it."""
    settings: dict[str, Any] = {
        "train": {"eval_every_steps": 8},
        "checkpoint": {"save_every_steps": 2, "num_to_keep": 9},
    }
    undisturbed = tiny_plan(str(tmp_path / "undisturbed"), **settings)
    train(undisturbed, rank=0, world_size=1)
    settings["scaling"] = {"shard": shard}
    cut_offs = CUT_OFFS
    # The second gather of a step follows that of the updated weights
    if shard in ("optimizer", "gradients"):
        cut_offs = [replace(cut, number=1) for cut in CUT_OFFS if cut.rank == 0]
    plan = tiny_plan(str(tmp_path / "disturbed"), **settings)
    lines = [[line.split() for line in log] for log in run_in_rounds(plan, tmp_path, cut_offs)]
    for rank in range(2):
        attempts: list[list[list[str]]] = []
        for line in lines[rank]:
            if line[0] == "met":
                attempts.append([])
            elif line[0] in ("kept", "rescued"):
                attempts[-1].append(line)
        assert len(attempts) == 1 + len(cut_offs)
        for cut, attempt in zip(cut_offs, attempts, strict=False):
            *kept, rescued = attempt
            if cut.rank == rank:
                assert rescued[0] == "rescued"
                assert int(rescued[1]) == (cut.step - 1 if kept else 0)
                assert shard != "none" or not kept or rescued == ["rescued", *kept[-1][1:]], (
                    "as the last whole step left it"
                )
    ledgers = [Ledger.read(each.run) for each in (undisturbed, plan)]
    written = {(line["attempt"], line["step"]) for line in ledgers[1].lines if "event" not in line}
    assert {
        (attempt, cut.step) for attempt, cut in enumerate(cut_offs, 1) if cut.rank == 0
    }.isdisjoint(written)
    losses = [[line["loss"] for line in ledger.steps] for ledger in ledgers]
    assert losses[0] == losses[1]
    hashes = [ledger.events("checkpoint")[-1]["parameter_hash"] for ledger in ledgers]
    assert hashes[0] == hashes[1]

"""Workers that lose one another over NCCL: the survivors' processes live, no step is lost unseen,
and no bit differs."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("ray")  # which the other tests of this folder do without

from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from tests.jobs.runs import tiny_plan
from tests.jobs.runs_in_rounds import CutOff, run_in_rounds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each rank"),
]


def plan_in(folder: Path, *, sharded: bool) -> RunPlan:
    folder.mkdir()
    settings: dict[str, Any] = {
        "train": {"eval_every_steps": 8, "precision": "bf16", "compute": "plain"},
        "scaling": {"max_workers": 2, "use_gpu": True, "shard": "optimizer" if sharded else "none"},
        "checkpoint": {"save_every_steps": 2, "num_to_keep": 9},
    }
    return tiny_plan(str(folder), **settings)


def outcome(plan: RunPlan) -> tuple[list[float], str]:
    ledger = Ledger.read(plan.run)
    return [line["loss"] for line in ledger.steps], ledger.events("checkpoint")[-1][
        "parameter_hash"
    ]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    "cut_offs",
    [
        [CutOff(1, 5, "killed")],  # its messages of the step have arrived, or not: nobody knows
        [CutOff(0, 3, "zeros"), CutOff(1, 6, "aborted")],
    ],
    ids=["killed", "cut off"],
)
def test_survivors_live_and_the_run_ends_with_its_bits(
    tmp_path: Path, sharded: bool, cut_offs: list[CutOff]
) -> None:
    undisturbed = plan_in(tmp_path / "undisturbed", sharded=False)
    run_in_rounds(undisturbed, tmp_path / "undisturbed", [], world_size=1)
    plan = plan_in(tmp_path / "disturbed", sharded=sharded)
    logs = run_in_rounds(plan, tmp_path / "disturbed", cut_offs)
    assert outcome(plan) == outcome(undisturbed)
    met = [[line for line in log if line.startswith("met ")] for log in logs]
    assert len(met[0]) == 1 + len(cut_offs)
    assert len(set(met[0])) == 1, "the process of rank 0 was replaced"

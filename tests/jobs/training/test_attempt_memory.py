"""Nothing of an attempt is alive after it, whichever way it was left, and a worker's memory does
not grow by losses."""

import gc
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from torch import Tensor

from jobs.exact.lane_passes import LanePasses
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.training import open_attempt, train_loop
from jobs.training.train_loop import train
from raymill.state.shard import Shard
from raymill.step_timer import StepTimer
from tests.benchmarks.bench_attempt_memory import in_own_process
from tests.jobs.attempt_witness import AttemptWitness
from tests.jobs.runs import tiny_plan
from tests.jobs.runs_in_rounds import CutOff, run_in_rounds
from tests.waiting import wait_until

pytestmark = pytest.mark.more


@pytest.fixture
def witness() -> Iterator[AttemptWitness]:
    made = AttemptWitness()
    yield made
    made.close()


def alive_at_attempts(
    plan: RunPlan, folder: Path, cut_offs: Sequence[CutOff]
) -> list[tuple[int, dict[str, int]]]:
    """Trains in two processes. Returns, as each attempt of rank 0 begins, how many gradients its
    process has made, and what of those is alive."""
    logs = run_in_rounds(plan, folder, cut_offs)
    lines = [line.split(maxsplit=2) for line in logs[0] if line.startswith("alive")]
    assert Ledger.read(plan.run).events("finish")
    return [(int(number), json.loads(alive)) for _, number, alive in lines]


@pytest.mark.parametrize("shard", get_args(Shard))
def test_nothing_of_an_attempt_is_alive_after_a_loss(tmp_path: Path, shard: Shard) -> None:
    """The first attempt ends within its first step, the second within the step after, when the
    other is killed."""
    settings: dict[str, Any] = {
        "train": {"eval_every_steps": 8, "sample_prompts": []},
        "scaling": {"shard": shard},
    }
    plan = tiny_plan(str(tmp_path / "run"), num_steps=4, **settings)
    begun = alive_at_attempts(plan, tmp_path, [CutOff(0, 1, "zeros"), CutOff(1, 2, "killed")])
    assert begun == [(0, {}), (3, {}), (6, {})], (
        "two gradients of the self-test, and one of the attempt"
    )


def test_nothing_of_stock_data_parallelism_is_alive_after_a_loss(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"eval_every_steps": 8, "sample_prompts": [], "exact": False}
    plan = tiny_plan(str(tmp_path / "run"), num_steps=4, train=settings)
    begun = alive_at_attempts(plan, tmp_path, [CutOff(1, 2, "killed")])
    assert begun == [(0, {}), (3, {})]


def test_nothing_of_an_attempt_is_alive_after_a_rollback(
    tmp_path: Path, witness: AttemptWitness, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiny_plan(str(tmp_path), num_steps=6, train={"max_skipped_steps": 0})
    take, begin, alive = LanePasses.take, open_attempt.open_attempt, []

    def watched(*arguments: Any, **options: Any) -> Any:
        alive.append(witness.alive())
        return begin(*arguments, **options)

    def poisoned(
        self: LanePasses, step: int, number: int, timer: StepTimer, **options: Any
    ) -> Tensor:
        scale = float("nan") if step == 5 else 1.0
        return take(self, step, number, timer, scale=scale, **options)

    monkeypatch.setattr(train_loop, "open_attempt", watched)
    monkeypatch.setattr(LanePasses, "take", poisoned)
    train(plan, rank=0, world_size=1)
    assert len(Ledger.read(plan.run).events("rollback")) == 1
    assert alive == [{}, {}]
    gc.collect()
    assert witness.num_watched == 6
    assert not witness.alive()


def test_nothing_is_alive_of_an_attempt_that_could_not_begin(
    tmp_path: Path, witness: AttemptWitness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails once with the state alone, and once with all that a step needs."""
    plan = tiny_plan(str(tmp_path))
    threads = set(threading.enumerate())
    for name in ("open_validation_sets", "Notices"):
        with monkeypatch.context() as patch:
            patch.setattr(open_attempt, name, lambda *_: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                train(plan, rank=0, world_size=1)
        wait_until(lambda: set(threading.enumerate()) <= threads)
    gc.collect()
    assert witness.num_watched == 5
    assert not witness.alive()


@pytest.mark.slow  # the tests above prove it by what is alive
def test_resident_memory_is_flat_over_losses() -> None:
    """Where autograd's hooks hold the sums, as this shows too, a loss leaves twice the weights and
    more."""
    growth = {}
    for strong in (False, True):
        memory = in_own_process(num_losses=4, strong=strong)
        print(memory)
        first, *_, last = memory.resident_mb
        growth[strong] = (last - first) / 3
    assert growth[False] < memory.parameters_mb / 3
    assert growth[True] > 2 * memory.parameters_mb

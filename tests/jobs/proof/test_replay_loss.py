"""The steps around a lost worker, taken again without the loss, have the ledger's bits; a changed
bit is named, and a run that lost nothing is refused."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from cluster.storage.uris import Storage, open_storage
from jobs.proof.replay_loss import replay_around_loss, steps_around_loss
from jobs.run.ledger import Ledger
from jobs.training.train_loop import train
from raymill.errors import UserError
from tests.jobs.runs import tiny_plan, trained_run
from tests.jobs.tampering import change_line

START = {"event": "start", "attempt": 1, "world_size": 2, "step": 0}


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of a run of eight steps whose first attempt ended after step 5, with a checkpoint
    of step 3."""
    folder = tmp_path_factory.mktemp("storage")
    plan = tiny_plan(str(folder))
    train(dataclasses.replace(plan, until=5), rank=0, world_size=1)
    train(plan, rank=0, world_size=1)
    return folder


@pytest.fixture
def run(disturbed: Path, tmp_path: Path) -> Storage:
    """A copy, to be spoiled."""
    shutil.copytree(disturbed, tmp_path / "copy")
    return open_storage(str(tmp_path / "copy")).child("runs/tiny")


def test_the_steps_from_checkpoint_to_checkpoint_have_the_same_bits(run: Storage) -> None:
    hashes = {
        event["step"]: event["parameter_hash"] for event in Ledger.read(run).events("checkpoint")
    }
    steps, result = replay_around_loss(run)
    assert (result.equal, steps, result.workers) == (True, range(4, 7), 1)
    assert result.parameter_hash == hashes[6]


def test_a_changed_bit_is_named(run: Storage) -> None:
    loss = Ledger.read(run).steps[5]["loss"]
    change_line(run, 6, loss=loss * (1 + 1e-15))
    _, result = replay_around_loss(run)
    assert (result.equal, result.step) == (False, 6)
    assert result.verdict.startswith("bits part at step 6")


def test_a_run_that_lost_nothing_is_refused(tmp_path: Path) -> None:
    run = trained_run(str(tmp_path)).run
    with pytest.raises(UserError, match="lost no worker between two of its steps"):
        replay_around_loss(run)


def ledger(*, resumed_at: int, lost_after: int) -> Ledger:
    """Returns the lines of a run that lost a worker after a step and was resumed at another one."""
    lines = [START]
    lines += [{"step": step, "time": float(step)} for step in range(1, lost_after + 1)]
    lines += [START | {"attempt": 2, "step": resumed_at}]
    lines += [{"step": step, "time": step + 9.0} for step in range(resumed_at + 1, 31)]
    return Ledger(lines)


@pytest.mark.parametrize(
    ("resumed_at", "lost_after", "kept_steps", "steps"),
    [
        (13, 13, (5, 10, 15), range(11, 16)),  # the whole state was in another node's memory
        (10, 14, (5, 10, 15), range(11, 16)),  # four steps were taken twice
        (10, 10, (5, 10, 15), range(11, 16)),
        (13, 13, (5, 15), range(6, 16)),  # an older checkpoint is the newest one that is left
        (3, 3, (15,), range(1, 6)),
    ],
)
def test_steps_begin_after_a_kept_checkpoint_and_end_with_a_hash(
    resumed_at: int, lost_after: int, kept_steps: tuple[int, ...], steps: range
) -> None:
    lines = ledger(resumed_at=resumed_at, lost_after=lost_after)
    hashed_steps = (5, 10, 15, 20, 30)
    assert steps_around_loss(lines, kept_steps=kept_steps, hashed_steps=hashed_steps) == steps


def test_steps_are_none_without_a_loss_or_without_a_hash_after_it() -> None:
    lost = ledger(resumed_at=13, lost_after=13)
    assert steps_around_loss(lost, kept_steps=(5, 10), hashed_steps=(5, 10)) is None
    whole = Ledger([START, {"step": 1, "time": 1.0}])
    assert steps_around_loss(whole, kept_steps=(), hashed_steps=(1,)) is None

"""Steps taken again have the ledger's bits, on one worker and on two; where they do not, the step
is named."""

from pathlib import Path

import pytest

from cluster.settings.parser import ConfigError
from cluster.storage.uris import Storage
from jobs.proof.replay_run import parse_steps, replay
from jobs.run.ledger import Ledger
from raymill.errors import UserError
from tests.jobs.tampering import change_line, change_setting, checkpoint_folder, flip_byte


@pytest.mark.parametrize(
    ("steps", "checkpoint", "hashes"),
    [(range(1, 9), None, 3), (range(3, 4), None, 1), (range(4, 6), 3, 0), (range(7, 9), 6, 1)],
)
def test_bits_are_equal(run: Storage, steps: range, checkpoint: int | None, hashes: int) -> None:
    before = run.read_bytes("ledger.jsonl")
    result = replay(run, steps=steps)
    assert (result.equal, result.verdict) == (
        True,
        f"bits equal for steps {steps[0]}..{steps[-1]}",
    )
    assert (result.from_checkpoint or "").startswith(
        "" if checkpoint is None else f"step-{checkpoint:09d}"
    )
    assert (result.from_checkpoint is None) == (checkpoint is None)
    assert result.hashes == hashes
    assert run.read_bytes("ledger.jsonl") == before, "the run itself is not touched"


def test_bits_are_equal_on_two_workers(run: Storage) -> None:
    result = replay(run, steps=range(5, 9), num_workers=2)
    assert (result.equal, result.workers, result.hashes) == (True, 2, 2)


def test_a_changed_learning_rate_is_found_at_its_first_step(run: Storage) -> None:
    change_setting(run, learning_rate=1.1e-2)
    result = replay(run, steps=range(4, 9))
    assert (result.equal, result.step) == (False, 4)
    assert list(result.fields) == ["lr"], "the loss of step 4 is that of the checkpoint's weights"


def test_a_changed_order_of_samples_is_found_at_its_first_step(run: Storage) -> None:
    change_setting(run, shuffle_window_rows=7)
    result = replay(run, steps=range(4, 9))
    assert (result.equal, result.step) == (False, 4)
    assert result.fields.keys() == {"loss", "grad_norm"}


def test_a_changed_seed_is_found_at_its_first_step(run: Storage) -> None:
    change_setting(run, seed=1)
    assert replay(run, steps=range(7, 9)).step == 7


@pytest.mark.parametrize("field", ["loss", "grad_norm", "lr"])
def test_a_ledger_that_was_changed_is_found(run: Storage, field: str) -> None:
    line = Ledger.read(run).steps[5]
    change_line(run, 6, **{field: line[field] * (1 + 1e-15)})
    result = replay(run, steps=range(4, 9))
    assert (result.equal, result.step, list(result.fields)) == (False, 6, [field])


def test_a_damaged_checkpoint_is_passed_over(run: Storage) -> None:
    flip_byte(checkpoint_folder(run, 6) / "model.safetensors")
    result = replay(run, steps=range(7, 9))
    assert result.equal
    assert (result.from_checkpoint or "").startswith("step-000000003")


def test_what_cannot_be_taken_again_is_said(run: Storage, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"steps 5\.\.12 are not in the ledger of .*, which has 1\.\.8"
    ):
        replay(run, steps=range(5, 13))
    with pytest.raises(ConfigError, match="the run has 2 lanes"):
        replay(run, steps=range(5, 7), num_workers=3)
    ledger = Ledger.read(run)
    for text, steps in {
        "..": range(1, 9),
        "3": range(3, 4),
        "3..": range(3, 9),
        "2..4": range(2, 5),
    }.items():
        assert parse_steps(text, ledger) == steps
    for text in ("", "4..2", "0..3", "a..b", "1..2..3", "1-5"):
        with pytest.raises(ConfigError, match=r"expected A\.\.B"):
            parse_steps(text, ledger)

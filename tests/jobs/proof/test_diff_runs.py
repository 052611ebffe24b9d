"""Two runs are equal, or the first step where they part is named, with its fields."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.storage.uris import Storage, open_storage
from jobs.proof.diff_runs import Difference, diff, first_difference, step_values
from jobs.run.ledger import Ledger
from jobs.training.train_loop import train
from tests.jobs.runs import tiny_plan
from tests.jobs.tampering import change_line


def trained(folder: Path, **settings: Any) -> Storage:
    plan = tiny_plan(str(folder), train={"sample_prompts": [], **settings})
    train(plan, rank=0, world_size=1)
    return plan.run


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return trained(tmp_path_factory.mktemp("usual"))


def test_a_run_and_its_repetition_are_equal(usual: Storage, tmp_path: Path) -> None:
    result = diff(usual, trained(tmp_path, eval_every_steps=3, layer_statistics_every_steps=2))
    assert (result.verdict, result.equal, result.settings) == (
        "equal for 8 steps",
        True,
        {},
    )


@pytest.mark.parametrize(
    ("settings", "step", "field"),
    [
        ({"learning_rate": 2e-2}, 1, "lr"),
        ({"seed": 1}, 1, "loss"),
        ({"shuffle_window_rows": 7}, 1, "loss"),
        ({"weight_decay": 0.3}, 2, "loss"),  # the first loss is the same weights'
        ({"warmup_tokens": 3 * 4 * 32}, 1, "lr"),
        ({"decay_tokens": 16 * 4 * 32}, 1, "lr"),
    ],
)
def test_the_step_and_field_where_settings_part_runs(
    usual: Storage, tmp_path: Path, settings: dict[str, Any], step: int, field: str
) -> None:
    result = diff(usual, trained(tmp_path, **settings))
    assert (result.equal, result.step, next(iter(result.fields))) == (False, step, field)
    assert list(result.settings) == [f"train.{next(iter(settings))}"]
    assert next(iter(settings)) in result.verdict


def test_another_batch_is_found_in_the_sample_range(usual: Storage, tmp_path: Path) -> None:
    result = diff(usual, trained(tmp_path, global_batch_size=2))
    assert (result.step, next(iter(result.fields))) == (1, "samples")


@pytest.mark.parametrize("step", [1, 5, 8])
def test_a_changed_line_is_found_at_its_step(usual: Storage, tmp_path: Path, step: int) -> None:
    shutil.copytree(Path(usual.uri), tmp_path / "runs/tiny")
    copy = open_storage(str(tmp_path)).child("runs/tiny")
    change_line(copy, step, loss=Ledger.read(usual).steps[step - 1]["loss"] + 1e-9)
    result = diff(usual, copy)
    assert (result.step, list(result.fields), result.equal_steps) == (
        step,
        ["loss"],
        step - 1,
    )


def test_a_difference_is_a_table_with_a_column_for_each_run(usual: Storage, tmp_path: Path) -> None:
    """Its figures have nine digits, by which two numbers in fp32 are told apart."""
    shown = diff(usual, trained(tmp_path, learning_rate=2e-2)).text().splitlines()
    rows = [line.split() for line in shown]
    assert ["fields", "first", "run", "second", "run"] in rows
    assert ["train.learning_rate", "0.01", "0.02"] in rows
    [rates] = [row[1:] for row in rows if row[:1] == ["lr"]]
    assert len(rates) == 2 and rates[0] != rates[1]
    assert all(len(rate.lstrip("0.")) <= 9 for rate in rates)
    assert not any(mark in line for line in shown for mark in "()[]{}'")


def line(step: int, **fields: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 1.0,
        "lr": 0.1,
        "time": 1.0,
        "world_size": 1,
        "attempt": 1,
    } | fields


def test_of_the_lines_of_a_step_the_last_counts() -> None:
    a = Ledger([line(1), line(2, loss=9.0), line(2, world_size=3, attempt=2, time=5.0), line(3)])
    b = Ledger([line(1), line(2), line(3)])
    assert first_difference(step_values(a), step_values(b), steps=[1, 2, 3]) is None


def test_hashes_and_skips_and_rollbacks_are_compared() -> None:
    saved = {"event": "checkpoint", "step": 2, "parameter_hash": "aa"}
    a, b = [line(1), line(2), saved], [line(1), line(2), saved | {"parameter_hash": "bb"}]
    found = first_difference(step_values(Ledger(a)), step_values(Ledger(b)), steps=[1, 2])
    assert found == Difference(2, {"parameter_hash": ("aa", "bb")})
    hashed = [line(1), line(2, parameter_hash="aa")]
    assert (
        first_difference(step_values(Ledger(hashed)), step_values(Ledger(a)), steps=[1, 2]) is None
    )
    skipped = [line(1), {"event": "skip", "step": 2, "samples": [4, 8], "reason": "loss nan"}]
    found = first_difference(step_values(Ledger(skipped)), step_values(Ledger(a)), steps=[1, 2])
    assert found == Difference(2, {"skipped": (True, False)})
    way = {"event": "corruption", "step": 4, "attempt": 1, "generation": 1, "to_step": 1}
    window = {"event": "rollback", "first": 2, "last": 3}
    undone = Ledger([line(1), line(2), line(3), window, way, line(2), line(3), saved])
    assert list(step_values(undone)) == [1, 2, 3], "what a wrong worker led to does not count"
    rolled = Ledger(
        [line(1), line(2), line(3), {"event": "rollback", "first": 2, "last": 3}, line(4)]
    )
    assert list(step_values(rolled)) == [1, 4]
    assert first_difference(
        step_values(Ledger(a)), step_values(rolled), steps=[1, 2]
    ) == Difference(2, {"step": (2, None)})

"""What a newcomer mistypes is answered in one line: what was wrong, what was expected, what to do,
and nothing else."""

import json
from pathlib import Path

import pytest

from cluster.cli import main

TEXT = ["pretrain", "--data.source", "text.txt"]

MISTAKES: dict[str, tuple[list[str], list[str], list[str]]] = {
    "a command": (
        ["pretrian"],
        ["unknown command pretrian", "did you mean pretrain?"],
        ["choose from", "invalid choice"],
    ),
    "lr": ([*TEXT, "--lr", "1e-3"], ["--lr", "did you mean train.learning_rate?"], ["--help?"]),
    "train.lr": (
        [*TEXT, "--train.lr", "1e-3"],
        ["did you mean train.learning_rate?"],
        ["train.seed"],
    ),
    "train.steps": (
        [*TEXT, "--train.steps", "9"],
        ["train.max_tokens", "`raymill plan` says"],
        ["train.seed"],
    ),
    "batch size": ([*TEXT, "--train.batch-size", "8"], ["train.global_batch_size"], ["micro"]),
    "a number": (
        [*TEXT, "--train.max-tokens", "20X"],
        ["a whole number, such as 20000000, 20M or 1e6"],
        ["integer"],
    ),
    "bytes": (
        [*TEXT, "--data.shard-bytes", "64 miles"],
        ["(of bytes: 64MiB, 2GB)", "'64 miles'"],
        ["integer"],
    ),
    "an ending": (
        [*TEXT, "--data.text-endings", "md"],
        ["expected an ending, such as .md"],
        ["pattern", "match"],
    ),
    "an ending that is read": (
        [*TEXT, "--data.text-endings", ".csv"],
        [".csv is read already"],
        ["Value error"],
    ),
    "a text for a section": (
        ["pretrain", "data.yaml"],
        ["data: expected `name: value` lines", "source"],
        ["dictionary"],
    ),
    "a run id": (
        [*TEXT, "--run-id", "my run"],
        ["letters, digits", "at most 64", "'my run'"],
        ["^[A-Z", "pattern"],
    ),
    "indentation": (
        ["pretrain", "indent.yaml"],
        ["line 3, column 8, at 'seed: 1'", "indented like"],
        ["mapping values"],
    ),
    "a tab": (["pretrain", "tab.yaml"], ["line 2, column 1: a tab; indent by spaces"], ["token"]),
    "workers": (
        [*TEXT, "--scaling.max-workers", "64"],
        ["scaling.max_workers=64", "8 lanes", "lower it, or raise train.global_batch_size"],
        [],
    ),
    "steps to replay": (
        ["replay", "begun", "--steps", "1-5"],
        ["--steps 1-5: expected A..B, such as 1..20"],
        ["completed"],
    ),
    "a source": (
        ["pretrain", "--data.source", "nowhere"],
        ["data.source: nothing is at", "check the path"],
        ["looked for"],
    ),
    "a preset": (
        [*TEXT, "--model.preset", "demo-lama"],
        ["preset 'demo-lama' is unknown, did you mean demo-llama?"],
        ["Value error"],
    ),
    "a configuration": (
        ["pretrain", "none.yaml"],
        ["cannot read the configuration none.yaml"],
        ["Errno"],
    ),
}


@pytest.fixture
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("to be or not to be\n" * 100)
    Path("data.yaml").write_text("data: libtxt\n")
    Path("indent.yaml").write_text("train:\n  max_tokens: 5\n   seed: 1\n")
    Path("tab.yaml").write_text("train:\n\tmax_tokens: 5\n")
    run = Path(".raymill/runs/begun")
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("model: {preset: tiny}\n")
    (run / "ledger.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")


@pytest.mark.usefixtures("_folder")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_what_was_expected(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, words, misleading = MISTAKES[name]
    assert main(argv) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [word for word in words if word not in error] == [], error
    assert [word for word in misleading if word in error] == [], error


@pytest.mark.usefixtures("_folder")
def test_a_replay_of_a_run_without_a_step_says_that_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path(".raymill/runs/begun/ledger.jsonl").write_text("")
    assert main(["replay", "begun", "--steps", "1..5"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "has no completed step yet" in error and "A..B" not in error

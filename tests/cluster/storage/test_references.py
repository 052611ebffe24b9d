"""A run's id and `run@step` name checkpoints, in every command that takes one."""

import json
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.settings.flags import settled, validate_config
from cluster.settings.run import RunConfig
from cluster.settings.stages import EvaluateConfig
from cluster.storage.references import checkpoint_uri
from cluster.storage.registry import named_checkpoint, publications
from cluster.storage.uris import open_storage
from raymill.errors import CheckpointError
from tests.checkpoints import write_tiny


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A storage with a run that took steps 10 and 20, the latter twice."""
    for step, attempt in ((10, 1), (20, 1), (20, 2)):
        write_tiny(
            tmp_path / f"store/runs/first/checkpoints/step-{step:09d}-{attempt:04d}",
            step=step,
            run_id="first",
        )
    return tmp_path / "store"


def test_a_word_is_a_run_or_a_step_of_one(root: Path) -> None:
    folder = root / "runs/first/checkpoints"
    newest, of_step_10 = folder / "step-000000020-0002", folder / "step-000000010-0001"
    assert named_checkpoint(checkpoint_uri("first", str(root)), str(root)) == str(newest)
    assert checkpoint_uri("first@10", str(root)) == str(of_step_10)
    assert checkpoint_uri("first@20", str(root)) == str(newest)
    assert checkpoint_uri("latest", str(root)) == "latest"
    assert checkpoint_uri("s3://b/c", str(root)) == "s3://b/c"
    assert checkpoint_uri("second", str(root)) == str(Path.cwd() / "second"), (
        "neither a run nor here"
    )
    with pytest.raises(
        CheckpointError, match="has no checkpoint of step 15; it has those of steps 10, 20"
    ):
        checkpoint_uri("first@15", str(root))
    with pytest.raises(
        CheckpointError,
        match="step-99: no folder with files is there; beside it are step-000000010-0001",
    ):
        named_checkpoint(str(folder / "step-99"), str(root))


def test_a_folder_here_is_meant_before_a_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "first").mkdir()
    monkeypatch.chdir(root)
    assert checkpoint_uri("first", str(root)) == str(root / "first")


def test_settings_take_it(root: Path) -> None:
    storage = {"uri": str(root)}
    evaluation = validate_config({"checkpoint": "first@10", "storage": storage}, EvaluateConfig)
    assert settled(evaluation).checkpoint.endswith("checkpoints/step-000000010-0001")
    run = validate_config({"train": {"init_from": "first"}, "storage": storage}, RunConfig)
    assert settled(run).train.init_from == str(root / "runs/first")


def test_commands_take_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--storage.uri", str(root), "--json"]
    assert main(["checkpoint", "show", "first@10", *where]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (shown["valid"], shown["step"]) == (True, 10)
    assert main(["checkpoint", "show", "first", *where]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == 20
    assert main(["publish", "first@10", *where]) == 0
    assert [published.step for published in publications(open_storage(str(root)))] == [10]
    assert main(["publish", "nobody", *where]) == 1
    assert "unknown checkpoint" in capsys.readouterr().err


def test_a_folder_of_transformers_is_a_checkpoint_whatever_lies_below_it(tmp_path: Path) -> None:
    """A run that begins from `.` stores its tokens there too."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / ".raymill/tokens/a").mkdir(parents=True)
    (tmp_path / ".raymill/tokens/a/manifest.json").write_text("{}")
    assert named_checkpoint(str(tmp_path), str(tmp_path / ".raymill")) == str(tmp_path)

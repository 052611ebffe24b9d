"""`raymill init` writes a file that is valid, whose comments are the settings' own help, and that a
run takes."""

import json
from argparse import SUPPRESS
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import command_parser, main
from cluster.settings.flags import read_config
from cluster.settings.run import RunConfig, max_steps


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def dotted(values: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{branch}.{name}": value
        for branch, settings in values.items()
        for name, value in settings.items()
    }


def comments(text: str) -> dict[str, str]:
    """Returns the comment above each setting of the file, as one line, by the setting's dotted
    name."""
    result, section, words = {}, "", list[str]()
    for line in text.splitlines():
        name, _, value = line.strip().partition(":")
        if line.startswith("  # "):
            words.append(line.removeprefix("  # "))
        elif line.startswith("  "):
            result[f"{section}.{name}"] = " ".join(words)
            words = []
        elif line and not line.startswith("#"):
            section = name
            assert value == ""
    return result


def manual() -> dict[str, str]:
    """Returns what `raymill pretrain --help` says of each setting."""
    parser = command_parser(["pretrain"])
    (commands,) = [action for action in parser._actions if isinstance(action.choices, dict)]
    actions = commands.choices["pretrain"]._actions  # type: ignore[index]
    return {action.dest: str(action.help) for action in actions if action.help != SUPPRESS}


def test_the_file_is_valid_and_each_comment_is_the_settings_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["init"]) == 0
    said = capsys.readouterr()
    assert said.out.split() == ["file", "run.yaml"]
    assert said.err.startswith("next: set data.source in run.yaml, then `raymill plan run.yaml`")
    text = Path("run.yaml").read_text()
    config = read_config(Path("run.yaml"), RunConfig)
    written = dotted(yaml.safe_load(text))
    everything = dotted(
        {name: vars(value) for name, value in config if not isinstance(value, str | None)}
    )
    assert written.keys() - {"model.preset"} <= everything.keys()
    assert all(
        everything[path] == value for path, value in written.items() if path != "model.preset"
    )
    assert {
        "data.source",
        "train.max_tokens",
        "train.global_batch_size",
        "storage.uri",
    } <= written.keys()
    assert comments(text) == {path: manual()[path] for path in written}
    assert max_steps(config) > 1000


def test_a_file_that_is_there_stays(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("model: {preset: tiny}\n")
    assert main(["init", "mine.yaml"]) == 1
    assert capsys.readouterr().err.startswith("error: mine.yaml is there already")
    assert Path("mine.yaml").read_text() == "model: {preset: tiny}\n"
    assert main(["init", "nowhere/run.yaml"]) == 1
    assert (
        capsys.readouterr().err
        == "error: cannot write nowhere/run.yaml: No such file or directory\n"
    )


def test_a_run_takes_the_file_once_it_names_a_corpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "run.yaml"]) == 0
    assert main(["submit", "pretrain", "run.yaml", "--dry-run"]) == 2
    assert "error: data.source is empty" in capsys.readouterr().err
    Path("texts").mkdir()
    Path("texts/a.jsonl").write_text('{"text": "to be or not to be"}\n' * 100)
    text = Path("run.yaml").read_text()
    Path("run.yaml").write_text(text.replace("source: []", "source: texts/*.jsonl"))
    assert main(["submit", "pretrain", "run.yaml", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["admitted"] is True

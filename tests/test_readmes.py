"""The READMEs are true: the program takes every command in them, and every link, folder and file
exists.

`e2e/test_readme.py` runs the commands.
"""

import argparse
import json
import re
from pathlib import Path

import pytest

from cluster.cli import command_parser
from cluster.settings.code_folders import CODE_FOLDERS
from tests.drawings.processes_picture import PICTURE, draw
from tests.readmes import READMES, Command, all_commands, blocks_of_commands
from tests.repository import REPOSITORY

PARSER = command_parser()
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def place(command: Command) -> str:
    return command.place


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def command_names() -> set[str]:
    """Returns all commands, also those of two words."""
    names = set()
    for name, parser in subcommands(PARSER).items():
        names |= {f"{name} {inner}" for inner in subcommands(parser)} or {name}
    return names


@pytest.mark.parametrize("command", all_commands("raymill"), ids=place)
def test_each_command_is_taken_as_it_stands(command: Command) -> None:
    PARSER.parse_args(command.words[1:])


ASKING = [
    (serve, curl)
    for block in blocks_of_commands(REPOSITORY / "README.md")
    for serve in block
    if serve.program == "raymill" and serve.words[1] == "serve"
    for curl in block
    if curl.program == "curl"
]


@pytest.mark.parametrize(("serve", "curl"), ASKING, ids=lambda command: command.place)
def test_each_curl_asks_for_the_model_that_is_served_above_it(
    serve: Command, curl: Command
) -> None:
    assert len(ASKING) == 2
    arguments = PARSER.parse_args(serve.words[1:])
    body = json.loads(curl.words[curl.words.index("-d") + 1])
    assert body["model"] == arguments.model_name
    assert curl.words[1].startswith(f"http://127.0.0.1:{arguments.port}/v1/")
    assert ("$(cat key)" in curl.line) == (arguments.api_key_file == "key")


@pytest.mark.parametrize("command", all_commands("make"), ids=place)
def test_each_target_is_one_of_the_makefile(command: Command) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert set(command.words[1:]) <= targets


@pytest.mark.parametrize("command", all_commands("kubectl"), ids=place)
def test_each_manifest_that_is_to_be_applied_is_there(command: Command) -> None:
    for folder in [word for word in command.words if word.startswith("k8s/")]:
        assert (REPOSITORY / folder / "kustomization.yaml").is_file()


def test_the_table_has_every_command() -> None:
    text = (REPOSITORY / "cluster" / "guide.md").read_text()
    rows = [row.split(" | ")[0] for row in re.findall(r"^\| `raymill (.*)", text, re.MULTILINE)]
    words = {word for row in rows for word in re.findall(r"[a-z-]+", row)}
    missing = {name for name in command_names() if not set(name.split()) <= words}
    assert not missing, f"not in the table of cluster/guide.md: {sorted(missing)}"


def setting_names() -> set[str]:
    """Returns the settings of all commands, as a YAML file has them."""
    parsers = list(subcommands(PARSER).values())
    options = {
        option
        for parser in parsers
        for action in parser._actions
        for option in action.option_strings
    }
    return {option.removeprefix("--").replace("-", "_") for option in options if "." in option}


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_each_setting_that_is_named_exists(readme: Path) -> None:
    names = setting_names()
    # Which begins file names, too
    sections = "|".join({name.split(".")[0] for name in names} - {"model"})
    assert {"train.exact", "data.source", "replicas.max_replicas"} <= names
    named = re.findall(rf"(?<![\w/.-])(?:{sections})\.[a-z_]{{3,}}\b(?![(/.-])", readme.read_text())
    assert {name for name in named if name not in names} == set()


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_each_link_leads_somewhere(readme: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", readme.read_text())
    gone = [link for link in links if "://" not in link and not (readme.parent / link).exists()]
    assert not gone


def test_the_tree_names_every_folder_of_code_and_no_other() -> None:
    [tree] = re.findall(r"^## The tree\n+```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    named: set[str] = set()
    path: list[str] = []
    for indent, name in re.findall(r"^( *)([\w.]+)/ ", tree, re.MULTILINE):
        path = [*path[: len(indent) // 2], name]
        named.add("/".join(path))
    there = {
        path.parent.relative_to(REPOSITORY).as_posix()
        for folder in CODE_FOLDERS
        for path in (REPOSITORY / folder).rglob("__init__.py")
    }
    assert len(there) > 25
    assert named - {"k8s", "tests"} == there


def test_what_to_read_first_is_there() -> None:
    [words] = re.findall(r"^\*\*Read first\*\*(.*)", README, re.MULTILINE | re.DOTALL)
    paths = [REPOSITORY / link for link in re.findall(r"\]\(([\w/.]+)\)", words)]
    assert len(paths) > 10 and all(path.exists() for path in paths)


def test_the_root_readme_is_read_in_five_minutes() -> None:
    assert README.count("\n") < 250


def test_the_picture_of_the_processes_is_the_one_that_the_code_draws() -> None:
    assert PICTURE.read_text(encoding="utf-8") == draw(), "`make pictures` draws it again"
    assert f"]({PICTURE.relative_to(REPOSITORY)})" in README

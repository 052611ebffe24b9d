"""The READMEs say what is: every command in them is one that the program takes, every link and file is there.

`e2e/test_readme.py` runs the commands.
"""

import argparse
import re
from pathlib import Path

import pytest

from cluster.cli import command_parser
from tests.readmes import READMES, Command, all_commands
from tests.repository import REPOSITORY

PACKAGES = ("model", "cluster", "jobs", "serving")
PARSER = command_parser()


def place(command: Command) -> str:
    return command.place


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def command_names() -> set[str]:
    """All commands, those of two words too."""
    names = set()
    for name, parser in subcommands(PARSER).items():
        names |= {f"{name} {inner}" for inner in subcommands(parser)} or {name}
    return names


@pytest.mark.parametrize("command", all_commands("raymill"), ids=place)
def test_each_command_is_taken_as_it_stands(command: Command) -> None:
    PARSER.parse_args(command.words[1:])


@pytest.mark.parametrize("command", all_commands("make"), ids=place)
def test_each_target_is_one_of_the_makefile(command: Command) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert set(command.words[1:]) <= targets


@pytest.mark.parametrize("command", all_commands("kubectl"), ids=place)
def test_each_manifest_that_is_to_be_applied_is_there(command: Command) -> None:
    for folder in [word for word in command.words if word.startswith("k8s/")]:
        assert (REPOSITORY / folder / "kustomization.yaml").is_file()


def test_the_table_has_every_command() -> None:
    text = (REPOSITORY / "README.md").read_text()
    rows = [row.split(" | ")[0] for row in re.findall(r"^\| `raymill (.*)", text, re.MULTILINE)]
    words = {word for row in rows for word in re.findall(r"[a-z-]+", row)}
    missing = {name for name in command_names() if not set(name.split()) <= words}
    assert not missing, f"not in the table of README.md: {sorted(missing)}"


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_each_link_leads_somewhere(readme: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", readme.read_text())
    gone = [link for link in links if "://" not in link and not (readme.parent / link).exists()]
    assert not gone


def test_the_tree_names_every_module_and_no_other() -> None:
    [tree] = re.findall(
        r"^## The tree\n+```\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    there = {path.name for package in PACKAGES for path in (REPOSITORY / package).glob("*.py")} - {"__init__.py"}
    assert there
    assert named == there, f"missing: {sorted(there - named)}, gone: {sorted(named - there)}"

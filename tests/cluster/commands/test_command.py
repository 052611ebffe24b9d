"""The records of commands: what each reads is what its command line takes, and nothing is written
into it."""

import importlib
import json
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

from cluster.cli import COMMANDS, SECTIONS, main
from cluster.commands.arguments import CONFIG, CONFIG_FLAG, RUN_ID, STORAGE
from cluster.commands.command import Argument, Arguments, Command, OneOf, Result, Switch
from tests.repository import REPOSITORY

MODULES = {
    path.stem: importlib.import_module(f"cluster.commands.{folder}{path.stem}")
    for folder in ("", "wings.")
    for path in (REPOSITORY / "cluster/commands" / folder.rstrip(".")).glob("*.py")
    if path.stem != "__init__"
}


def accepted(command: Command) -> set[Argument[Any]]:
    """Returns the arguments of the command's line that may have more than one value."""
    arguments = set()
    for argument in command.arguments:
        arguments |= set(argument.arguments) if isinstance(argument, OneOf) else {argument}
    is_always_set = {
        argument for argument in arguments if isinstance(argument, Switch) and argument.required
    }
    return {argument for argument in arguments - is_always_set if isinstance(argument, Argument)}


def codes(code: CodeType) -> Iterator[CodeType]:
    """Yields the code and that of the functions and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def read(function: FunctionType, seen: set[FunctionType]) -> set[Argument[Any]]:
    """Returns the arguments that the function reads, and those that it calls in this folder."""
    seen.add(function)
    names = {name for code in codes(function.__code__) for name in code.co_names}
    known = dict(function.__globals__)
    for module in names & MODULES.keys():
        known |= vars(MODULES[module])
    result = set()
    for name in names:
        value = known.get(name)
        if isinstance(value, Argument):
            result.add(value)
        elif (
            isinstance(value, FunctionType)
            and value.__module__.startswith("cluster.commands.")
            and value not in seen
        ):
            result |= read(value, seen)
    return result


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_command_reads_the_arguments_that_it_takes_and_no_others(command: Command) -> None:
    assert isinstance(command.run, FunctionType)
    # Which `Arguments.config` reads
    assert read(command.run, set()) == accepted(command) - {CONFIG, CONFIG_FLAG}


def test_an_argument_that_is_read_and_not_taken_would_be_seen() -> None:
    def run(arguments: Arguments) -> Result:
        return Result({"run_id": arguments[RUN_ID]})

    command = Command("nothing", "nothing", run, [STORAGE])
    assert isinstance(run, FunctionType)
    assert read(run, set()) != accepted(command)


def test_each_command_and_each_group_has_one_record() -> None:
    names = [command.name for command in COMMANDS]
    assert len(names) == len(set(names)) > 40
    firsts = {name.partition(" ")[0] for name in names if " " in name}
    groups = [group for section in SECTIONS for group in section.groups]
    assert sorted(groups) == sorted(firsts)


def test_nothing_is_written_into_a_command_line() -> None:
    arguments = Arguments(("list",), is_json=False, values={})
    with pytest.raises(FrozenInstanceError):
        arguments.words = ()  # type: ignore[misc]
    with pytest.raises(TypeError):
        arguments[RUN_ID] = "x"  # type: ignore[index]


def test_a_result_is_lines_or_its_text_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    lines, text = Result({"step": 3}), Result({"step": 3}, text="three\n")
    Arguments((), is_json=False, values={}).show(lines)
    Arguments((), is_json=False, values={}).show(text)
    Arguments((), is_json=True, values={}).show(text)
    assert capsys.readouterr().out == 'step  3\nthree\n{"step": 3}\n'


def test_a_preset_over_a_files_numbers_is_told_by_each_command_that_reads_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"model": {"preset": "tiny", "n_layer": 9}}))
    assert main(["inspect", str(path), "--shapes", "--model.preset", "demo"]) == 0
    assert (
        capsys.readouterr().err
        == f"model.n_layer: 9 of {path} stays, with the rest of --model.preset demo\n"
    )

"""What the product tells a person to type can be typed: commands in messages, hints and help, and
lines of pip in code and documents."""

import ast
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from cluster.cli import COMMANDS, command_parser
from cluster.settings.code_folders import CODE_FOLDERS
from model.tables import pip_line, read_table
from raymill.errors import UserError
from tests.readmes import READMES
from tests.reference.markdown import template
from tests.repository import REPOSITORY

_PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = _PYPROJECT["project"]["optional-dependencies"]
NAMES = {command.name for command in COMMANDS}
FIRST_WORDS = {name.partition(" ")[0] for name in NAMES}


@dataclass(frozen=True)
class Typed:
    """A line that a text tells a person to type, and its place."""

    line: str
    place: str


def texts_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields each text of a module that is no docstring, with `…` where a value is put in."""
    parts: set[ast.AST] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Module() | ast.ClassDef() | ast.FunctionDef() if ast.get_docstring(node):
                parts.update(ast.walk(node.body[0]))
            case ast.JoinedStr() | ast.BinOp() | ast.Constant() if node not in parts:
                parts.update(ast.walk(node))
                yield getattr(node, "lineno", 0), template(node)


@cache
def told() -> tuple[Typed, ...]:
    """Returns the commands that the code and its tables name in backticks or as a whole text."""
    lines = []
    for folder in CODE_FOLDERS:
        for path in sorted((REPOSITORY / folder).rglob("*")):
            place = str(path.relative_to(REPOSITORY))
            if path.suffix == ".toml":
                texts = [(0, path.read_text(encoding="utf-8"))]
            elif path.suffix == ".py":
                texts = [*texts_of(ast.parse(path.read_text(encoding="utf-8")))]
            else:
                continue
            for number, text in texts:
                found = re.findall(r"`(raymill [\w-][^`]*|pip [^`]+)`", text)
                begun = re.match(r"raymill ([\w-]+)", text)
                whole = [text] if begun and begun[1] in FIRST_WORDS else []
                lines += [Typed(line, f"{place}:{number}") for line in found or whole]
    return tuple(lines)


def of_program(program: str) -> list[Typed]:
    return [typed for typed in told() if typed.line.startswith(f"{program} ")]


def name_of(words: list[str]) -> str:
    """Returns the command of a line's words behind `raymill`, of one word or two."""
    two = " ".join(words[:2])
    return two if two in NAMES else words[0]


def refusal(words: list[str]) -> str:
    """Returns why the command line is not taken; empty where it is."""
    try:
        command_parser(words).parse_args(words)
    except SystemExit as end:  # of --help
        return repr(end) if end.code else ""
    except UserError as error:
        return repr(error)
    return ""


@pytest.mark.parametrize("typed", of_program("raymill"), ids=lambda typed: typed.place)
def test_a_command_in_a_message_is_there_and_takes_its_flags(typed: Typed) -> None:
    words = shlex.split(typed.line.replace("…", "1"))[1:]
    if words[0] == "--help":  # of the program itself
        assert not refusal(words)
        return
    name = name_of(words)
    assert name in NAMES | FIRST_WORDS, f"{typed.place} names {typed.line!r}"
    *flags, last = [word for word in words if word.startswith("--")] or [""]
    if len(words) == len(name.split()) + len(flags) + bool(last):
        # It names the command, or flags of it, and leaves the rest to the reader
        assert all(flag in manual_of(name) for flag in (*flags, last)), typed
        return
    assert not (said := refusal(words)), f"{typed.place} tells to type {typed.line!r}: {said}"


def test_a_value_in_a_line_to_type_is_quoted_for_the_shell() -> None:
    """As of `raymill plan {path}`, where the path has a blank."""
    for folder in CODE_FOLDERS:
        for path in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                for name in unquoted(node):
                    assert name in PLAIN, f"{path}:{node.lineno} has {name} in a line to type"


def unquoted(node: ast.AST) -> Iterator[str]:
    """Yields each value of a text that stands in a command in backticks, or in one that is the text."""
    text = ""
    for part in node.values if isinstance(node, ast.JoinedStr) else ():
        if isinstance(part, ast.FormattedValue):
            begun = re.search(r"`raymill [^`]*$", text) or re.match("raymill [^,]*$", text)
            if begun and not ast.unparse(part.value).startswith(("shlex.", "storage_flag(")):
                yield ast.unparse(part.value)
        text += template(part)


PLAIN = {"config.run_id", "served", "where", "typed", "name", "key", "version()"}
"""Values that are quoted before, or of which no shell makes anything else: ids and names."""


@cache
def manual_of(name: str) -> str:
    """Returns what `raymill NAME --help all` prints."""
    shown = io.StringIO()
    words = [*name.split(), "--help", "all"]
    with redirect_stdout(shown), suppress(SystemExit):
        command_parser(words).parse_args(words)
    return shown.getvalue()


def test_what_a_message_tells_to_install_is_what_the_project_declares() -> None:
    """`raymill` itself is on no package index: a line that names it installs a stranger's code."""
    for extra, packages in read_table(str(REPOSITORY / "model/tables.py"), "extras").items():
        assert set(packages) == set(declared(extra)), extra
        assert shlex.split(pip_line(extra)) == ["pip", "install", *packages]


def declared(extra: str) -> list[str]:
    """Returns the packages of an extra, with those of the extras that it names."""
    packages: list[str] = []
    for entry in EXTRAS[extra]:
        ours = re.fullmatch(r"raymill\[(.*)\]", entry)
        names = ours[1].split(",") if ours else []
        packages += [package for name in names for package in declared(name)] if ours else [entry]
    return packages


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_line_of_pip_in_a_document_names_an_extra_of_the_checkout(readme: Path) -> None:
    lines = re.findall(r"pip install ([^`\n]*)", readme.read_text(encoding="utf-8"))
    for line in lines:
        words = shlex.split(line, comments=True)
        assert not any(word.partition("[")[0] == "raymill" for word in words), line
        for place in (word for word in words if word.startswith(".[")):
            assert set(place[2:-1].split(",")) <= EXTRAS.keys(), line


def test_no_message_tells_to_install_what_no_index_has() -> None:
    lines = [typed for typed in told() if typed.line.startswith("pip ")]
    assert not [typed for typed in lines if re.search(r"raymill\b", typed.line)]

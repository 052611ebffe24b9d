"""The commands that the READMEs and the pages of docs/ tell a reader to type."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from cluster.settings.code_folders import CODE_FOLDERS
from tests.repository import REPOSITORY

FOLDERS = (*CODE_FOLDERS, "k8s", "tests", "docs")
READMES = sorted(
    [
        *REPOSITORY.glob("*.md"),
        *(path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.md")),
    ]
)


@dataclass(frozen=True)
class Command:
    """A line of a code block, and its place."""

    line: str
    place: str

    @property
    def is_unfinished(self) -> bool:
        return self.line.endswith("\\")

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)

    @property
    def program(self) -> str:
        return self.words[0]


def code_blocks(readme: Path) -> list[tuple[int, str]]:
    """Returns the number of the first line and the text of each fenced block."""
    text = readme.read_text(encoding="utf-8")
    found = re.finditer(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start()].count("\n") + 2, match[1]) for match in found]


def blocks_of_commands(readme: Path) -> list[list[Command]]:
    """Returns, for each block that has any, the lines that begin with a program that a reader
    calls."""
    blocks = []
    for first, block in code_blocks(readme):
        found = []
        for number, line in enumerate(block.splitlines(), first):
            continued = found and found[-1].is_unfinished
            if continued or re.match(r"(raymill|make|kubectl|curl|export) ", line):
                before = found.pop().line[:-1] if continued else ""
                found.append(Command(before + line, f"{readme.relative_to(REPOSITORY)}:{number}"))
        if found:
            blocks.append(found)
    return blocks


def all_commands(program: str) -> list[Command]:
    blocks = [block for readme in READMES for block in blocks_of_commands(readme)]
    return [command for block in blocks for command in block if command.program == program]

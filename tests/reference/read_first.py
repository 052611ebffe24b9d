"""The part of CONTRIBUTING's "Read first" that is about a folder, for that folder's README."""

import re
from pathlib import Path

from tests.repository import REPOSITORY

_ROW = re.compile(r"^\| \[([\w/.]+)\]\(\1\) \| (.+) \|$", re.MULTILINE)
_LIST = re.compile(r"(?<=^\*\*Read first\*\*:\n\n)(?:- .*\n)+", re.MULTILINE)


def folders() -> list[str]:
    """Returns the top folders that have files to read first, in the list's order."""
    return list(dict.fromkeys(path.partition("/")[0] for path, _ in _rows()))


def readme(folder: str) -> Path:
    return REPOSITORY / folder / "README.md"


def with_list(folder: str) -> str:
    """Returns the folder's README with the list as CONTRIBUTING has it."""
    text = readme(folder).read_text(encoding="utf-8")
    own = [
        (path.partition("/")[2], words) for path, words in _rows() if path.startswith(f"{folder}/")
    ]
    lines = "".join(f"- [{path}]({path}): {words}\n" for path, words in own)
    replaced, count = _LIST.subn(lambda _: lines, text)
    assert count == 1, f"{folder}/README.md has no list below `**Read first**:`"
    return replaced


def _rows() -> list[tuple[str, str]]:
    page = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return _ROW.findall(page.partition("## Read first")[2].partition("\n## ")[0])

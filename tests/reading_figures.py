"""Measures how dense the code is to a reader: `python -m tests.reading_figures` prints a table by
folder.

A token is one of Python's `tokenize`, without comments and docstrings; a line of code is one that
has a token; a statement is one of Python's `ast`, without docstrings, of which a compound one counts
as its head beside those in it. In TOML tables and C++ a token is a word or a mark, and no statements
are counted.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.settings.code_folders import CODE_FOLDERS
from tests.repository import REPOSITORY

VAGUE_NAMES = frozenset({"of", "own", "both", "found", "each", "passed", "taken", "said"})
"""Names that mean nothing at the second reading."""

_LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
_BEGINS_STATEMENT = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")
_NOT_CODE = re.compile(r"//[^\n]*|/\*.*?\*/|^\s*#[^\n]*", re.DOTALL | re.MULTILINE)


@dataclass
class Density:
    num_tokens: int = 0
    num_lines: int = 0
    num_statements: int = 0

    def add(self, other: "Density") -> None:
        self.num_tokens += other.num_tokens
        self.num_lines += other.num_lines
        self.num_statements += other.num_statements

    @property
    def tokens_a_line(self) -> float:
        return self.num_tokens / max(1, self.num_lines)

    @property
    def tokens_a_statement(self) -> float:
        return self.num_tokens / max(1, self.num_statements)


def density(source: str) -> Density:
    """Returns the tokens, the lines and the statements of a Python file."""
    num_tokens, lines = 0, set[int]()
    may_be_docstring = True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in _BEGINS_STATEMENT:
            may_be_docstring = True
        if token.type in _LAYOUT:
            continue
        if token.type == tokenize.STRING and may_be_docstring:
            continue
        may_be_docstring = False
        num_tokens += 1
        lines.update(range(token.start[0], token.end[0] + 1))
    statements = [node for node in ast.walk(ast.parse(source)) if _is_statement(node)]
    return Density(num_tokens, len(lines), len(statements))


def _is_statement(node: ast.AST) -> bool:
    is_text = (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
    return isinstance(node, ast.stmt) and not is_text


def crowded_comprehensions(tree: ast.AST) -> list[int]:
    """Returns the lines of comprehensions with two `for`, or with another comprehension inside."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, _COMPREHENSIONS):
            inner = [child for child in ast.walk(node) if isinstance(child, _COMPREHENSIONS)]
            if len(node.generators) > 1 or len(inner) > 1:
                lines.append(node.lineno)
    return lines


def walruses(tree: ast.AST) -> list[int]:
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.NamedExpr)]


def vague_names(tree: ast.AST) -> list[str]:
    """Returns the assigned names that are vague, with their lines."""
    names = []
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Name)
            and isinstance(node.ctx, ast.Store)
            and node.id in VAGUE_NAMES
        ):
            names.append(f"{node.id}:{node.lineno}")
        if isinstance(node, ast.arg) and node.arg in VAGUE_NAMES:
            names.append(f"{node.arg}:{node.lineno}")
    return names


def product_files(suffix: str) -> list[Path]:
    files: list[Path] = []
    for folder in CODE_FOLDERS:
        files += sorted((REPOSITORY / folder).rglob(f"*{suffix}"))
    return files


def read_first_files() -> list[Path]:
    """Returns the files that newcomers are to read first."""
    page = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    words = page.partition("## Read first")[2].partition("\n## ")[0]
    files: list[Path] = []
    for link in re.findall(r"\]\(([\w/.]+)\)", words):
        path = REPOSITORY / link
        files += sorted(path.glob("*.py")) if path.is_dir() else [path]
    return files


def by_folder(suffix: str = ".py") -> dict[str, Density]:
    folders: dict[str, Density] = {}
    for path in product_files(suffix):
        source = path.read_text(encoding="utf-8")
        folder = path.parent.relative_to(REPOSITORY).as_posix()
        measured = density(source) if suffix == ".py" else _words(source)
        folders.setdefault(folder, Density()).add(measured)
    return folders


def together(densities: Iterator[Density]) -> Density:
    total = Density()
    for measured in densities:
        total.add(measured)
    return total


def _words(source: str) -> Density:
    lines = [line for line in _NOT_CODE.sub("", source).splitlines() if line.strip()]
    return Density(sum(len(_WORD_OR_MARK.findall(line)) for line in lines), len(lines))


def main() -> None:
    heads = ("tokens", "lines", "a line", "statements", "a statement")
    print("folder".ljust(32) + "".join(head.rjust(12) for head in heads))
    for suffix in (".py", ".toml", ".cpp", ".h"):
        folders = by_folder(suffix)
        for name, measured in folders.items():
            print(_row(name, measured))
        print(_row(f"all {suffix}", together(iter(folders.values()))))
    files = [density(path.read_text(encoding="utf-8")) for path in read_first_files()]
    print(_row("to read first", together(iter(files))))


def _row(name: str, measured: Density) -> str:
    row = f"{name:32}{measured.num_tokens:>12,}{measured.num_lines:>12,}{measured.tokens_a_line:>12.1f}"
    if measured.num_statements:
        row += f"{measured.num_statements:>12,}{measured.tokens_a_statement:>12.1f}"
    return row


if __name__ == "__main__":
    main()

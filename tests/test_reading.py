"""The code can be read: bounds on how much a line says, above all in the files that a newcomer
reads first."""

import ast

import pytest

from tests.reading_figures import (
    by_folder,
    crowded_comprehensions,
    density,
    read_first_files,
    together,
    vague_names,
    walruses,
)
from tests.repository import REPOSITORY

MOST_TOKENS_A_LINE = 9.0
MOST_TOKENS_A_LINE_READ_FIRST = 9.0
MOST_WALRUSES = 3  # of a file

READ_FIRST = [path.relative_to(REPOSITORY).as_posix() for path in read_first_files()]


def test_a_token_is_neither_comment_nor_docstring_nor_layout() -> None:
    measured = density(
        '"""Says what."""\n\nx = f(1)  # a comment\n\n\ndef g():\n    """Says."""\n    return "text"\n'
    )
    assert (measured.num_tokens, measured.num_lines, measured.num_statements) == (13, 3, 3)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("[x for x in y]", 0),
        ("[x for x in y for z in x]", 1),
        ("[[x for x in z] for z in y]", 1),
        ("{k: max(v for v in w) for k, w in y}", 1),
        ("f(x for x in y) + sum(x for x in z)", 0),
    ],
)
def test_crowded_comprehensions_are_found(source: str, count: int) -> None:
    assert len(crowded_comprehensions(ast.parse(source))) == count


def test_the_product_says_one_thing_a_line() -> None:
    assert together(iter(by_folder().values())).tokens_a_line <= MOST_TOKENS_A_LINE


def test_what_is_read_first_says_no_more_a_line() -> None:
    assert len(READ_FIRST) > 20
    files = [density((REPOSITORY / name).read_text(encoding="utf-8")) for name in READ_FIRST]
    assert together(iter(files)).tokens_a_line <= MOST_TOKENS_A_LINE_READ_FIRST


@pytest.mark.parametrize("name", READ_FIRST)
def test_a_file_to_read_first_needs_no_second_reading(name: str) -> None:
    tree = ast.parse((REPOSITORY / name).read_text(encoding="utf-8"))
    assert crowded_comprehensions(tree) == []
    assert len(walruses(tree)) <= MOST_WALRUSES
    assert vague_names(tree) == []

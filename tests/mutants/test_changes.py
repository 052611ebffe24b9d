"""What is changed of a module, and what is left alone."""

import ast

import pytest

from tests.mutants.changes import changes, mutated


def mutants_of(source: str) -> list[str]:
    return [mutated(source, number) for number in range(len(changes(ast.parse(source))))]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a < b", ["a <= b"]),
        ("a == b is not c", ["a != b is not c", "a == b is c"]),
        ("a in b", ["a not in b"]),
        ("a + b // c", ["a - b // c", "a + b * c"]),
        ("a += b", ["a -= b"]),
        ("a and b", ["a or b"]),
        ("x = not a", ["x = not not a"]),
        ("x = -a", ["x = +a"]),
        ("x = 3", ["x = 4"]),
        ("x = 0.5", ["x = 1.0"]),
        ("x = True", ["x = False"]),
        ("x = min(a, b)", ["x = max(a, b)"]),
        ("x = a if b else c", ["x = a if not b else c"]),
        ("x = [a for a in b if a]", ["x = [a for a in b if not a]"]),
        ("x[1:]", ["x[2:]"]),
    ],
)
def test_each_operator_and_constant_is_changed_once(line: str, expected: list[str]) -> None:
    assert mutants_of(line) == expected


def test_loops_and_conditions_are_changed() -> None:
    source = "for a in b:\n    if a:\n        continue\n    break"
    assert mutants_of(source) == [
        "for a in b:\n    if a:\n        continue\n    continue",
        "for a in b:\n    if not a:\n        continue\n    break",
        "for a in b:\n    if a:\n        break\n    break",
    ]


@pytest.mark.parametrize(
    "source",
    [
        '"""Has 3 words."""',
        "x: Literal[3]",
        "def f(x: Literal[3]) -> Literal[3]: ...",
        "@cache(3)\ndef f(): ...",
        "raise ValueError(f'{3} of them')",
        "assert x < 3",
        "x = f'{3 + y}' + 'text'",
        "Both = A | B",
        "if TYPE_CHECKING:\n    import x",
    ],
)
def test_what_speaks_to_people_and_type_checkers_is_left_alone(source: str) -> None:
    assert mutants_of(source) == []


def test_a_change_knows_its_line_and_where_its_function_begins() -> None:
    source = "x = 1\n\n@property\ndef f(self):\n    return 2\n\nclass C:\n    def g(self):\n        return 3"
    found = [(change.line, change.function) for change in changes(ast.parse(source))]
    assert found == [(1, None), (5, 3), (9, 8)]

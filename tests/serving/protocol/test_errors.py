"""The table of errors: each is raised somewhere, with just the values that its words need."""

import ast
import string
from collections.abc import Iterator

import pytest

from model.tables import read_table
from serving.protocol import errors
from tests.repository import REPOSITORY


def raised() -> Iterator[tuple[str, set[str]]]:
    """Yields the name of each error that is raised, and the names of the values that it gets."""
    for path in (REPOSITORY / "serving").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Name)
                and call.func.id == "error_of"
            ):
                yield (
                    ast.literal_eval(call.args[0]),
                    {str(keyword.arg) for keyword in call.keywords} - {"param"},
                )


def test_each_error_is_raised_with_what_its_words_need() -> None:
    table = read_table(errors.__file__, "errors")
    needed = {
        name: {field for _, field, _, _ in string.Formatter().parse(error["message"]) if field}
        for name, error in table.items()
    }
    found = list(raised())
    assert {name for name, _ in found} == table.keys()
    assert [(name, values) for name, values in found if values != needed[name]] == []


def test_values_stand_in_the_words() -> None:
    error = errors.error_of("model_not_found", param="model", name="gpt-4\n", served="mine")
    assert error.message == "The model 'gpt-4\\n' does not exist; this endpoint serves 'mine'."
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    with pytest.raises(KeyError):
        errors.error_of("model_not_found")


def test_a_planned_drain_is_recognized_by_its_header() -> None:
    error = errors.error_of("draining")
    assert error.headers == {"Retry-After": "30", errors.DRAINING_HEADER: "1"}
    assert 'POST /admin/drain with {"drain": false}.' in error.message
